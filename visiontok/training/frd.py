"""Feature recalibration distillation, SiT's training objective (Zong et al., ECCV 2022, arXiv:2111.12624, section 3.3).

A full-length teacher (the dense model, usually with the student's own initial weights) guides every block of a student
with fewer tokens: a training-only module writes each block's tokens back to full length, where they are compared with
the teacher's. `LayerTokens` records the tokens of both models, `FeatureRecalibration` turns them into losses:

    red = visiontok.patch(student, "sit", stage_blocks=(1, 1, 1, 11))
    frd = FeatureRecalibration.for_plan(red.plan, width=student.embed_dim)
    with LayerTokens(student) as mine, LayerTokens(teacher) as theirs:
        logits = student(images)
        with torch.no_grad():
            teacher_logits = teacher(images)
        losses = frd(mine.tokens, theirs.tokens, logits, teacher_logits, targets)
    losses["loss"].backward()

The parameters of `FeatureRecalibration` train with the student's (five times its learning rate in the paper's recipe)
and are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.core.plan import Plan
from visiontok.errors import ParameterError
from visiontok.models.lvvit_parts import Mlp
from visiontok.ops.constants import wide_dtype

__all__ = ["FeatureRecalibration", "LayerTokens", "ReverseTSM", "cls_loss", "logits_loss", "token_loss"]


class ReverseTSM(nn.Module):
    """Writes K tokens back to N: an MLP over the token axis without a residual, then one over channels with one.

    Args:
        dim: C, channels of a token.
        kept: K, tokens that come in.
        full: N, tokens that come out.
        ratio: Hidden widths over N and over C.
    """

    def __init__(self, dim: int, kept: int, full: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp1 = Mlp(kept, int(full * ratio), full)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp2 = Mlp(dim, int(dim * ratio), dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) tokens from (B, K, C)."""
        y = self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return y + self.mlp2(self.norm2(y))


def token_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over blocks of the mean squared error between tokens of equal shape (B, N, C). The teacher gets no gradient.

    Raises:
        ParameterError: The numbers of blocks or the shapes differ.
    """
    if len(student) != len(teacher) or not student:
        raise ParameterError(f"student and teacher must have the same blocks, got {len(student)} and {len(teacher)}.")
    for block, (mine, theirs) in enumerate(zip(student, teacher)):
        if mine.shape != theirs.shape:
            raise ParameterError(
                f"block {block}: the student's tokens are {tuple(mine.shape)}, the teacher's {tuple(theirs.shape)}."
            )
    pairs = zip(student, teacher)
    return torch.stack([F.mse_loss(_wide(mine), _wide(theirs.detach())) for mine, theirs in pairs]).mean()


def logits_loss(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(teacher || student) of logits (B, classes) at temperature tau, averaged over the batch."""
    mine = F.log_softmax(_wide(student) / tau, dim=-1)
    theirs = F.log_softmax(_wide(teacher.detach()) / tau, dim=-1)
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * tau**2


