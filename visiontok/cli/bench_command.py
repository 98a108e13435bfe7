"""Times a reduced model against the unreduced one and the free-slice oracle, in turns.

  visiontok bench --reducer tome --r 5 --threads 1
  visiontok bench -m deit_small_patch16_224 --reducer tome --r 13 -b 16 --threads 1
  visiontok bench -m tiny-llava --reducer vtc_cls --keep 16 --threads 1

S = T(unreduced) / T(reduced); E_total = S / (ratio of MACs), E_hw = the same for the oracle, which slices x[:, :K]
for free, E_method = S / S_oracle. Where the intervals overlap no speed-up is printed.
Multimodal models are timed to the first token, and while they generate --new-tokens; -b is 1 unless given.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from visiontok.cli import options, output
from visiontok.errors import ParameterError

_IMAGES = 32
_CLOCKS = {"process": "CPU time", "wall": "wall time", "cuda": "GPU events"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    options.add_model(parser, mllm=True)
    options.add_reducer(parser)
    options.add_run(parser)
    options.add_output(parser)
    parser.set_defaults(batch_size=None)
    parser.add_argument(
        "--new-tokens", type=options.positive, metavar="N", help="tokens to generate, for multimodal models (16)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark."""
    from visiontok.bench.mllm_models import is_mllm
    from visiontok.bench.trial import run_trial

    if is_mllm(options.model_name(args, options.load_recipe(args))):
        return _run_mllm(args)
    if args.new_tokens is not None:
        raise ParameterError("--new-tokens is for multimodal models: -m tiny-llava or -m hf:DIR")
    args.batch_size = args.batch_size or _IMAGES
    spec = options.spec(args, data="none")
    if args.dry_run:
        from visiontok.cli.plan import print_plan

        return print_plan(spec)
    row = run_trial(spec, quiet=args.quiet)
    output.say(args, describe(row))
    output.write_results(args, [row])
    output.result_line(row)
    return 0


def _run_mllm(args: argparse.Namespace) -> int:
    from visiontok.bench.mllm_trial import MllmSubject, run_mllm_trial

    args.batch_size = args.batch_size or 1
    spec = options.mllm_spec(args)
    if args.dry_run:
        subject = MllmSubject(spec)
        print(f"trial {spec.key[:12]}: {spec.model}, {spec.reducer or 'unreduced'} {spec.budget}".rstrip())
        if subject.reduction is not None:
            print(subject.reduction.plan)
        return 0
    row = run_mllm_trial(spec, quiet=args.quiet)
    output.say(args, describe_mllm(row))
    output.write_results(args, [row])
    output.result_line(row)
    return 0


def describe(row: Mapping[str, Any]) -> str:
    """The result for people."""
    from visiontok.bench.table import label, speedup_text

    lines = [
        ("trial", label(row)),
        ("device", f"{row['device']}, {row['threads']} thread(s), {row['dtype']}, batch {row['batch_size']}"),
        ("timing", f"{_CLOCKS[row['clock']]}, {row['rounds']} interleaved rounds"),
        ("unreduced", _times(row, "reference") + f"  {row['gmacs_base']:.4g} GMACs"),
    ]
    if row["role"] != "unreduced":
        lines += [
            ("reduced", _times(row, "latency") + f"  {row['gmacs']:.4g} GMACs, {row['images_per_s']:.4g} images/s"),
            ("speed-up", _verdict(speedup_text(row), row)),
            ("efficiency", _efficiencies(row)),
        ]
    if row.get("note"):
        lines.append(("note", row["note"]))
    if row.get("batch_decay"):
        lines.append(("memory", f"batch {', '.join(map(str, row['batch_decay']))} did not fit"))
    if row.get("launch_bound"):
        lines.append(("warning", LAUNCH_BOUND))
    return output.pairs(lines)


def describe_mllm(row: Mapping[str, Any]) -> str:
    """The result of a multimodal model for people."""
    from visiontok.bench.table import label, speedup_text
    from visiontok.cli.eval_command import cache_text

    reduced = row["role"] == "reduced"
    lines = [
        ("trial", label(row)),
        ("device", f"{row['device']}, {row['threads']} thread(s), {row['dtype']}, batch {row['batch_size']}"),
        ("timing", f"{_CLOCKS[row['clock']]}, {row['rounds']} interleaved rounds"),
        ("prefill", f"{row['gmacs']:.4g} of {row['gmacs_base']:.4g} GMACs per prompt"),
        ("cache", cache_text(row)),
        ("first token", _times(row, "reference") + ", unreduced"),
        *([("", _times(row, "latency") + ", reduced")] if reduced else []),
        ("decode", _decoding(row, "reference_") + (f" -> {_decoding(row)}" if reduced else "") + " tokens/s"),
        (f"{row['new_tokens']} tokens", _generation(row)),
    ]
    if reduced:
        lines.insert(-2, ("speed-up", _verdict(speedup_text(row), row)))
    if row.get("peak_mem_mb") is not None:
        peaks = f"{row['reference_peak_mem_mb']:.0f}" + (f" -> {row['peak_mem_mb']:.0f}" if reduced else "")
        lines.append(("peak memory", f"{peaks} MB"))
    if row.get("note"):
        lines.append(("note", row["note"]))
    if row.get("batch_decay"):
        lines.append(("memory", f"batch {', '.join(map(str, row['batch_decay']))} did not fit"))
    return output.pairs(lines)


LAUNCH_BOUND = (
    "launch-bound: queueing kernels takes as long as running them, so fewer tokens cannot help; "
    "raise --batch-size or use --torchcompile"
)


def _times(row: Mapping[str, Any], name: str) -> str:
    low, middle, high = (row[f"{name}_ms_{quantile}"] for quantile in ("p20", "p50", "p80"))
    return f"{middle:.3f} ms [p20 {low:.3f}, p80 {high:.3f}]"


def _decoding(row: Mapping[str, Any], prefix: str = "") -> str:
    rate = row[f"{prefix}decode_tokens_per_s"]
    return "unmeasurable" if rate is None else f"{rate:.4g}"


def _generation(row: Mapping[str, Any]) -> str:
    text = f"{row['reference_generate_ms_p50']:.3f} ms"
    if row["role"] != "reduced":
        return text
    ratio = f"{row['generate_speedup']:.2f}x" if row["generate_speedup_clear"] else "="
    return f"{text} -> {row['generate_ms_p50']:.3f} ms, {ratio}"


def _verdict(text: str, row: Mapping[str, Any]) -> str:
    if text == "=":
        return "= (the p20-p80 intervals overlap: no difference that this run could tell)"
    return f"{text}, ideal {row['ideal_speedup']:.2f}x"


def _efficiencies(row: Mapping[str, Any]) -> str:
    if row.get("e_hw") is None:
        reason = row.get("oracle_note") or "no oracle for a dense model"
        return f"E_total {row['e_total']:.2f} (E_hw and E_method unknown: {reason})"
    return f"E_total {row['e_total']:.2f} = E_hw {row['e_hw']:.2f} x E_method {row['e_method']:.2f}"
