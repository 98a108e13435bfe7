"""One trial of a model that answers questions about images: a pure function from an `MllmSpec` to a result row."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import visiontok as vt
from visiontok.backbones import hf_cache
from visiontok.bench import environment, mllm_models, timing, vqa
from visiontok.bench.progress import bar
from visiontok.bench.results import TrialSpec, jsonable
from visiontok.bench.runtime import Runtime, threads
from visiontok.core import flops
from visiontok.errors import ParameterError

QUESTIONS = "questions"
NO_DATA = "none"
QUESTION = "what colour is the square?"
"""What is asked about the images that are timed."""


@dataclass(frozen=True)
class MllmSpec(TrialSpec):
    """A trial of a multimodal language model; see `TrialSpec` for the rest.

    Attributes:
        data: `questions` (embedded), `none` (no accuracy) or the path of a `.jsonl` as `vqa.read_jsonl` reads it.
        new_tokens: Tokens to generate: at most, of an answer; exactly, where decoding is timed.
        image_size: `(H, W)` of the noise images that are timed.
    """

    new_tokens: int = vqa.MAX_NEW_TOKENS
    image_size: tuple[int, int] = (336, 336)

    __hash__ = TrialSpec.__hash__

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", mllm_models.canonical(self.model))
        object.__setattr__(self, "image_size", tuple(self.image_size))
        super().__post_init__()
        if self.data == QUESTIONS and self.model != mllm_models.DEFAULT_MLLM:
            raise ParameterError(
                f"the embedded questions are for {mllm_models.DEFAULT_MLLM}; pass a .jsonl with --data-dir"
            )
        if self.new_tokens < 2 and self.timing:
            raise ParameterError(f"timing needs at least 2 new tokens, got {self.new_tokens}")
        given = {
            "--pretrained": self.pretrained,
            "--checkpoint": self.checkpoint,
            "--channels-last": self.channels_last,
            "--torchcompile": self.torchcompile,
        }
        for flag, value in given.items():
            if value:
                raise ParameterError(
                    f"{flag} is not for multimodal models: {mllm_models.HF_PREFIX}PATH has its weights"
                )


def run_mllm_trial(spec: MllmSpec, quiet: bool = True) -> dict[str, Any]:
    """Measures what a spec describes.

    Args:
        spec: The trial.
        quiet: No progress bar.

    Returns:
        A row of `visiontok.bench.schema`. Sizes and GMACs are those of the prefill of one prompt with one image;
        `latency_ms` is the time to the first token.

    Raises:
        VisionTokError: The spec cannot be run.
    """
    start = time.perf_counter()
    with threads(spec.threads):
        subject = MllmSubject(spec)
        sizes = subject.sizes()
        row = spec.identity_row() | {"status": "ok"} | sizes
        if spec.data != NO_DATA:
            row |= subject.answers(quiet)
        if spec.timing:
            row |= subject.speed(sizes["ideal_speedup"], quiet)
        row |= _environment(subject.runtime.device)
    row |= {
        "note": subject.note(),
        "dtype": subject.runtime.precision,
        "wall_s": round(time.perf_counter() - start, 3),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return jsonable(row)


class MllmSubject:
    """The models of a trial.

    Attributes:
        reference: The unreduced model.
        model: The reduced one, or the reference itself.
        reduction: Handle of the reduction, None for an unreduced model.
    """

    def __init__(self, spec: MllmSpec) -> None:
        self.spec, self.runtime = spec, Runtime(spec)
        found = mllm_models.load(spec.model, dtype=self.runtime.dtype)
        self.reference = found.around(found.model.to(self.runtime.device))
        self.model = self.reference
        self.reduction: Any = None
        if spec.reducer is not None:
            copy = vt.detached(self.reference.model)
            self.reduction = vt.patch(copy, spec.reducer, **spec.arguments())
            self.model = self.reference.around(copy)

    def contestants(self) -> dict[str, mllm_models.Mllm]:
        """`reference`, and `trial` where it is another model."""
        found = {"reference": self.reference}
        return found if self.model is self.reference else found | {"trial": self.model}

    def sizes(self) -> dict[str, Any]:
        """GMACs of the prefill of one prompt, cached tokens by layer, and bytes of the cache; run, not estimated."""
        inputs = self._prompts(self.reference, 1)
        base, before = self._prefill(self.reference, inputs)
        after, left = (base, before) if self.model is self.reference else self._prefill(self.model, inputs)
        return {
            "tokens": left.tokens,
            "tokens_in": inputs["input_ids"].shape[1],
            "tokens_out": left.tokens[-1],
            "params_m": sum(value.numel() for value in self.reference.model.parameters()) / 1e6,
            "gmacs_base": base,
            "gmacs": after,
            "ideal_speedup": base / after,
            "kv_mb_base": before.megabytes,
            "kv_mb": left.megabytes,
        }

    def answers(self, quiet: bool) -> dict[str, Any]:
        """Exact match of both models, compared."""
        spec = self.spec
        items = vqa.embedded_items(spec.split) if spec.data == QUESTIONS else vqa.read_jsonl(spec.data)
        total = len(items) if spec.max_images is None else min(len(items), spec.max_images)

        def ask(mllm: mllm_models.Mllm, batch_size: int) -> vqa.Answers:
            with bar(total, f"vqa {spec.model}", quiet) as progress, self._autocast():
                return vqa.answer(
                    mllm,
                    items,
                    batch_size,
                    max_items=spec.max_images,
                    max_new_tokens=spec.new_tokens,
                    on_batch=progress.update,
                )

        said = {
            name: timing.with_batch_decay(functools.partial(ask, mllm), spec.batch_size, spec.retry)[0]
            for name, mllm in self.contestants().items()
        }
        reference = said["reference"]
        result = said.get("trial", reference)
        right, paired = vqa.exact_match(result), vqa.compare(result, reference)
        return {
            "exact_match": right.value,
            "exact_match_low": right.low,
            "exact_match_high": right.high,
            "n_questions": right.n,
            "n_failed": len(result.failures),
            "failed_images": [failure._asdict() for failure in result.failures],
            "delta": paired.delta,
            "mcnemar_p": paired.p_value,
            "agreement": paired.agreement,
        }

    def speed(self, ideal: float, quiet: bool) -> dict[str, Any]:
        """Time to the first token, decoding, and peak memory of both models, in turns."""
        spec, runtime = self.spec, self.runtime
        contestants = self.contestants()

        def run(batch_size: int) -> dict[str, timing.Timing]:
            inputs = self._prompts(self.reference, batch_size)
            calls = {}
            for name, mllm in contestants.items():
                for length in (1, spec.new_tokens):
                    calls[f"{name} {length}"] = self._generation(mllm, inputs, length)
            label = f"bench {spec.reducer or spec.model}"
            with bar(spec.num_bench_iter, label, quiet) as progress, self._autocast():
                return timing.interleave(
                    calls,
                    device=runtime.device,
                    warm=spec.num_warm_iter,
                    rounds=spec.num_bench_iter,
                    on_round=progress.update,
                )

        times, batch_size, decay = timing.with_batch_decay(run, spec.batch_size, spec.retry)
        peaks = {name: self._peak(mllm, batch_size) for name, mllm in contestants.items()}
        return speed_row(times, batch_size, spec.new_tokens, ideal) | {
            "batch_decay": decay,
            "peak_mem_mb": peaks.get("trial", peaks["reference"]),
            "reference_peak_mem_mb": peaks["reference"],
        }

    def note(self) -> str | None:
        """What a reader of the numbers must know, or None."""
        parts = [] if self.reduction is None else [part for one in self.reduction.reducers for part in one.parts()]
        notes = ["counts depend on the image; tokens are those of one"] if any(part.ragged for part in parts) else []
        if any(not part.card.training_free for part in parts):
            notes.append("learned parts are untrained")
        return "; ".join(notes) or None

    # ---- parts

    def _prompts(self, mllm: mllm_models.Mllm, count: int) -> dict[str, Tensor]:
        random = np.random.RandomState(self.spec.seed)
        noise = random.randint(0, 256, (count, *self.spec.image_size, 3), dtype=np.uint8)
        return mllm.move(mllm.inputs([Image.fromarray(pixels) for pixels in noise], [QUESTION] * count))

    def _prefill(self, mllm: mllm_models.Mllm, inputs: dict[str, Tensor]) -> tuple[float, Cached]:
        kept: list[Any] = []

        def forward(**values: Tensor) -> None:
            model: Any = mllm.model
            kept.append(hf_cache.cache_in(model(**values, use_cache=True)))

        with self._autocast():
            gmacs = flops.profile(forward, inputs).total / 1e9  # pyright: ignore[reportArgumentType]
        return gmacs, Cached.of(kept[0])

    def _generation(self, mllm: mllm_models.Mllm, inputs: dict[str, Tensor], length: int) -> Callable[[], Tensor]:
        return functools.partial(mllm.generate, inputs, min_new_tokens=length, max_new_tokens=length)

    def _peak(self, mllm: mllm_models.Mllm, batch_size: int) -> float | None:
        self.runtime.reset_peak()
        with self._autocast():
            self._generation(mllm, self._prompts(mllm, batch_size), self.spec.new_tokens)()
        return self.runtime.peak_memory()

    def _autocast(self) -> torch.autocast:
        dtype = self.runtime.autocast
        return torch.autocast(self.runtime.device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class Cached:
    """What a prefill left in the key-value cache.

    Attributes:
        tokens: Entries of each layer.
        megabytes: Of keys and values of all layers.
    """

    tokens: list[int]
    megabytes: float

    @classmethod
    def of(cls, cache: Any) -> Cached:
        """Of a cache of transformers; layers that keep no keys (linear attention) are passed over."""
        held = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]
        size = sum(part.numel() * part.element_size() for layer in held for part in (layer.keys, layer.values))
        return cls([layer.keys.shape[-2] for layer in held], size / 2**20)


def speed_row(times: dict[str, timing.Timing], batch_size: int, new_tokens: int, ideal: float) -> dict[str, Any]:
    """The columns of speed.

    Args:
        times: Of `reference 1`, `reference N` and maybe `trial 1`, `trial N`, N being `new_tokens`, from one run.
        batch_size: Prompts per call.
        new_tokens: N, at least 2.
        ideal: The ratio of the prefills' MACs.
    """
    first, whole = times["reference 1"], times[f"reference {new_tokens}"]
    trial, long = times.get("trial 1", first), times.get(f"trial {new_tokens}", whole)
    row: dict[str, Any] = {
        "latency_ms_p20": 1e3 * trial.p20,
        "latency_ms_p50": 1e3 * trial.p50,
        "latency_ms_p80": 1e3 * trial.p80,
        "reference_ms_p20": 1e3 * first.p20,
        "reference_ms_p50": 1e3 * first.p50,
        "reference_ms_p80": 1e3 * first.p80,
        "generate_ms_p50": 1e3 * long.p50,
        "reference_generate_ms_p50": 1e3 * whole.p50,
        "new_tokens": new_tokens,
        "decode_tokens_per_s": decode_rate(trial, long, batch_size, new_tokens),
        "reference_decode_tokens_per_s": decode_rate(first, whole, batch_size, new_tokens),
        "images_per_s": batch_size / trial.p50,
        "launch_bound": trial.launch_bound,
        "clock": trial.clock,
        "rounds": len(trial.samples),
        "batch_size": batch_size,
    }
    if trial is first:
        return row
    ratio, overall = timing.speedup(first, trial), timing.speedup(whole, long)
    return row | {
        "speedup": ratio.value,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "speedup_clear": ratio.clear,
        "generate_speedup": overall.value,
        "generate_speedup_clear": overall.clear,
        "e_total": ratio.value / ideal,
    }


def decode_rate(first: timing.Timing, whole: timing.Timing, batch_size: int, new_tokens: int) -> float | None:
    """Tokens per second after the first, from the median of whole minus first by round; None where it is not positive.

    Args:
        first, whole: Times of generating one and `new_tokens` tokens.
        batch_size: Prompts per call.
        new_tokens: At least 2.
    """
    seconds = float(np.median(np.subtract(whole.samples, first.samples)))
    return batch_size * (new_tokens - 1) / seconds if seconds > 0 else None


def _environment(device: torch.device) -> dict[str, Any]:
    found = environment.describe(device)
    return found | {"versions": found["versions"] | {"transformers": version("transformers")}}