def cls_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with class indices (B,) or with soft labels (B, classes), as mixup makes them."""
    logits = _wide(logits)
    return F.cross_entropy(logits, targets if targets.dim() == 1 else targets.to(logits.dtype))


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


class FeatureRecalibration(nn.Module):
    """The modules and losses of feature recalibration distillation.

    Parameter names are the authors': `rtsm.{block}.norm1.weight` and so on. Blocks before the first reduction have no
    module, their tokens are compared as they are.

    Args:
        tokens: Non-prefix tokens that each block of the student returns, one entry per block.
        full: Non-prefix tokens of the teacher.
        width: C, channels of a token; one number or one per block.
        lambda_token: Weight of the token loss.
        lambda_logits: Weight of the distillation of the logits.
        tau: Temperature of the logits.

    Raises:
        ParameterError: A value outside its range.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        full: int,
        width: int | Sequence[int],
        *,
        lambda_token: float = 2.0,
        lambda_logits: float = 2.0,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        if not tokens or min(tokens) < 1 or full < 1:
            raise ParameterError(f"tokens and full must be token counts >= 1, got {list(tokens)!r} and {full!r}.")
        widths = [width] * len(tokens) if isinstance(width, int) else list(width)
        if len(widths) != len(tokens):
            raise ParameterError(f"width must have one entry per block ({len(tokens)}), got {len(widths)}.")
        if tau <= 0:
            raise ParameterError(f"tau must be above 0, got {tau!r}.")
        self.tokens, self.full = tuple(tokens), full
        self.lambda_token, self.lambda_logits, self.tau = lambda_token, lambda_logits, tau
        first = next((block for block, kept in enumerate(tokens) if kept != full), len(tokens))
        self.rtsm = nn.ModuleList(
            ReverseTSM(dim, kept, full) if block >= first else nn.Identity()
            for block, (kept, dim) in enumerate(zip(tokens, widths))
        )

    @classmethod
    def for_plan(cls, plan: Plan, width: int | Sequence[int], **options: Any) -> FeatureRecalibration:
        """The modules for a patched student, `Reduction.plan`.

        Args:
            plan: What was patched; its token counts must not depend on the data.
            width: See the class.
            **options: `lambda_token`, `lambda_logits`, `tau`.
        """
        return cls([n - plan.prefix for n in plan.tokens], plan.length - plan.prefix, width, **options)

    def recalibrated(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """The student's tokens of every block (B, K, C) at full length (B, N, C).

        Raises:
            ParameterError: The blocks or token counts are not those that the modules were made for.
        """
        counts = tuple(x.shape[1] for x in tokens)
        if counts != self.tokens:
            raise ParameterError(
                f"the student's blocks return {list(counts)} tokens, these modules are made for {list(self.tokens)} "
                "(without the prefix); patch, input size and modules must belong together."
            )
        return [module(x) for module, x in zip(self.rtsm, tokens)]

    def forward(
        self,
        student_tokens: Sequence[Tensor],
        teacher_tokens: Sequence[Tensor],
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            student_tokens: Per block the student's non-prefix tokens (B, K, C), after a reduction that follows it.
            teacher_tokens: Per block the teacher's (B, N, C).
            student_logits: (B, classes).
            teacher_logits: (B, classes).
            targets: Class indices (B,) or soft labels (B, classes); None leaves the classification to the caller.

        Returns:
            `loss_token` and `loss_logits` with their weights, `loss_cls` if there are targets, and `loss`, their sum.
        """
        full = self.recalibrated(student_tokens)
        losses = {
            "loss_token": self.lambda_token * token_loss(full, teacher_tokens),
            "loss_logits": self.lambda_logits * logits_loss(student_logits, teacher_logits, self.tau),
        }
        if targets is not None:
            losses["loss_cls"] = cls_loss(student_logits, targets)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


class LayerTokens:
    """Records what each block of a model returns, without the prefix tokens, while entered.

    `tokens` holds one (B, K, C) tensor per block of the last forward, until entered again. Works on
    patched and plain models of any family whose blocks return one tensor.

    Args:
        model: The model or a module that contains it.
    """

    def __init__(self, model: nn.Module) -> None:
        from visiontok.finding import resolve_target

        target, backbone = resolve_target(model)
        self._blocks = [block.module for block in backbone.blocks(target)]
        self._prefix = backbone.prefix(target)
        self._hooks: list[Any] = []
        self._taken: dict[int, Tensor] = {}

    @property
    def tokens(self) -> list[Tensor]:
        """Per block (B, K, C); empty before the first forward."""
        return [self._taken[block] for block in sorted(self._taken)]

    def __enter__(self) -> LayerTokens:
        self._taken = {}
        for index, block in enumerate(self._blocks):
            self._hooks.append(block.register_forward_hook(_Taker(self, index)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self, index: int, output: Tensor) -> None:
        """Notes the output (B, N, C) of a block."""
        self._taken[index] = output[:, self._prefix :]


class _Taker:
    """The hook of one block; a class of its own, so that a model with hooks still pickles."""

    def __init__(self, owner: LayerTokens, index: int) -> None:
        self.owner = owner
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.owner.take(self.index, output)
