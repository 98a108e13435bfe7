"""What the patched blocks of all encoder families share: the order of events, and taking q, k, v out of attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visiontok.core.runtime import Stage
from visiontok.core.signals import Offers, attention_offers
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError
from visiontok.ops.constants import wide_dtype

__all__ = ["Ran", "Tap", "bias_dtype", "offers_ahead", "run_block", "sized_mean"]

Ran = tuple[Tensor, TokenState, Offers]


class Tap:
    """Takes q, k, v out of an attention module: a plain object, so that hooks may replace inputs and output freely."""

    q: Tensor
    k: Tensor
    v: Tensor

    def offers(self, scale: float, bias: Tensor | None, prefix: int) -> Offers:
        """The signals of the attention that ran; see `attention_offers`."""
        return attention_offers(lambda: (self.q, self.k, self.v), scale, bias, prefix)


def offers_ahead(
    project: Callable[[], tuple[Tensor, Tensor, Tensor]], scale: float, bias: Tensor | None, prefix: int
) -> Offers:
    """The signals of an attention that has not run, at the price of its projection when one is read.

    Args:
        project: Returns q, k, v (B, H, N, d) after normalisation and positions.
        scale: Factor on the logits.
        bias: What the attention will add to them.
        prefix: Leading tokens.
    """
    made: list[tuple[Tensor, Tensor, Tensor]] = []

    def read() -> tuple[Tensor, Tensor, Tensor]:
        if not made:
            made.append(project())
        return made[0]

    return attention_offers(read, scale, bias, prefix)


def bias_dtype(x: Tensor, fused: bool = True, *, attends: bool = False) -> torch.dtype:
    """The dtype in which an attention over x takes a bias over keys.

    Args:
        x: Its input.
        fused: Whether it is the fused kernel.
        attends: Whether that is `ops.attending.attend`, which finds the dtype itself.
    """
    if attends and fused:
        return wide_dtype(x.dtype)
    # Only the CPU's fused kernel takes an fp32 bias with half-precision queries.
    exact = x.device.type == "cpu" and fused and not torch.is_autocast_enabled("cpu")
    return wide_dtype(x.dtype) if exact else x.dtype


def sized_mean(x: Tensor, size: Tensor) -> Tensor:
    """(B, C) mean over tokens x (B, N, C), each counted as often as its size (B, N, 1) says; in the dtype of x."""
    return ((x * size).sum(dim=1) / size.sum(dim=1)).to(x.dtype)


def run_block(
    stage: Stage,
    x: Tensor,
    untouched: Callable[[Tensor, TokenState], Tensor],
    ahead: Callable[[Tensor, TokenState], Offers],
    run: Callable[[Tensor, TokenState], Ran],
    given: str | None = None,
) -> Tensor:
    """One pass through a patched block.

    Args:
        stage: What acts in it.
        x: (B, N, C) its input.
        untouched: The host's own forward, where nothing happens here and attention needs no bias.
        ahead: Signals of the block's attention before it has run.
        run: The block with its reduction point: output, state after the point, signals.
        given: Name of an argument of the call that speaks of the original tokens (a mask), or None.

    Raises:
        StateLostError: As `Stage.enter`.
        IncompatibleError: `given`, where tokens were or are about to be merged or dropped.
    """
    state = stage.enter(x)
    if stage.opens:
        x, state = stage.before(x, state, ahead(x, state))
    if stage.idle(state) and not (given and state.trail):
        return stage.leave(untouched(x, state), state, {})
    if given:
        raise IncompatibleError(
            f"block {stage.layer}: {given} was given but tokens are merged or dropped here, so its rows and "
            "columns no longer name the same tokens; call without it, or patch with no reduction up to this block."
        )
    y, after, offered = run(x, state)
    # Signals of a block name the tokens that it saw.
    return stage.leave(y, after, offered if after is state else {})
