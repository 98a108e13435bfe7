"""Accuracy or recall of a reduced model, image by image against the unreduced one.

  visiontok eval --reducer tome --r 5                                        the embedded model on digits
  visiontok eval -m deit_small_patch16_224 --pretrained --data-dir imagenet --reducer pitome --keep 0.9
  visiontok eval --recipe configs/tome/deit_small_patch16_224.yaml --pretrained --data-dir imagenet
  visiontok eval --task zeroshot --reducer tome --r 4                        the embedded CLIP on rendered scenes
  visiontok eval --task zeroshot -m ViT-B-32 --pretrained laion2b_s34b_b79k --data-dir imagenet --reducer tome --r 8
  visiontok eval --task retrieval -m hf:clip-vit-base-patch32 --data-dir coco.csv --reducer pitome --keep 0.9
  visiontok eval --task vqa -m tiny-llava --reducer vtc_cls --keep 16        the embedded LLaVA on rendered scenes
  visiontok eval --task vqa -m hf:llava-1.5-7b-hf --data-dir questions.jsonl --reducer vtc_cls --keep 128

Unreadable images are counted and listed, never replaced; more than --max-failed of them fail the run (exit code 1).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from visiontok.cli import options, output
from visiontok.errors import ParameterError

_SHOWN = 10
_DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    options.add_clip(parser)
    options.add_model(parser, clip=True, mllm=True)
    options.add_reducer(parser)
    options.add_data(parser)
    options.add_run(parser, rounds=0)
    options.add_output(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the evaluation.

    Raises:
        ParameterError: there are no images for this model.
    """
    options.check_task(args)
    if args.task == "vqa":
        return _run_vqa(args)
    if args.task != "classify":
        return _run_clip(args)
    from visiontok.bench.trial import run_trial

    recipe = options.load_recipe(args)
    spec = options.spec(args, timing=False)
    if args.dry_run:
        from visiontok.cli.plan import print_plan

        return print_plan(spec)
    if spec.data == "none":
        raise ParameterError(f"{spec.model} needs images; pass a folder of class folders with --data-dir")
    row = run_trial(spec, quiet=args.quiet)
    output.say(args, describe(row, recipe))
    output.write_results(args, [row])
    output.result_line(row)
    return report_failures(row, args.max_failed)


def describe(row: Mapping[str, Any], recipe: Any = None) -> str:
    """The result for people, with a recipe's published numbers beside the measured ones."""
    from visiontok.bench.table import label

    lines = [("trial", label(row)), ("images", f"{row['n_images']} evaluated, {row['n_failed']} unreadable")]
    lines += _accuracy_lines(row)
    lines += _compute_lines(row)
    if row["role"] == "reduced":
        lines.append(("vs unreduced", f"{row['delta']:+.2f} points, McNemar p = {row['mcnemar_p']:.3g}"))
        lines.append(("agreement", f"{row['agreement']:.2f} % of the answers are the unreduced model's"))
    if row.get("note"):
        lines.append(("note", row["note"]))
    if recipe is not None:
        other = "" if row["model"] == recipe.model else f"of {recipe.model}: "
        lines.append(("published", other + published(recipe.expected)))
    return output.pairs(lines)


def describe_retrieval(row: Mapping[str, Any]) -> str:
    """The result of a retrieval for people."""
    from visiontok.bench.table import columns, label

    reduced = row["role"] == "reduced"
    header = ["", "R@k", "95 % interval", *(("vs unreduced", "McNemar p") if reduced else ())]
    cells = [header]
    for direction, name in _DIRECTIONS.items():
        for k, found in row["recall"][direction].items():
            line = [f"{name} R@{k}", f"{found['value']:.2f}", f"[{found['low']:.1f}, {found['high']:.1f}]"]
            cells.append([*line, f"{found['delta']:+.2f}", f"{found['p_value']:.3g}"] if reduced else line)
    counts = f"{row['n_images']} images, {row['n_captions']} captions, {row['n_failed']} images unreadable"
    lines = [("trial", label(row)), ("data", counts), *_compute_lines(row)]
    if row.get("note"):
        lines.append(("note", row["note"]))
    return "\n".join([output.pairs(lines), "", *columns(cells)])


