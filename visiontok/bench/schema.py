"""The schema of one result row, checked before a row is stored and after one is read.

A row is a flat JSON object: numbers and texts are columns of the CSV view, lists and objects are kept in JSON only.
`None` means "not measured"; a row that failed has its identity, `status` and `error` and nothing measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SCHEMA_VERSION = 1
STATUSES = ("ok", "oom", "error")
ROLES = ("unreduced", "smaller", "reduced")

_NUMBER = (int, float)


class Field(NamedTuple):
    """One key of a row: its types (besides `None`, unless `required`), and whether it is a column of the CSV view."""

    types: tuple[type, ...]
    meaning: str
    required: bool = False
    column: bool = True


FIELDS: dict[str, Field] = {
    "schema_version": Field((int,), "version of this schema", required=True),
    "trial_key": Field((str,), "sha256 of the canonical JSON of `spec`", required=True),
    "status": Field((str,), "ok | oom | error", required=True),
    "error": Field((str,), "what failed, one line"),
    "role": Field((str,), "unreduced | smaller | reduced", required=True),
    "model": Field((str,), "model name", required=True),
    "reference": Field((str,), "unreduced model that delta and speed-up compare with", required=True),
    "reducer": Field((str,), "registry name; None for a model that is not reduced"),
    "params": Field((dict,), "parameters of the reducer, budget included", column=False),
    "budget": Field((str,), "the budget as text, for tables: 'gflops=2.7', 'r=13'"),
    "tokens_in": Field(
        (int,), "tokens that enter the first block, prefix included; of multimodal models, of the prompt"
    ),
    "tokens_out": Field((int,), "tokens that leave the last block, prefix included"),
    "tokens": Field(
        (list,), "tokens after each block, prefix included; of multimodal models, cached by each layer", column=False
    ),
    "params_m": Field(_NUMBER, "parameters of the model, millions"),
    "gmacs_base": Field(_NUMBER, "GMACs per image (or prompt) of the reference (what papers call GFLOPs)"),
    "gmacs": Field(_NUMBER, "GMACs per image of this trial, matching excluded; per prompt, matching included"),
    "gmacs_matcher": Field(_NUMBER, "GMACs of scoring and matching, on top"),
    "ideal_speedup": Field(_NUMBER, "gmacs_base / gmacs"),
    "top1": Field(_NUMBER, "top-1 accuracy, percent"),
    "top1_low": Field(_NUMBER, "lower end of the 95 % Wilson interval of top1"),
    "top1_high": Field(_NUMBER, "upper end of the 95 % Wilson interval of top1"),
    "top5": Field(_NUMBER, "top-5 accuracy, percent"),
    "delta": Field(_NUMBER, "top1 (or exact_match) minus the reference's on the same images, points"),
    "mcnemar_p": Field(_NUMBER, "exact McNemar p-value of delta"),
    "agreement": Field(_NUMBER, "images (or questions) with the same answer as the reference's, percent"),
    "n_images": Field((int,), "images that were evaluated"),
    "n_failed": Field((int,), "images that could not be read"),
    "failed_images": Field((list,), "[{path, reason}] of the unreadable images", column=False),
    "latency_ms_p20": Field(_NUMBER, "time of one batch, 20 % quantile"),
    "latency_ms_p50": Field(_NUMBER, "time of one batch, median; of multimodal models, to the first token"),
    "latency_ms_p80": Field(_NUMBER, "time of one batch, 80 % quantile"),
    "reference_ms_p20": Field(_NUMBER, "time of the reference, 20 % quantile"),
    "reference_ms_p50": Field(_NUMBER, "time of the reference, median"),
    "reference_ms_p80": Field(_NUMBER, "time of the reference, 80 % quantile"),
    "oracle_ms_p50": Field(_NUMBER, "time of the free-slice oracle, median"),
    "images_per_s": Field(_NUMBER, "batch_size / latency_ms_p50"),
    "speedup": Field(_NUMBER, "reference median / trial median"),
    "speedup_low": Field(_NUMBER, "lower end of the 95 % bootstrap interval of speedup"),
    "speedup_high": Field(_NUMBER, "upper end of the 95 % bootstrap interval of speedup"),
    "speedup_clear": Field((bool,), "False where the p20-p80 intervals overlap: no speed-up may be claimed"),
    "speedup_oracle": Field(_NUMBER, "reference median / oracle median"),
    "e_total": Field(_NUMBER, "speedup / ideal_speedup"),
    "e_hw": Field(_NUMBER, "speedup_oracle / ideal_speedup: what the machine allows"),
    "e_method": Field(_NUMBER, "speedup / speedup_oracle: what the method costs"),
    "oracle_note": Field((str,), "why there is no oracle"),
    "launch_bound": Field((bool,), "GPU only: the time goes into launching kernels, fewer tokens cannot help"),
    "peak_mem_mb": Field(_NUMBER, "peak GPU memory of the trial"),
    "clock": Field((str,), "cuda | process (CPU time) | wall"),
    "rounds": Field((int,), "interleaved rounds"),
    "batch_size": Field((int,), "batch size that was timed"),
    "batch_decay": Field((list,), "batch sizes that ran out of memory before batch_size", column=False),
    "input_size": Field((list,), "[C, H, W]", column=False),
    "dtype": Field((str,), "float32 | bfloat16 | float16, with '(amp)' under autocast"),
    "sdpa_backend": Field((str,), "attention backend in use"),
    "device": Field((str,), "device type and name"),
    "driver": Field((str,), "CUDA driver or runtime version"),
    "threads": Field((int,), "intra-op threads"),
    "seed": Field((int,), "seed of the trial"),
    "versions": Field((dict,), "versions of visiontok, torch, timm, python", column=False),
    "git_sha": Field((str,), "commit of the checkout, '-dirty' appended where it has changes"),
    "wall_s": Field(_NUMBER, "seconds the trial took"),
    "created": Field((str,), "UTC time, ISO 8601"),
    "spec": Field((dict,), "the TrialSpec that reproduces the row", required=True, column=False),
    "top5_low": Field(_NUMBER, "lower end of the 95 % Wilson interval of top5"),
    "top5_high": Field(_NUMBER, "upper end of the 95 % Wilson interval of top5"),
    "n_classes": Field((int,), "classes of a zero-shot classification"),
    "n_captions": Field((int,), "captions of a retrieval"),
    "gmacs_text_base": Field(_NUMBER, "GMACs per text of the reference"),
    "gmacs_text": Field(_NUMBER, "GMACs per text of this trial, matching included"),
    "i2t_r1": Field(_NUMBER, "image-to-text recall@1 in percent"),
    "i2t_r5": Field(_NUMBER, "image-to-text recall@5 in percent"),
    "i2t_r10": Field(_NUMBER, "image-to-text recall@10 in percent"),
    "t2i_r1": Field(_NUMBER, "text-to-image recall@1 in percent"),
    "t2i_r5": Field(_NUMBER, "text-to-image recall@5 in percent"),
    "t2i_r10": Field(_NUMBER, "text-to-image recall@10 in percent"),
    "recall": Field((dict,), "recall@1/5/10 in both directions with intervals and deltas", column=False),
    "note": Field((str,), "what must be known to read the numbers: counts that are caps, parts that are untrained"),
    "exact_match": Field(_NUMBER, "questions answered right after normalization, percent"),
    "exact_match_low": Field(_NUMBER, "lower end of the 95 % Wilson interval of exact_match"),
    "exact_match_high": Field(_NUMBER, "upper end of the 95 % Wilson interval of exact_match"),
    "n_questions": Field((int,), "questions whose image could be read"),
    "new_tokens": Field((int,), "tokens generated per prompt where decoding was timed"),
    "generate_ms_p50": Field(_NUMBER, "time to generate new_tokens tokens for one batch, prefill included, median"),
    "reference_generate_ms_p50": Field(_NUMBER, "the same of the reference"),
    "generate_speedup": Field(_NUMBER, "reference_generate_ms_p50 / generate_ms_p50"),
    "generate_speedup_clear": Field((bool,), "as speedup_clear, of generate_speedup"),
    "decode_tokens_per_s": Field(_NUMBER, "tokens after the first of each prompt of the batch, per second"),
    "reference_decode_tokens_per_s": Field(_NUMBER, "the same of the reference"),
    "kv_mb_base": Field(_NUMBER, "MB of the reference's key-value cache after the prefill of one prompt"),
    "kv_mb": Field(_NUMBER, "MB of this trial's key-value cache after the prefill of one prompt"),
    "reference_peak_mem_mb": Field(_NUMBER, "peak GPU memory of the reference while it generates"),
}

COLUMNS: tuple[str, ...] = tuple(name for name, field in FIELDS.items() if field.column)
"""Columns of the CSV view; new ones are only ever appended within a schema version."""


def check_row(row: Any) -> list[str]:
    """Lists what is wrong with a row; an empty list means that it follows the schema.

    Args:
        row: a decoded JSON value.

    Returns:
        One sentence per problem, in the order of `FIELDS`.
    """
    if not isinstance(row, dict):
        return [f"a row is an object, got {type(row).__name__}"]
    problems = [f"unknown key '{key}'" for key in row if key not in FIELDS]
    for name, field in FIELDS.items():
        problems += _check_field(name, field, row.get(name))
    if row.get("schema_version") not in (None, SCHEMA_VERSION):
        problems.append(f"schema_version is {row['schema_version']}, this visiontok reads {SCHEMA_VERSION}")
    if row.get("status") not in (None, *STATUSES):
        problems.append(f"status is '{row['status']}', expected one of {', '.join(STATUSES)}")
    if row.get("role") not in (None, *ROLES):
        problems.append(f"role is '{row['role']}', expected one of {', '.join(ROLES)}")
    if row.get("status") in ("oom", "error") and not row.get("error"):
        problems.append("a failed row needs 'error'")
    return problems


def _check_field(name: str, field: Field, value: Any) -> list[str]:
    if value is None:
        return [f"'{name}' is missing"] if field.required else []
    accepted = isinstance(value, field.types) and not (isinstance(value, bool) and bool not in field.types)
    if accepted:
        return []
    names = " or ".join(kind.__name__ for kind in field.types)
    return [f"'{name}' is {type(value).__name__}, expected {names}"]
