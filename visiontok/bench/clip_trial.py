"""One trial of zero-shot classification or of retrieval: a pure function from a `ClipSpec` to a result row."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

import visiontok as vt
from visiontok.bench import accuracy, clip_models, data, environment, pairs, retrieval, timing, zeroshot
from visiontok.bench.progress import bar
from visiontok.bench.results import TrialSpec, jsonable
from visiontok.bench.runtime import Runtime, threads
from visiontok.core import flops
from visiontok.core.reduction import Reduction
from visiontok.errors import ParameterError

SCENES = "scenes"
TASKS = ("zeroshot", "retrieval")
TOWERS = ("visual", "text", "both")
_TEXTS = 256  # per call of the text encoder


@dataclass(frozen=True)
class ClipSpec(TrialSpec):
    """A trial of a model with an image and a text encoder; see `TrialSpec` for the rest.

    Attributes:
        task: `zeroshot` or `retrieval`.
        tower: which encoder is reduced: `visual`, `text` or `both`.
        tag: open_clip's tag of the weights.
        templates: see `zeroshot.load_templates`; None takes open_clip's `openai`, or the scenes' own.
        class_names: see `zeroshot.class_names`.
        csv_img_key, csv_caption_key: columns of a CSV, None to find them.
    """

    task: str = "zeroshot"
    tower: str = "visual"
    tag: str | None = None
    templates: str | None = None
    class_names: str | None = None
    csv_img_key: str | None = None
    csv_caption_key: str | None = None

    __hash__ = TrialSpec.__hash__

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (("task", self.task, TASKS), ("tower", self.tower, TOWERS)):
            if value not in known:
                raise ParameterError(f"{name} must be one of {', '.join(known)}, got '{value}'")
        if self.data == SCENES and self.model != clip_models.DEFAULT_CLIP:
            raise ParameterError(f"the embedded scenes are for {clip_models.DEFAULT_CLIP}; pass --data-dir")


def run_clip_trial(spec: ClipSpec, quiet: bool = True) -> dict[str, Any]:
    """Measures what a spec describes.

    Args:
        spec: the trial.
        quiet: no progress bar.

    Returns:
        A row of `visiontok.bench.schema`; of a retrieval with `recall` (`retrieval.summary`) and `n_captions`.

    Raises:
        VisionTokError: the spec cannot be run.
    """
    start = time.perf_counter()
    with threads(spec.threads):
        subject = ClipSubject(spec)
        row = spec.identity_row() | {"status": "ok"} | subject.sizes()
        row |= subject.zeroshot(quiet) if spec.task == "zeroshot" else subject.retrieval(quiet)
        row |= environment.describe(subject.runtime.device)
    row |= {
        "note": subject.note(),
        "dtype": subject.runtime.precision,
        "input_size": list(subject.reference.input_size),
        "wall_s": round(time.perf_counter() - start, 3),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return jsonable(row)


class ClipSubject:
    """The models of a trial.

    Attributes:
        reference: the unreduced model.
        model: the reduced one, or the reference itself.
        reductions: the handles by encoder, `visual` and `text`; empty where nothing is reduced.
    """

    def __init__(self, spec: ClipSpec) -> None:
        self.spec, self.runtime = spec, Runtime(spec)
        found = clip_models.load(
            spec.model,
            pretrained=spec.tag or spec.pretrained,
            checkpoint=spec.checkpoint,
            input_size=spec.input_size,
            seed=spec.seed,
        )
        self.reference = found.around(self.runtime.place(found.model))
        self.model = self.reference
        self.reductions: dict[str, Reduction] = {}
        if spec.reducer is not None:
            copy = vt.detached(self.reference.model)
            handle: Any = vt.patch(copy, spec.reducer, tower=spec.tower, **spec.arguments())
            self.reductions = dict(handle) if spec.tower == "both" else {spec.tower: handle}
            self.model = self.reference.around(copy)

    def sizes(self) -> dict[str, Any]:
        """GMACs of one image (without the matcher's) and of one text (with them); tokens of the reduced encoder."""
        base = {kind: self._macs(self.reference, kind) for kind in ("visual", "text")}
        after = dict(base)
        matcher = None
        if "visual" in self.reductions:
            report = self.reductions["visual"].report()
            after["visual"] += report.gmacs_after - report.gmacs_before
            matcher = report.gmacs_matcher
        if "text" in self.reductions:
            after["text"] = self._macs(self.model, "text")
        plan = next((reduction.plan for reduction in self.reductions.values()), None)
        return {
            "tokens": plan and list(plan.tokens),
            "tokens_in": plan and plan.length,
            "tokens_out": plan and plan.tokens[-1],
            "params_m": sum(value.numel() for value in self.reference.model.parameters()) / 1e6,
            "gmacs_base": base["visual"],
            "gmacs": after["visual"],
            "gmacs_text_base": base["text"],
            "gmacs_text": after["text"],
            "gmacs_matcher": matcher,
            "ideal_speedup": base["visual"] / after["visual"],
        }

    def zeroshot(self, quiet: bool) -> dict[str, Any]:
        """Top-1 and top-5 of both models, compared."""
        spec = self.spec
        dataset, names, templates = self._classes()
        classes = [zeroshot.class_embeddings(self._texts(m), names, templates, _TEXTS) for m in self._text_models()]

        def predict(found: clip_models.ClipModel, embeddings: Tensor, batch_size: int) -> accuracy.Predictions:
            classify = zeroshot.scores(self.runtime.runnable(found.encode_images), embeddings)  # pyright: ignore
            with bar(len(dataset), f"zero-shot {spec.model}", quiet) as progress:
                batches = data.batches(dataset, batch_size, spec.workers)
                return accuracy.predict(classify, batches, self.runtime.move, on_batch=progress.update)

        reference = self._retried(functools.partial(predict, self.reference, classes[0]))
        result = reference
        if self.model is not self.reference:
            result = self._retried(functools.partial(predict, self.model, classes[-1]))
        return accuracy_row(result, reference) | {"n_classes": len(names)}

    def retrieval(self, quiet: bool) -> dict[str, Any]:
        """Recall in both directions of both models, compared."""
        spec = self.spec
        dataset, captions = self._pairs()

        def embed(found: clip_models.ClipModel, batch_size: int) -> retrieval.Embedded:
            encode = self.runtime.runnable(found.encode_images)  # pyright: ignore[reportArgumentType]
            with bar(len(dataset), f"retrieval {spec.model}", quiet) as progress:
                batches = data.batches(dataset, batch_size, spec.workers)
                return retrieval.embed_images(encode, batches, self.runtime.move, on_batch=progress.update)

        subjects = [self.reference] if self.model is self.reference else [self.reference, self.model]
        images = [self._retried(functools.partial(embed, found)) for found in subjects]
        texts = [(number, text) for number, index in enumerate(images[0].kept.tolist()) for text in captions[index]]
        owner = torch.tensor([number for number, _ in texts])
        words = [text for _, text in texts]
        encoded = [self._embed_texts(found, words) for found in self._text_models()]
        ranks = [
            retrieval.ranks(image.embeddings, encoded[min(index, len(encoded) - 1)], owner)
            for index, image in enumerate(images)
        ]
        recall = retrieval.summary(ranks[-1], ranks[0])
        return {
            "recall": recall,
            **{
                f"{short}_r{k}": found["value"]
                for short, name in (("i2t", "image_to_text"), ("t2i", "text_to_image"))
                for k, found in recall[name].items()
            },
            "n_images": len(images[0].kept),
            "n_captions": len(words),
            "n_failed": len(images[0].failures),
            "failed_images": [failure._asdict() for failure in images[0].failures],
        }

    def note(self) -> str | None:
        """What a reader of the numbers must know, or None."""
        reducers = [reducer for reduction in self.reductions.values() for reducer in reduction.reducers]
        notes = ["the weights are random; give --pretrained TAG or --checkpoint FILE"] if self.reference.random else []
        if any(part.ragged for reducer in reducers for part in reducer.parts()):
            notes.append("counts depend on the image; tokens and GMACs are the most that an image can need")
        if any(not reducer.card.training_free for reducer in reducers):
            notes.append("learned parts are untrained")
        return "; ".join(notes) or None

    # ---- parts

    def _text_models(self) -> list[clip_models.ClipModel]:
        # Texts are encoded once where their encoder is the same in both models.
        same = self.model is self.reference or self.spec.tower == "visual"
        return [self.reference] if same else [self.reference, self.model]

    def _texts(self, found: clip_models.ClipModel) -> Callable[[Sequence[str]], Tensor]:
        encode: Any = self.runtime.runnable(found.encode_tokens)  # pyright: ignore[reportArgumentType]

        def encode_texts(texts: Sequence[str]) -> Tensor:
            return encode({name: ids.to(self.runtime.device) for name, ids in found.tokens(texts).items()})

        return encode_texts

    @torch.inference_mode()
    def _embed_texts(self, found: clip_models.ClipModel, texts: Sequence[str]) -> Tensor:
        encode = self._texts(found)
        parts = [zeroshot.unit(encode(texts[start : start + _TEXTS])) for start in range(0, len(texts), _TEXTS)]
        return torch.cat(parts).cpu()

    def _retried(self, run: Callable[[int], Any]) -> Any:
        return timing.with_batch_decay(run, self.spec.batch_size, self.spec.retry)[0]

    def _macs(self, found: clip_models.ClipModel, kind: str) -> float:
        ghost = found.around(flops.meta_copy(found.model))
        if kind == "visual":
            images = flops.meta_input(ghost.model, found.input_size)
            return flops.profile(ghost.encode_images, images).total / 1e9  # pyright: ignore[reportArgumentType]
        tokens = {name: ids.to("meta") for name, ids in found.tokens(["a"]).items()}
        return flops.profile(ghost.encode_tokens, (tokens,)).total / 1e9  # pyright: ignore[reportArgumentType]

    def _classes(self) -> tuple[Any, list[str], list[zeroshot.Template]]:
        spec = self.spec
        if spec.data == SCENES:
            from visiontok.bench import scenes
            from visiontok.models.tiny_clip import normalize

            if spec.class_names is not None:
                raise ParameterError("--class-names goes with the class folders of --data-dir")
            found = scenes.fixed_scenes(spec.split)
            dataset = data.ArrayDataset(normalize(found.images), found.labels[:, 0], spec.max_images)
            own = [zeroshot.from_text(text) for text in scenes.TEMPLATES]
            templates = own if spec.templates is None else zeroshot.load_templates(spec.templates)
            return dataset, list(scenes.DIGITS), templates
        folder = data.split_folder(spec.data, spec.split)
        dataset = data.FolderDataset(folder, self.reference.transform, None, spec.max_images)
        names = zeroshot.class_names(dataset.classes, spec.class_names)
        return dataset, names, zeroshot.load_templates(spec.templates or "openai")

    def _pairs(self) -> tuple[Any, list[tuple[str, ...]]]:
        spec = self.spec
        if spec.data == SCENES:
            from visiontok.bench import scenes
            from visiontok.models.tiny_clip import normalize

            found = scenes.fixed_scenes(spec.split)
            kept = data.evenly(len(found), spec.max_images)
            captions = found.captions()
            images = normalize(found.images[kept])
            return data.ArrayDataset(images, torch.arange(len(kept))), [captions[number] for number in kept]
        listed = pairs.read_pairs(spec.data, spec.csv_img_key, spec.csv_caption_key)
        dataset = pairs.PairDataset(listed, self.reference.transform, spec.max_images)
        return dataset, [pair.captions for pair in dataset.pairs]


def accuracy_row(result: accuracy.Predictions, reference: accuracy.Predictions) -> dict[str, Any]:
    """The columns of accuracy: top-1 and top-5 with intervals, and the comparison with the reference."""
    top1, paired = accuracy.top_k(result), accuracy.compare(result, reference)
    top5 = accuracy.top_k(result, 5) if result.ranked.shape[1] == 5 else None
    return {
        "top1": top1.value,
        "top1_low": top1.low,
        "top1_high": top1.high,
        "top5": top5 and top5.value,
        "top5_low": top5 and top5.low,
        "top5_high": top5 and top5.high,
        "n_images": top1.n,
        "n_failed": len(result.failures),
        "failed_images": [failure._asdict() for failure in result.failures],
        "delta": paired.delta,
        "mcnemar_p": paired.p_value,
        "agreement": paired.agreement,
    }
