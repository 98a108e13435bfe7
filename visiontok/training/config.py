"""What a training run is: one frozen set of plain values, made from flags, from a recipe or by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visiontok.core.recipe import Recipe
from visiontok.errors import ParameterError, UnknownNameError, did_you_mean

__all__ = ["DISTILL", "TrainConfig"]

DISTILL = ("none", "logits", "frd")
# What may differ between a run and its continuation: where it runs, not what it computes.
_FREE = ("device", "workers", "threads", "output", "checkpoint_every", "log_every", "max_failed")
_POSITIVE = ("batch_size", "grad_accum_steps", "epochs", "lr", "distill_tau", "rtsm_lr_scale", "log_every")
_NOT_NEGATIVE = (
    "weight_decay", "warmup_epochs", "cooldown_epochs", "min_lr", "warmup_lr", "mixup", "cutmix", "distill_logits",
    "distill_tokens", "workers", "seed", "max_failed",
)  # fmt: skip
_SHARES = {"shuffle": 1.0, "attentive_mask": 1.0, "smoothing": 1.0, "drop_path": 1.0, "model_ema_decay": 1.0}


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Names and meanings are timm's where timm has them.

    Attributes:
        model, pretrained, checkpoint, input_size: As in `visiontok eval`; the student starts from these weights, and so
            does the teacher. Learned parts of the reducer that the checkpoint holds are loaded too.
        reducer, params: Reducer in place while training, with its parameters; None trains the plain model.
        data, split, val_split, class_map, max_images: `digits`, or a folder of class folders.
        epochs, batch_size, grad_accum_steps: One update takes `batch_size * grad_accum_steps` images.
        lr, opt, weight_decay, momentum: For timm's `create_optimizer_v2`.
        sched, warmup_epochs, warmup_lr, min_lr, cooldown_epochs: For timm's `create_scheduler_v2`, stepped per update.
        clip_grad: Largest norm of the gradient; None does not clip.
        smoothing, mixup, cutmix, drop_path, augment: Regularisation; mixup and cutmix are off at 0.
        model_ema, model_ema_decay: timm's `ModelEmaV3`; evaluation reports both models.
        amp, amp_dtype, device, threads, workers: Where and in which precision it runs.
        seed: Of everything random; batches, augmentation and dropout are functions of it and the step.
        distill: `none`, `logits` (from the unreduced teacher), or `frd` (SiT's feature recalibration).
        distill_logits, distill_tokens, distill_tau: Weights of the loss's parts and the temperature.
        teacher: Weights of the teacher, default: those that the student starts from.
        rtsm_lr_scale: Learning rate of FRD's own modules over that of the model.
        shuffle: Largest probability of stochastic layer-wise shuffle (that of the last block); 0 is off.
        attentive_mask: Share of patch cells that attentive masking keeps; 0 is off. Needs `model_ema`.
        max_failed: Unreadable images to accept.
        checkpoint_every: Updates between checkpoints; None writes one per epoch.
        log_every: Updates between log lines.
        output: Folder of log, checkpoint and weights; None writes nothing.
    """

    model: str = "tiny_vit"
    pretrained: bool = False
    checkpoint: str | None = None
    input_size: tuple[int, int, int] | None = None
    reducer: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: str = "digits"
    split: str = "train"
    val_split: str = "validation"
    class_map: str | None = None
    max_images: int | None = None
    epochs: int = 10
    batch_size: int = 32
    grad_accum_steps: int = 1
    lr: float = 5e-4
    opt: str = "adamw"
    weight_decay: float = 0.05
    momentum: float = 0.9
    sched: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    cooldown_epochs: int = 0
    clip_grad: float | None = None
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0
    augment: bool = True
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    amp: bool = False
    amp_dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int | None = None
    workers: int = 0
    seed: int = 42
    distill: str = "none"
    distill_logits: float = 2.0
    distill_tokens: float = 2.0
    distill_tau: float = 1.0
    teacher: str | None = None
    rtsm_lr_scale: float = 5.0
    shuffle: float = 0.0
    attentive_mask: float = 0.0
    max_failed: int = 0
    checkpoint_every: int | None = None
    log_every: int = 50
    output: str | None = None

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ParameterError: A value is out of range, or two do not go together.
        """
        for names, least, words in ((_POSITIVE, 0, "above 0"), (_NOT_NEGATIVE, None, "at least 0")):
            for name in names:
                value = getattr(self, name)
                fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                if not fine or value < 0 or (least is not None and value == least):
                    raise ParameterError(f"{name} must be a number {words}, got {value!r}.")
        for name, top in _SHARES.items():
            if not 0 <= getattr(self, name) <= top:
                raise ParameterError(f"{name} must be in [0, {top:g}], got {getattr(self, name)!r}.")
        if self.drop_path == 1 or self.smoothing == 1 or self.model_ema_decay == 1:
            raise ParameterError("drop_path, smoothing and model_ema_decay must be below 1.")
        for name in ("clip_grad", "checkpoint_every", "max_images"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ParameterError(f"{name} must be above 0 or None, got {value!r}.")
        for name, accepted in (("distill", DISTILL), ("amp_dtype", ("bfloat16", "float16"))):
            if getattr(self, name) not in accepted:
                raise ParameterError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}.")
        self._check_together()

    def _check_together(self) -> None:
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ParameterError(f"warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}.")
        if self.distill == "frd" and self.reducer is None:
            raise ParameterError("distill='frd' recalibrates the tokens of a reduced student; give a reducer.")
        if self.attentive_mask and not self.model_ema:
            raise ParameterError("attentive_mask takes its attention from the EMA model; switch on model_ema.")
        if self.attentive_mask and self.distill == "frd":
            raise ParameterError("attentive_mask and distill='frd' cannot be used together: the tokens to compare are "
                                 "not those of the teacher.")  # fmt: skip
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ParameterError(f"mixup and cutmix need an even batch_size, got {self.batch_size}.")
        if self.params and self.reducer is None:
            raise ParameterError("params belong to a reducer; give a reducer.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A config from plain values.

        Raises:
            UnknownNameError: A name is no field.
            ParameterError: A value is out of range.
        """
        known = [spec.name for spec in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UnknownNameError(f"training has no setting {name!r}.{did_you_mean(str(name), known)}")
        given = dict(values)
        if given.get("input_size") is not None:
            given["input_size"] = tuple(given["input_size"])
        return cls(**given)

    @classmethod
    def from_recipe(cls, recipe: Recipe, **values: Any) -> TrainConfig:
        """A recipe's `train` section with its model and reducer; `values` win.

        Raises:
            ParameterError: The recipe has no `train` section, or a value is out of range.
        """
        if recipe.train is None:
            raise ParameterError("this recipe has no 'train' section; it holds no training settings.")
        base = {"model": recipe.model, "reducer": recipe.method, "params": recipe.params, **recipe.train}
        return cls.from_dict({**base, **values})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; layer numbers become text."""
        return {spec.name: _plain(getattr(self, spec.name)) for spec in dataclasses.fields(self)}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields in which a stored run would compute something else than this one, in words."""
        mine = self.to_dict()
        names = [name for name in mine if name not in _FREE and other.get(name) != mine[name]]
        return [f"{name}={mine[name]!r} (was {other.get(name)!r})" for name in names]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
