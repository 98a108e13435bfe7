"""Decodes stored tokens to PNG files.

  visiontok decode photo.vtok -o photo.png
  visiontok decode tokens -o pictures --tokens 8 --set steps=10 --set guidance=3.0
  visiontok decode tokens -o pictures -t one_d_piece --weights one-d-piece-s.bin

A source is a .vtok file, a shard (.parquet, .tar) or a folder of them. Options that were stored with the tokens are
used unless --set gives others. Tokens that other weights made are refused.
"""

from __future__ import annotations

import argparse
from typing import Any

from visiontok.cli import encode_command
from visiontok.cli.values import natural, positive, setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("source", help=".vtok, .parquet, .tar, or a folder of them")
    parser.add_argument("-o", "--output", required=True, help="folder, or a .png file for one .vtok file")
    encode_command.add_tokenizer(parser, default=None)
    parser.add_argument("--tokens", type=positive, metavar="K", help="at most the first K of each picture")
    parser.add_argument(
        "--set", dest="settings", action="append", type=setting, default=[], metavar="NAME=VALUE",
        help="option of the family's decoder, such as steps, guidance or seed",
    )  # fmt: skip
    parser.add_argument("--max-failed", type=natural, default=0, metavar="N", help="unreadable tokens to accept (0)")
    encode_command.add_run(parser)


def run(args: argparse.Namespace) -> int:
    """Decodes."""
    from visiontok.bench.progress import tracked
    from visiontok.tokenizers import batch, loading

    name = args.tokenizer or _shipped(args.source)
    tokenizer = loading.load(name, **encode_command.tokenizer_options(args))
    summary = batch.decode_files(
        tokenizer, args.source, args.output, tokens=args.tokens, batch_size=args.batch_size,
        progress=tracked("decode", args.quiet), **dict(args.settings),
    )  # fmt: skip
    return encode_command.report(args, summary)


def _shipped(source: str) -> Any:
    """The shipped tokenizer of the family of the first tokens that can be read."""
    from visiontok.errors import ParameterError
    from visiontok.tokenizers import shards
    from visiontok.tokenizers.loading import TINY

    family = next((file.family for _, file in shards.read(source) if not isinstance(file, str)), None)
    if family is None:
        raise ParameterError(f"{source} holds no tokens that can be read")
    name = next((name for name, of in TINY.items() if of == family), None)
    if name is None:
        raise ParameterError(f"the tokens are of {family!r}; pass -t {family} --weights PATH")
    return name