def describe_vqa(row: Mapping[str, Any]) -> str:
    """The result of questions about images for people."""
    from visiontok.bench.table import label

    interval = f"[{row['exact_match_low']:.1f}, {row['exact_match_high']:.1f}]"
    lines = [
        ("trial", label(row)),
        ("questions", f"{row['n_questions']} answered, {row['n_failed']} images unreadable"),
        ("exact match", f"{row['exact_match']:.2f} {interval} (95 % interval)"),
        ("prefill", f"{row['gmacs']:.4g} of {row['gmacs_base']:.4g} GMACs"),
        ("cache", cache_text(row)),
    ]
    if row["role"] == "reduced":
        lines.append(("vs unreduced", f"{row['delta']:+.2f} points, McNemar p = {row['mcnemar_p']:.3g}"))
        lines.append(("agreement", f"{row['agreement']:.2f} % of the answers are the unreduced model's"))
    if row.get("note"):
        lines.append(("note", row["note"]))
    return output.pairs(lines)


def cache_text(row: Mapping[str, Any]) -> str:
    """What the layers keep of a prompt: `74 -> 26 tokens (layer average 26.0), 0.01 of 0.03 MB`."""
    tokens = row["tokens"]
    average = sum(tokens) / len(tokens)
    return (
        f"{row['tokens_in']} -> {row['tokens_out']} tokens (layer average {average:.1f}), "
        f"{row['kv_mb']:.3g} of {row['kv_mb_base']:.3g} MB"
    )


def _run_vqa(args: argparse.Namespace) -> int:
    from visiontok.bench.mllm_trial import NO_DATA, MllmSubject, run_mllm_trial

    spec = options.mllm_spec(args, timing=False)
    if args.dry_run:
        subject = MllmSubject(spec)
        print(f"trial {spec.key[:12]}: {spec.model}, {spec.reducer or 'unreduced'} {spec.budget}".rstrip())
        if subject.reduction is not None:
            print(subject.reduction.plan)
        return 0
    if spec.data == NO_DATA:
        raise ParameterError(f"{spec.model} needs questions; pass a .jsonl of image, question, answers with --data-dir")
    row = run_mllm_trial(spec, quiet=args.quiet)
    output.say(args, describe_vqa(row))
    output.write_results(args, [row])
    output.result_line(row)
    return report_failures(row, args.max_failed)


def _run_clip(args: argparse.Namespace) -> int:
    from visiontok.bench.clip_trial import ClipSubject, run_clip_trial

    recipe = options.load_recipe(args)
    spec = options.clip_spec(args)
    if args.dry_run:
        subject = ClipSubject(spec)
        print(f"trial {spec.key[:12]}: {spec.model}, {spec.reducer or 'unreduced'} {spec.budget}".rstrip())
        for tower, reduction in subject.reductions.items():
            print(f"{tower} encoder\n{reduction.plan}")
        return 0
    row = run_clip_trial(spec, quiet=args.quiet)
    output.say(args, describe(row, recipe) if spec.task == "zeroshot" else describe_retrieval(row))
    output.write_results(args, [row])
    output.result_line(row)
    return report_failures(row, args.max_failed)


def _accuracy_lines(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    from visiontok.bench.table import accuracy_text

    lines = [("top-1", f"{accuracy_text(row)} (95 % interval)")]
    if row.get("top5") is not None:
        interval = f" [{row['top5_low']:.1f}, {row['top5_high']:.1f}]" if row.get("top5_low") is not None else ""
        lines.append(("top-5", f"{row['top5']:.2f}{interval}"))
    return lines


def _compute_lines(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [("GMACs", f"{row['gmacs']:.4g} of {row['gmacs_base']:.4g}")]
    if row.get("gmacs_text") != row.get("gmacs_text_base"):
        lines.append(("per text", f"{row['gmacs_text']:.4g} of {row['gmacs_text_base']:.4g}"))
    return lines


def report_failures(row: Mapping[str, Any], accepted: int) -> int:
    """Lists unreadable images on standard error; exit code 1 where there are more than accepted."""
    failed = row["failed_images"]
    for image in failed[:_SHOWN]:
        print(f"unreadable: {image['path']}: {image['reason']}", file=sys.stderr)
    if len(failed) > _SHOWN:
        print(f"... and {len(failed) - _SHOWN} more, all in the result row", file=sys.stderr)
    if len(failed) <= accepted:
        return 0
    print(
        f"visiontok eval: error: {len(failed)} unreadable image(s), --max-failed is {accepted}; "
        "repair or remove them, or accept them with --max-failed",
        file=sys.stderr,
    )
    return 1


def published(expected: Any) -> str:
    """A recipe's published numbers and their source, for people."""
    numbers = [f"top-1 {expected.top1:g}"] if expected.top1 is not None else []
    numbers += [f"{expected.gflops:g} GMACs"] if expected.gflops is not None else []
    return f"{', '.join(numbers) or 'no number'} ({expected.source})"
