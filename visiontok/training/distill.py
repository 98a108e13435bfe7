"""The loss of a training run: of the labels alone, with a teacher's logits, or with feature recalibration (FRD)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.core.reduction import Reduction
from visiontok.errors import ParameterError
from visiontok.training.config import TrainConfig
from visiontok.training.frd import FeatureRecalibration, LayerTokens, cls_loss, logits_loss

__all__ = ["Objective"]


class Objective:
    """What a run minimises.

    Args:
        config: The run.
        model: The student, patched or not.
        teacher: The unreduced model, frozen and in eval mode; None without distillation.
        reduction: The student's reduction.

    Attributes:
        extra: FRD's own modules, or None. Trained beside the student, never saved with it.

    Raises:
        ParameterError: FRD was asked for a reducer whose token counts depend on the image.
    """

    def __init__(
        self, config: TrainConfig, model: nn.Module, teacher: nn.Module | None, reduction: Reduction | None
    ) -> None:
        self._config, self._model, self._teacher = config, model, teacher
        self.extra: FeatureRecalibration | None = None
        self._tokens: tuple[LayerTokens, LayerTokens] | None = None
        if config.distill != "frd" or reduction is None or teacher is None:
            return
        ragged = [part.name for reducer in reduction.reducers for part in reducer.parts() if part.ragged]
        if ragged:
            raise ParameterError(f"distill='frd' needs a fixed number of tokens per block; that of {ragged[0]} is not.")
        self.extra = FeatureRecalibration.for_plan(
            reduction.plan, reduction.backbone.width(reduction.model), lambda_token=config.distill_tokens,
            lambda_logits=config.distill_logits, tau=config.distill_tau,
        )  # fmt: skip
        self._tokens = LayerTokens(model), LayerTokens(teacher)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keeps the tokens of every block of student and teacher while open, if the loss needs them."""
        with ExitStack() as stack:
            for tokens in self._tokens or ():
                stack.enter_context(tokens)
            yield

    def __call__(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss of a batch, `loss`, and its parts.

        Args:
            images: (B, C, H, W).
            targets: (B,) classes or (B, classes) soft labels.
        """
        config = self._config
        logits = self._model(images)
        parts = {"loss_cls": _classification(logits, targets, config.smoothing)}
        if self._teacher is not None:
            with torch.no_grad():
                theirs = self._teacher(images)
            if self.extra is not None and self._tokens is not None:
                mine, full = self._tokens
                more = self.extra(mine.tokens, full.tokens, logits, theirs)
                parts |= {name: value for name, value in more.items() if name != "loss"}
            else:
                parts["loss_logits"] = config.distill_logits * logits_loss(logits, theirs, config.distill_tau)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def _classification(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    if targets.dim() == 2 or not smoothing:
        return cls_loss(logits, targets)
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
