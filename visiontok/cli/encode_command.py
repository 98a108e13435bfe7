"""Encodes pictures with a 1D tokenizer.

  visiontok encode photo.png -o photo.vtok                                         the shipped tiny tokenizer
  visiontok encode photos -o tokens --tokens 8
  visiontok encode photos -o tokens --target-psnr 20 --to parquet --resume
  visiontok encode photos -o tokens --mean-tokens 12 --to parquet
  visiontok encode shard-*.tar -o tokens -t one_d_piece --weights one-d-piece-s.bin --to webdataset
  visiontok encode photos -o tokens --to parquet --launcher ray --concurrency 4

A source is an image, a folder, a .tar shard of webdataset or a Parquet file. Pictures that cannot be read are counted
and named; more of them than --max-failed end the command with exit code 1, after everything else was done.
"""

from __future__ import annotations

import argparse
from typing import Any

from visiontok.cli import output
from visiontok.cli.values import natural, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("source", nargs="+", help="image, folder, .tar or .parquet")
    parser.add_argument("-o", "--output", required=True, help="folder, or a .vtok file for one picture")
    add_tokenizer(parser)
    group = parser.add_argument_group("tokens; all of them by default").add_mutually_exclusive_group()
    group.add_argument("--tokens", type=positive, metavar="K", help="tokens for each picture")
    group.add_argument("--target-psnr", type=float, metavar="DB", help="the fewest that reach this quality")
    group.add_argument("--budget-bytes", type=positive, metavar="N", help="as many as fit into a file of N bytes")
    group.add_argument(
        "--mean-tokens", type=float, metavar="X", help="X on average, more for pictures that need them, in each shard"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--to", choices=("vtok", "parquet", "webdataset"), default="vtok", help="form (vtok)")
    group.add_argument("--shard-size", type=positive, default=1024, metavar="N", help="pictures per shard (1024)")
    group.add_argument("--seed", type=natural, metavar="N", help="store as the seed to decode with")
    group.add_argument("--steps", type=positive, metavar="N", help="store as the steps to decode with")
    group.add_argument("--guidance", type=float, metavar="X", help="store as the guidance to decode with")
    group = parser.add_argument_group("run")
    group.add_argument("--fit", choices=("crop", "stretch"), default="crop", help="how pictures become square (crop)")
    group.add_argument("-j", "--workers", type=positive, default=4, metavar="N", help="threads that read (4)")
    group.add_argument("--resume", action="store_true", help="continue an output that was begun")
    group.add_argument("--max-failed", type=natural, default=0, metavar="N", help="unreadable pictures to accept (0)")
    group.add_argument("--launcher", choices=("local", "ray"), default="local", help="ray: on Ray Data, Parquet only")
    group.add_argument("--concurrency", type=positive, default=1, metavar="N", help="models at once with ray (1)")
    add_run(parser)


def add_tokenizer(parser: argparse.ArgumentParser, default: str | None = "tiny_one_d_piece") -> None:
    """`-t --weights --device --batch-size`."""
    group = parser.add_argument_group("tokenizer")
    shown = default or "the shipped one that the tokens are of"
    group.add_argument("-t", "--tokenizer", default=default, metavar="NAME", help=f"name ({shown})")
    group.add_argument("--weights", metavar="PATH", help="weights file, folder or hub id; the shipped ones need none")
    group.add_argument("--variant", help="size, where the weights do not say it")
    group.add_argument("--device", default="cpu", help="torch device (cpu)")
    group.add_argument("-b", "--batch-size", type=positive, default=32, metavar="N", help="pictures per batch (32)")


def add_run(parser: argparse.ArgumentParser) -> None:
    """`--quiet`."""
    parser.add_argument("--quiet", action="store_true", help="no progress, no table; only the --result line")


def tokenizer_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `tokenizers.load` takes beside the name."""
    variant = {} if args.variant is None else {"variant": args.variant}
    return {"source": args.weights, "device": args.device, **variant}


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The flags of these names that were set."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def run(args: argparse.Namespace) -> int:
    """Encodes."""
    return report(args, _ray(args) if args.launcher == "ray" else _local(args))


def report(args: argparse.Namespace, summary: Any) -> int:
    """Prints what was done; 1 if too many pictures failed."""
    for key, reason in summary.failures:
        output.say(args, f"failed: {key}: {reason}")
    rate = summary.images / summary.seconds if summary.seconds else 0.0
    lines = [("images", f"{summary.images}, and {summary.skipped} done before, {summary.failed} failed")]
    lines += [("tokens", str(summary.tokens)), ("bytes", str(summary.bytes)), ("images/s", f"{rate:.1f}")]
    output.say(args, output.pairs(lines))
    output.result_line({**vars(summary), "failures": [list(pair) for pair in summary.failures]})
    return 1 if summary.failed > args.max_failed else 0


def _local(args: argparse.Namespace) -> Any:
    from visiontok.bench.progress import tracked
    from visiontok.tokenizers import batch, loading

    tokenizer = loading.load(args.tokenizer, **tokenizer_options(args))
    return batch.encode_files(
        tokenizer, args.source, args.output, to=args.to, tokens=args.tokens, target_psnr=args.target_psnr,
        budget_bytes=args.budget_bytes, mean_tokens=args.mean_tokens, fit=args.fit, batch_size=args.batch_size,
        shard_size=args.shard_size, workers=args.workers, resume=args.resume, progress=tracked("encode", args.quiet),
        **given(args, "seed", "steps", "guidance"),
    )  # fmt: skip


def _ray(args: argparse.Namespace) -> Any:
    from visiontok.errors import ParameterError
    from visiontok.tokenizers.mass import tokenize_dataset

    if args.to != "parquet":
        raise ParameterError(f"--launcher ray writes Parquet; pass --to parquet instead of {args.to}")
    return tokenize_dataset(
        args.source, args.output, tokenizer=args.tokenizer, load_options=tokenizer_options(args), tokens=args.tokens,
        target_psnr=args.target_psnr, budget_bytes=args.budget_bytes, mean_tokens=args.mean_tokens, fit=args.fit,
        batch_size=args.batch_size, shard_size=args.shard_size, workers=args.workers, concurrency=args.concurrency,
        resume=args.resume,
    )  # fmt: skip
