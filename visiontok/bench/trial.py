"""One trial: a pure function from a `TrialSpec` to a result row."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import visiontok as vt
from visiontok.bench import accuracy, data, environment, models, timing
from visiontok.bench.oracle import oracle
from visiontok.bench.progress import bar
from visiontok.bench.results import TrialSpec, jsonable, write_atomic
from visiontok.bench.runtime import Runtime, threads
from visiontok.core.flops import count_macs
from visiontok.errors import IncompatibleError, ParameterError, VisionTokError

NO_DATA = "none"
DIGITS = "digits"


def run_trial(spec: TrialSpec, cache: Path | None = None, quiet: bool = True) -> dict[str, Any]:
    """Measures what a spec describes.

    Args:
        spec: the trial.
        cache: folder where the reference's predictions are kept, so that trials of one sweep share them.
        quiet: no progress bar.

    Returns:
        A row of `visiontok.bench.schema`, with status `ok`.

    Raises:
        VisionTokError: the spec cannot be run; `attempt` turns it into a row.
    """
    start = time.perf_counter()
    with threads(spec.threads):
        subject = Subject(spec)
        sizes = subject.sizes()
        row = spec.identity_row() | {"status": "ok"} | sizes
        if spec.data != NO_DATA:
            row |= _accuracy(subject, cache, quiet)
        if spec.timing:
            row |= _timing(subject, sizes, quiet)
        row |= environment.describe(subject.runtime.device)
    row |= {
        "note": subject.note(),
        "dtype": subject.runtime.precision,
        "input_size": list(subject.input_size),
        "wall_s": round(time.perf_counter() - start, 3),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return jsonable(row)


def attempt(spec: TrialSpec, cache: Path | None = None, quiet: bool = True) -> dict[str, Any]:
    """`run_trial`, with a failure as a row of status `oom` or `error`: one bad trial must not end a sweep."""
    try:
        return run_trial(spec, cache, quiet)
    except Exception as error:
        status = "oom" if timing.is_oom(error) else "error"
        known = isinstance(error, VisionTokError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        return spec.identity_row() | {"status": status, "error": " ".join(text.split())[:2000] or type(error).__name__}


class Subject:
    """The models of a trial: the reference, and what is compared with it.

    Attributes:
        reference: the unreduced model.
        model: the reduced one, the smaller one, or the reference itself.
        reduction: handle of the reduction, None for a dense model.
    """

    def __init__(self, spec: TrialSpec) -> None:
        self.spec = spec
        self.runtime = Runtime(spec)
        reference_name = spec.reference or spec.model
        self.reference = self._load(reference_name)
        self.input_size = spec.input_size or models.input_size(self.reference)
        self.reduction: Any = None
        self.loaded = False
        if spec.reducer is not None:
            self.model = vt.detached(self.reference if spec.model == reference_name else self._load(spec.model))
            self.reduction = vt.patch(self.model, spec.reducer, **spec.arguments())
            if spec.checkpoint is not None:
                self.loaded = models.load_learned(self.reduction, spec.checkpoint)
        else:
            self.model = self.reference if spec.model == reference_name else self._load(spec.model)

    def _load(self, name: str) -> nn.Module:
        spec = self.spec
        model = models.load(
            name,
            pretrained=spec.pretrained,
            checkpoint=spec.checkpoint if name == spec.model else None,
            input_size=spec.input_size,
            seed=spec.seed,
        )
        return self.runtime.place(model)

    def sizes(self) -> dict[str, Any]:
        """Tokens and GMACs of the trial and of its reference."""
        if self.reduction is not None:
            report = self.reduction.report(input_size=self.input_size)
            base, reduced, matcher = report.gmacs_before, report.gmacs_after, report.gmacs_matcher
            tokens = list(report.tokens)
        else:
            base = count_macs(self.reference, self.input_size) / 1e9
            reduced = base if self.model is self.reference else count_macs(self.model, self.input_size) / 1e9
            tokens, matcher = None, None
        return {
            "tokens": tokens,
            "tokens_in": _tokens_in(self.reference),
            "tokens_out": tokens[-1] if tokens else _tokens_in(self.model),
            "params_m": sum(value.numel() for value in self.model.parameters()) / 1e6,
            "gmacs_base": base,
            "gmacs": reduced,
            "gmacs_matcher": matcher,
            "ideal_speedup": base / reduced,
        }

    def note(self) -> str | None:
        """What a reader of the numbers must know, or None."""
        reducers = () if self.reduction is None else self.reduction.reducers
        notes = []
        if any(part.ragged for reducer in reducers for part in reducer.parts()):
            notes.append("counts depend on the image; tokens and GMACs are the most that an image can need")
        if not self.loaded and any(not reducer.card.training_free for reducer in reducers):
            found = "the checkpoint holds none" if self.spec.checkpoint else "pass trained ones with --checkpoint"
            notes.append(f"learned parts are untrained: {found}")
        return "; ".join(notes) or None

    def oracle(self, tokens: list[int] | None) -> tuple[nn.Module | None, str | None]:
        """The free-slice oracle of the reduction, or None and the reason."""
        if self.reduction is None or tokens is None:
            return None, None
        try:
            return oracle(self.reference, tokens, self.reduction.reducers[0].site.name), None
        except (IncompatibleError, ParameterError) as error:
            return None, str(error)

    def dataset(self, model_name: str, model: nn.Module) -> data.FolderDataset | data.ArrayDataset:
        """The images of the trial, as a model wants them.

        Raises:
            ParameterError: the data does not go with the model.
        """
        spec = self.spec
        if spec.data == DIGITS:
            if model_name not in models.EMBEDDED:
                raise ParameterError(f"the embedded digits are for {' and '.join(models.EMBEDDED)}; pass --data-dir")
            return data.ArrayDataset(*_digits(spec.split), max_images=spec.max_images)
        folder = data.split_folder(spec.data, spec.split)
        names = data.class_names(folder, int(getattr(model, "num_classes", 0)), spec.class_map)
        transform = models.transform(model, model_name, spec.input_size)
        return data.FolderDataset(folder, transform, names, spec.max_images)


def _accuracy(subject: Subject, cache: Path | None, quiet: bool) -> dict[str, Any]:
    reference = _reference_predictions(subject, cache, quiet)
    predictions = reference
    if subject.model is not subject.reference:
        predictions = _predict(subject, subject.spec.model, subject.model, quiet)
    top1, paired = accuracy.top_k(predictions), accuracy.compare(predictions, reference)
    top5 = accuracy.top_k(predictions, 5).value if predictions.ranked.shape[1] == 5 else None
    return {
        "top1": top1.value,
        "top1_low": top1.low,
        "top1_high": top1.high,
        "top5": top5,
        "n_images": top1.n,
        "n_failed": len(predictions.failures),
        "failed_images": [failure._asdict() for failure in predictions.failures],
        "delta": paired.delta,
        "mcnemar_p": paired.p_value,
        "agreement": paired.agreement,
    }


def _predict(subject: Subject, name: str, model: nn.Module, quiet: bool) -> accuracy.Predictions:
    dataset, runtime, spec = subject.dataset(name, model), subject.runtime, subject.spec
    call = runtime.runnable(model)

    def run(batch_size: int) -> accuracy.Predictions:
        with bar(len(dataset), f"eval {name}", quiet) as progress:
            batches = data.batches(dataset, batch_size, spec.workers)
            return accuracy.predict(call, batches, runtime.move, on_batch=progress.update)

    return timing.with_batch_decay(run, spec.batch_size, spec.retry)[0]


def _reference_predictions(subject: Subject, cache: Path | None, quiet: bool) -> accuracy.Predictions:
    spec = subject.spec
    name = spec.reference or spec.model
    if cache is None:
        return _predict(subject, name, subject.reference, quiet)
    plain = TrialSpec.from_dict(spec.to_dict() | {"model": name, "reference": None, "reducer": None, "params": {}})
    if name != spec.model:
        plain = TrialSpec.from_dict(plain.to_dict() | {"checkpoint": None})
    identity = json.dumps(plain.to_dict() | {"workers": 0}, sort_keys=True)
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()}.npz"
    if not path.exists():
        _save_predictions(path, _predict(subject, name, subject.reference, quiet))
    return _load_predictions(path)


def _save_predictions(path: Path, predictions: accuracy.Predictions) -> None:
    failures = json.dumps(predictions.failures)
    buffer = io.BytesIO()
    np.savez(buffer, ranked=predictions.ranked, targets=predictions.targets, failures=np.array(failures))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _load_predictions(path: Path) -> accuracy.Predictions:
    with np.load(path, allow_pickle=False) as arrays:
        failures = tuple(data.Failure(*failure) for failure in json.loads(str(arrays["failures"])))
        return accuracy.Predictions(arrays["ranked"], arrays["targets"], failures)


def _timing(subject: Subject, sizes: dict[str, Any], quiet: bool) -> dict[str, Any]:
    spec, runtime = subject.spec, subject.runtime
    free, note = subject.oracle(sizes["tokens"])
    contestants = {"reference": subject.reference, "trial": subject.model, "oracle": free}
    calls = {name: runtime.runnable(model) for name, model in contestants.items() if model is not None}
    if subject.model is subject.reference:
        del calls["trial"]

    def run(batch_size: int) -> dict[str, timing.Timing]:
        images = _images(batch_size, subject.input_size, spec.seed, runtime)
        with torch.inference_mode(), bar(spec.num_bench_iter, f"bench {spec.reducer or spec.model}", quiet) as progress:
            bound = {name: functools.partial(call, images) for name, call in calls.items()}
            return timing.interleave(
                bound,
                device=runtime.device,
                warm=spec.num_warm_iter,
                rounds=spec.num_bench_iter,
                on_round=progress.update,
            )

    runtime.reset_peak()
    times, batch_size, decay = timing.with_batch_decay(run, spec.batch_size, spec.retry)
    return _timing_row(times, batch_size, sizes["ideal_speedup"]) | {
        "oracle_note": note,
        "batch_decay": decay,
        "peak_mem_mb": runtime.peak_memory(),
    }


def _timing_row(times: dict[str, timing.Timing], batch_size: int, ideal: float) -> dict[str, Any]:
    reference = times["reference"]
    trial, free = times.get("trial", reference), times.get("oracle")
    row: dict[str, Any] = {
        "latency_ms_p20": 1e3 * trial.p20,
        "latency_ms_p50": 1e3 * trial.p50,
        "latency_ms_p80": 1e3 * trial.p80,
        "reference_ms_p20": 1e3 * reference.p20,
        "reference_ms_p50": 1e3 * reference.p50,
        "reference_ms_p80": 1e3 * reference.p80,
        "images_per_s": batch_size / trial.p50,
        "launch_bound": trial.launch_bound,
        "clock": trial.clock,
        "rounds": len(trial.samples),
        "batch_size": batch_size,
    }
    if trial is reference:
        return row
    ratio = timing.speedup(reference, trial)
    split = timing.efficiency(ideal, reference, trial, free)
    return row | {
        "oracle_ms_p50": None if free is None else 1e3 * free.p50,
        "speedup": ratio.value,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "speedup_clear": ratio.clear,
        "speedup_oracle": None if free is None else reference.p50 / free.p50,
        "e_total": split.total,
        "e_hw": split.hardware,
        "e_method": split.method,
    }


def _images(batch_size: int, size: tuple[int, ...], seed: int, runtime: Runtime) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return runtime.move(torch.randn(batch_size, *size, generator=generator))


def _tokens_in(model: nn.Module) -> int | None:
    embed: Any = getattr(model, "patch_embed", None)
    patches = getattr(embed, "num_patches", None)
    return None if patches is None else int(patches) + int(getattr(model, "num_prefix_tokens", 0))


@functools.cache
def _digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    from visiontok.models.tiny import digits_split

    if split not in ("train", "test"):
        raise ParameterError(f"the digits have the splits 'test' and 'train', not '{split}'")
    digits = digits_split()
    return (digits.test_images, digits.test_labels) if split == "test" else (digits.train_images, digits.train_labels)
