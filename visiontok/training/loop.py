"""The training loop: timm's optimizers, schedules and EMA around a model with a reduction in place.

Everything random is a function of the seed and the update, so a run that was killed and resumed ends, on one CPU, with
the same weights bit for bit as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from visiontok.bench import accuracy
from visiontok.bench import data as images
from visiontok.bench.progress import bar
from visiontok.bench.results import TrialSpec
from visiontok.bench.runtime import Runtime, threads
from visiontok.core.reduction import Reduction
from visiontok.errors import FormatError, MissingDependencyError, ParameterError
from visiontok.training import checkpoint
from visiontok.training.checkpoint import TrainingError
from visiontok.training.config import TrainConfig
from visiontok.training.data import TrainData, load_data, preserved_rng, seed_all
from visiontok.training.distill import Objective
from visiontok.training.masking import attentive_masking, layer_shuffle
from visiontok.training.setup import (
    handle,
    make_ema,
    make_mixup,
    make_optimizer,
    make_schedule,
    students,
    unpatched,
)

__all__ = ["TrainResult", "TrainingError", "fit"]

# Streams of the seed: building the model, and the updates.
_BUILD, _UPDATE = 1, 2


@dataclass
class TrainResult:
    """A finished run.

    Attributes:
        model: The trained model in eval mode, patched if a reducer was given.
        reduction: Handle of its reduction, or None.
        ema: Its moving average, patched likewise, or None.
        metrics: Of the last epoch: `loss` and its parts, `top1` and `top1_ema` in percent where there is held-out data.
        records: All log records.
        output: Folder that was written, or None.
    """

    model: nn.Module
    reduction: Reduction | None
    ema: nn.Module | None
    metrics: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    output: Path | None = None


def fit(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    data: tuple[Dataset[Any], Dataset[Any] | None] | None = None,
    resume: bool | str | Path = False,
    on_update: Callable[[int], object] | None = None,
    quiet: bool = True,
) -> TrainResult:
    """Trains what a config describes.

    Args:
        config: The run. With `config.output` it leaves `log.jsonl`, `checkpoint.pt`, `model.safetensors` (for
            `--checkpoint`) and, with a reducer, `reduction/` (for `visiontok.from_pretrained`) there.
        model: An unpatched model to train in place of `config.model`; it is patched in place and stays so.
        data: Training and validation datasets of `(image, target)` in place of `config.data`.
        resume: True continues from `config.output`'s checkpoint if there is one, a path from that file.
        on_update: Called with the number of updates done, after each one.
        quiet: No progress bar.

    Returns:
        Model, metrics and records. The global random state is as it was before.

    Raises:
        ParameterError: The config cannot be run, or does not fit the checkpoint.
        TrainingError: The loss is not finite any more, too many images are unreadable, or files cannot be written.
        FormatError: The checkpoint cannot be read.
    """
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("training needs timm: pip install 'visiontok[timm]'") from error
    runtime = Runtime(
        TrialSpec(config.model, device=config.device, amp=config.amp, amp_dtype=config.amp_dtype, seed=config.seed)
    )
    stored = _stored(config, resume)
    with threads(config.threads), preserved_rng(runtime.device):
        seed_all(config.seed, _BUILD)
        run = _Run(config, runtime, model, data, stored)
        return run.train(on_update, quiet)


class _Run:
    def __init__(
        self, config: TrainConfig, runtime: Runtime, model: nn.Module | None, data: Any, stored: dict[str, Any] | None
    ) -> None:
        self.config, self.runtime = config, runtime
        self.model, self.teacher, self.reduction = students(config, runtime, model)
        self.objective = Objective(config, self.model, self.teacher, self.reduction)
        if self.objective.extra is not None:
            self.objective.extra.to(runtime.device)
        self.data, self.validation = self._data(data)
        self.per_epoch = self.data.batches // config.grad_accum_steps
        if not self.per_epoch:
            images_needed = config.batch_size * config.grad_accum_steps
            raise ParameterError(f"{self.data.size} training image(s) are less than one update of {images_needed}.")
        self.optimizer = make_optimizer(config, self.model, self.objective.extra)
        self.schedule, self.epochs = make_schedule(config, self.optimizer, self.per_epoch)
        self.ema = make_ema(config, self.model)
        scaled = config.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=scaled)  # pyright: ignore
        self.mixup = make_mixup(config, self.model)
        self.failed: set[str] = set()
        self.epoch = self.update = self.updates = 0
        self.loss_sum: dict[str, float] = {}
        if stored is not None:
            self._restore(stored)
        self.output = None if config.output is None else Path(config.output)
        if self.output is not None:
            _prepare(self.output)
        self.log = checkpoint.Log(None if self.output is None else self.output / checkpoint.LOG, self.updates)

    def _data(self, given: Any) -> tuple[TrainData, Dataset[Any] | None]:
        config = self.config
        if given is None:
            return load_data(config, self.model)
        return TrainData(given[0], config.batch_size, config.seed, workers=config.workers), given[1]

    # ---- the loop

    def train(self, on_update: Callable[[int], object] | None, quiet: bool) -> TrainResult:
        config = self.config
        if self.updates == 0:
            self.log.write(kind="start", updates=0, config=config.to_dict(), epochs=self.epochs, images=self.data.size)
        with ExitStack() as stack:
            if config.shuffle:
                stack.enter_context(layer_shuffle(self.model, config.shuffle))
            if config.attentive_mask and self.ema is not None:
                stack.enter_context(attentive_masking(self.model, unpatched(self.ema.module), config.attentive_mask))
            stack.enter_context(self.objective.collecting())
            progress = stack.enter_context(bar(self.epochs * self.per_epoch, "train", quiet))
            progress.update(self.updates)
            while self.epoch < self.epochs:
                self._train_epoch(on_update, progress)
        self.model.eval()
        self._finish()
        # From the log, so that a finished run that is resumed has them too.
        last = next((r for r in reversed(self.log.records) if r["kind"] == "epoch"), {})
        metrics = {name: value for name, value in last.items() if name.startswith(("loss", "top1"))}
        ema = None if self.ema is None else self.ema.module
        return TrainResult(self.model, self.reduction, ema, metrics, self.log.records, self.output)

    def _train_epoch(self, on_update: Callable[[int], object] | None, progress: Any) -> None:
        config, start = self.config, time.perf_counter()
        self.model.train()
        if self.objective.extra is not None:
            self.objective.extra.train()
        batches = self.data.epoch(self.epoch, self.update * config.grad_accum_steps)
        first = self.update
        while self.update < self.per_epoch:
            parts = self._step(batches)
            for name, value in parts.items():
                self.loss_sum[name] = self.loss_sum.get(name, 0.0) + value
            progress.update()
            progress.set_postfix(loss=f"{parts['loss']:.3f}", refresh=False)
            if self.updates % config.log_every == 0:
                self.log.write(kind="train", updates=self.updates, epoch=self.epoch, lr=self._lr(), **parts)
            if on_update is not None:
                on_update(self.updates)
            every = config.checkpoint_every
            if every is not None and self.updates % every == 0 and self.update < self.per_epoch:
                self._save()
        seconds = time.perf_counter() - start
        seen = (self.update - first) * config.batch_size * config.grad_accum_steps
        losses = {name: value / self.per_epoch for name, value in self.loss_sum.items()}
        self.log.write(
            kind="epoch", updates=self.updates, epoch=self.epoch, lr=self._lr(), **losses, **self._evaluate(),
            seconds=seconds, images_per_s=seen / seconds, failed=len(self.failed),
        )  # fmt: skip
        self.epoch, self.update, self.loss_sum = self.epoch + 1, 0, {}
        self._save()

    def _step(self, batches: Iterator[images.Batch]) -> dict[str, float]:
        config, steps = self.config, self.config.grad_accum_steps
        if self.schedule is not None:
            self.schedule.step_update(self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for micro in range(steps):
            batch = next(batches)
            self._note(batch.failures)
            if not len(batch.targets):
                continue
            seed_all(config.seed, _UPDATE, self.updates, micro)
            x, targets = self._prepared(batch)
            with torch.autocast(self.runtime.device.type, dtype=self.runtime.autocast, enabled=config.amp):
                losses = self.objective(x, targets)
            self.scaler.scale(losses["loss"] / steps).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, value.new_zeros(())) + value.detach() / steps
        values = {name: float(value) for name, value in sums.items()} or {"loss": 0.0}
        if not math.isfinite(values["loss"]):
            raise TrainingError(self._diverged(values))
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        if config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self._parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update, self.updates = self.update + 1, self.updates + 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)
        return values

    def _prepared(self, batch: images.Batch) -> tuple[Tensor, Tensor]:
        x, targets = batch.images, batch.targets
        if self.data.augment is not None:
            x = self.data.augment(x)
        x, targets = self.runtime.move(x), targets.to(self.runtime.device)
        if self.mixup is not None and len(x) > 1:
            # timm mixes an image with its mirror in the batch; unreadable ones may have made the batch odd.
            even = len(x) // 2 * 2
            x, targets = self.mixup(x[:even], targets[:even])
        return x, targets

    def _note(self, failures: tuple[images.Failure, ...]) -> None:
        self.failed |= {failure.path for failure in failures}
        if len(self.failed) > self.config.max_failed:
            last = failures[-1]
            raise TrainingError(
                f"{len(self.failed)} unreadable image(s), max_failed is {self.config.max_failed}; the last is "
                f"{last.path}: {last.reason}. Repair or remove them, or accept them with --max-failed"
            )

    def _diverged(self, values: dict[str, float]) -> str:
        parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
        remedies = ["a lower --lr", "more --warmup-epochs", "--clip-grad 1"] + ["no --amp"] * self.config.amp
        return (
            f"the loss is not finite at epoch {self.epoch}, update {self.updates} (lr {self._lr():g}; {parts}); try "
            f"{', '.join(remedies)}. The last checkpoint is from before"
        )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        scores: dict[str, float] = {}
        candidates = [("top1", self.model)] + ([] if self.ema is None else [("top1_ema", self.ema.module)])
        for name, model in candidates:
            model.eval()
            batches = images.batches(self.validation, self.config.batch_size, self.config.workers)
            predictions = accuracy.predict(self.runtime.runnable(model), batches, self.runtime.move)
            scores[name] = accuracy.top_k(predictions).value
        return scores

    # ---- state

    def _lr(self) -> float:
        return max(float(group["lr"]) / float(group.get("lr_scale", 1.0)) for group in self.optimizer.param_groups)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _save(self) -> None:
        if self.output is None:
            return
        extra = self.objective.extra
        values = {
            "config": json.dumps(self.config.to_dict()),
            "epoch": self.epoch,
            "update": self.update,
            "updates": self.updates,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": self.scaler.state_dict(),
            "extra": None if extra is None else extra.state_dict(),
            "loss_sum": self.loss_sum,
        }
        checkpoint.save(self.output / checkpoint.CHECKPOINT, values)

    def _restore(self, stored: dict[str, Any]) -> None:
        extra = self.objective.extra
        try:
            self.model.load_state_dict(stored["model"])
            self.optimizer.load_state_dict(stored["optimizer"])
            self.scaler.load_state_dict(stored["scaler"])
            if self.ema is not None:
                self.ema.module.load_state_dict(stored["ema"])
            if extra is not None:
                extra.load_state_dict(stored["extra"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"the checkpoint does not fit this run: {str(error).splitlines()[0]}") from error
        self.epoch, self.update, self.updates = stored["epoch"], stored["update"], stored["updates"]
        self.loss_sum = dict(stored["loss_sum"])

    def _finish(self) -> None:
        if self.output is None:
            return
        finished = [("", self.model)] + ([] if self.ema is None else [("_ema", self.ema.module)])
        for suffix, model in finished:
            checkpoint.save_weights(model, self.output / f"model{suffix}.safetensors")
            reduction = handle(model)
            if reduction is not None:
                reduction.save_pretrained(self.output / f"reduction{suffix}")


def _stored(config: TrainConfig, resume: bool | str | Path) -> dict[str, Any] | None:
    own = None if config.output is None else Path(config.output) / checkpoint.CHECKPOINT
    if resume is False:
        if own is not None and own.exists():
            raise ParameterError(f"{own.parent} holds a run already; continue it with --resume or choose another one.")
        return None
    if resume is True and own is None:
        raise ParameterError("resume continues a run in its output folder; give --output.")
    path = own if resume is True else Path(resume)
    if path is None or (resume is True and not path.exists()):
        return None
    stored = checkpoint.load(path)
    changed = config.differences(json.loads(stored["config"]))
    if changed:
        raise ParameterError(f"'{path}' is of another run: {', '.join(changed)}. Resume with its own settings.")
    return stored


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"cannot write in '{folder}': {error.strerror or error}; choose another --output"
        ) from error
