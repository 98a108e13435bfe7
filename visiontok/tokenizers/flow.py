"""Sampling a rectified flow: time grids, solvers, and guidance (CFG, APG, intervals).

Times run from 1 (noise) to 0 (image); the network predicts v = noise - image, so a step of length dt is x - dt * v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontok.errors import ParameterError

__all__ = ["SOLVERS", "Guidance", "Weight", "apg", "cfg", "sample", "time_grid"]

SOLVERS = ("euler", "heun")
Weight = float | Callable[[float], float]
Velocity = Callable[[Tensor, float, bool], Tensor]
"""`velocity(x, t, conditional)`."""

_MOMENTUM, _THRESHOLD = -0.5, 2.5


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """`steps + 1` falling times from 1 to 0.

    Args:
        steps: At least 1.
        shift: Above 1 more steps lie near the noise: s t / (1 + (s - 1) t), arXiv:2403.03206. 1 is an even grid.

    Raises:
        ParameterError: Too few steps, or a shift that is not positive.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ParameterError(f"steps must be a whole number of at least 1, got {steps!r}.")
    if not shift > 0:
        raise ParameterError(f"shift must be positive, got {shift!r}.")
    even = [i / steps for i in range(steps, -1, -1)]
    return even if shift == 1 else [shift * t / (1 + (shift - 1) * t) for t in even]


def cfg(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance, arXiv:2207.12598: u + w (v - u)."""
    return unconditional + weight * (conditional - unconditional)


def apg(
    conditional: Tensor, unconditional: Tensor, weight: float, buffer: Tensor | None = None, *,
    momentum: float = _MOMENTUM, eta: float = 0.0, threshold: float | None = _THRESHOLD,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Adaptive projected guidance, arXiv:2410.02416.

    Args:
        conditional: v, `(B, C, h, w)`; norms are per row.
        unconditional: u, likewise.
        weight: w.
        buffer: The running difference of the step before, or None at the first.
        momentum: Its share in this step's difference.
        eta: What remains of the part along v.
        threshold: Longest difference, L2 over a row; None for no limit.

    Returns:
        Guided velocity, and the buffer for the next step.
    """
    difference = conditional - unconditional
    if buffer is not None and momentum:
        difference = difference + momentum * buffer
    buffer = difference
    if threshold is not None:
        length = difference.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        difference = difference * (threshold / length).clamp(max=1.0)
    # In double: the part along v is small beside the rest.
    along = torch.nn.functional.normalize(conditional.double().flatten(1), dim=1).view_as(conditional)
    parallel = (difference.double() * along).sum((1, 2, 3), keepdim=True) * along
    kept = difference.double() - parallel + eta * parallel
    return conditional + (weight - 1) * kept.to(conditional.dtype), buffer


@dataclass
class Guidance:
    """How two velocities become one, over the steps of one sample.

    Attributes:
        weight: A number, or a function of t; 1 is no guidance.
        projected: APG; otherwise CFG.
        interval: Times between which guidance acts (arXiv:2404.07724).
    """

    weight: Weight = 7.5
    projected: bool = True
    interval: tuple[float, float] = (0.0, 1.0)
    buffer: Tensor | None = None

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ParameterError(f"interval must be two rising times in [0, 1], got {self.interval!r}.")

    def at(self, t: float) -> float:
        """The weight at a time."""
        if not self.interval[0] <= t <= self.interval[1]:
            return 1.0
        return float(self.weight(t)) if callable(self.weight) else float(self.weight)

    def velocity(self, network: Velocity, x: Tensor, t: float) -> Tensor:
        """The guided velocity; the unconditional pass runs only where it counts."""
        conditional = network(x, t, True)
        weight = self.at(t)
        if weight == 1.0:
            return conditional
        unconditional = network(x, t, False)
        if not self.projected:
            return cfg(conditional, unconditional, weight)
        guided, self.buffer = apg(conditional, unconditional, weight, self.buffer)
        return guided


def sample(
    network: Velocity, noise: Tensor, times: list[float], guidance: Guidance, solver: str = "euler",
    preview: Callable[[int, Tensor], object] | None = None,
) -> Tensor:  # fmt: skip
    """Follows the flow from noise to an image.

    Args:
        network: Velocity at x and t, conditional or not.
        noise: `(B, C, h, w)` at t = 1.
        times: Falling, see `time_grid`.
        guidance: Of this sample.
        solver: "euler", or "heun" with two velocities per step (one in the last).
        preview: Called with the number of the step and the image x - t v expected at its start.

    Raises:
        ParameterError: Another solver.
    """
    if solver not in SOLVERS:
        raise ParameterError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    x = noise
    for step, (t, after) in enumerate(zip(times, times[1:])):
        v = guidance.velocity(network, x, t)
        if preview is not None:
            preview(step, x - t * v)
        if solver == "heun" and after > 0:
            v = (v + guidance.velocity(network, x - (t - after) * v, after)) / 2
        x = x - (t - after) * v
    return x
