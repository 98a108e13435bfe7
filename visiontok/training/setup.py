"""Builds what a run needs: student and teacher, optimizer, schedule, EMA, mixup."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import visiontok as vt
from visiontok.bench import models
from visiontok.bench.runtime import Runtime
from visiontok.core.patching import ATTRIBUTE
from visiontok.core.reduction import Reduction
from visiontok.errors import ParameterError
from visiontok.finding import resolve_target
from visiontok.training.config import TrainConfig

__all__ = ["handle", "make_ema", "make_mixup", "make_optimizer", "make_schedule", "students", "unpatched"]


def students(
    config: TrainConfig, runtime: Runtime, model: nn.Module | None
) -> tuple[nn.Module, nn.Module | None, Reduction | None]:
    """Student, frozen unreduced teacher (None without distillation) and the student's reduction, on the device.

    Args:
        config: The run.
        runtime: Where it runs.
        model: An unpatched model to use in place of `config.model`.
    """
    if model is None:
        model = models.load(
            config.model, pretrained=config.pretrained, checkpoint=config.checkpoint, input_size=config.input_size,
            seed=config.seed,
        )  # fmt: skip
    teacher = None
    if config.distill != "none":
        # A copy of the weights too: one that shared them would follow the student.
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        if config.teacher is not None:
            models.load_checkpoint(teacher, config.teacher)
        runtime.place(teacher)
    if config.drop_path:
        _set_drop_path(model, config.drop_path)
    runtime.place(model)
    reduction = None
    if config.reducer is not None:
        reduction = vt.patch(model, config.reducer, **config.params)
        if config.checkpoint is not None:
            models.load_learned(reduction, config.checkpoint)
    return model, teacher, reduction


def _set_drop_path(model: nn.Module, rate: float) -> None:
    from timm.layers.drop import DropPath

    target, backbone = resolve_target(model)
    blocks = backbone.blocks(target)
    for index, block in enumerate(blocks):
        chance = rate * index / max(len(blocks) - 1, 1)
        names = [name for name, _ in block.module.named_children() if name.startswith("drop_path")]
        if not names:
            raise ParameterError(f"drop_path: {block.path} of {type(target).__name__} has no drop path to set.")
        for name in names:
            setattr(block.module, name, DropPath(chance) if chance else nn.Identity())


def make_optimizer(config: TrainConfig, model: nn.Module, extra: nn.Module | None) -> torch.optim.Optimizer:
    """timm's optimizer over the model and, at `rtsm_lr_scale` times the rate, the extra modules.

    Raises:
        ParameterError: timm does not know the optimizer.
    """
    from timm.optim import create_optimizer_v2, param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage]

    skip: Any = getattr(model, "no_weight_decay", set)()
    groups: list[dict[str, Any]] = list(
        param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=skip)
    )
    if extra is not None:
        more = param_groups_weight_decay(extra, config.weight_decay)
        groups += [{**group, "lr_scale": config.rtsm_lr_scale} for group in more]
    try:
        optimizer = create_optimizer_v2(groups, config.opt, config.lr, config.weight_decay, config.momentum)
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise ParameterError(f"timm cannot build the optimizer '{config.opt}': {error}") from error
    return optimizer


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, per_epoch: int) -> tuple[Any, int]:
    """timm's schedule per update (None for `none`), and the number of epochs with the cool-down.

    Raises:
        ParameterError: timm does not know the schedule.
    """
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    try:
        schedule, epochs = create_scheduler_v2(
            optimizer, config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr, min_lr=config.min_lr, cooldown_epochs=config.cooldown_epochs,
            step_on_epochs=False, updates_per_epoch=per_epoch,
        )  # fmt: skip
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise ParameterError(f"timm cannot build the schedule '{config.sched}': {error}") from error
    if schedule is None:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group.get("lr_scale", 1.0)
    return schedule, epochs


def make_ema(config: TrainConfig, model: nn.Module) -> Any:
    """timm's moving average of the model, or None."""
    if not config.model_ema:
        return None
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(model, decay=config.model_ema_decay)


def make_mixup(config: TrainConfig, model: nn.Module) -> Any:
    """timm's mixup and cutmix, or None."""
    if not (config.mixup or config.cutmix):
        return None
    from timm.data.mixup import Mixup

    classes = int(getattr(model, "num_classes", 0))
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes)


def handle(model: nn.Module) -> Reduction | None:
    """The reduction in place on a model, or None."""
    return next((vars(m)[ATTRIBUTE] for m in model.modules() if isinstance(vars(m).get(ATTRIBUTE), Reduction)), None)


def unpatched(model: nn.Module) -> nn.Module:
    """An unreduced view of a model: new modules around the same tensors, so it follows an average made in place."""
    other = vt.detached(model)
    return other if handle(other) is None else vt.unpatch(other)
