"""Ground truth of merges: loops over slots in float64, and how near a kernel must come."""

from __future__ import annotations

import torch
from torch import Tensor


def reduced(tokens: Tensor, assign: Tensor, slots: int, mode: str, weight: Tensor | None = None) -> Tensor:
    """Values of the slots by loops, in float64."""
    tokens = tokens.double().cpu()
    weight = torch.ones(assign.shape, dtype=torch.float64) if weight is None else weight.double().cpu()
    out = tokens.new_zeros(tokens.shape[0], slots, tokens.shape[2])
    for image, slot in ((b, k) for b in range(len(out)) for k in range(slots)):
        members = (assign[image].cpu() == slot).nonzero().flatten().tolist()
        if members:
            out[image, slot] = one_slot(tokens[image, members], weight[image, members].unsqueeze(1), mode)
    return out


def one_slot(tokens: Tensor, weight: Tensor, mode: str) -> Tensor:
    if mode == "amax":
        return tokens.amax(dim=0)
    if mode == "absmax":
        high, low = tokens.amax(dim=0), tokens.amin(dim=0)
        return torch.where(-low > high, low, high)
    total = (weight * tokens).sum(dim=0)
    if mode == "sum":
        return total
    mean = total / weight.sum() if weight.sum() > 0 else torch.zeros_like(total)
    if mode == "mean" or len(tokens) == 1:
        return mean
    return mean / mean.norm().clamp_min(1e-300) * tokens.norm(dim=1).max()


def assert_near(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    """Two units in the last place of the dtype, and a fraction of the largest value that fp32 sums may lose."""
    want = want.double().cpu()
    got, allowed = got.double().cpu(), 2 * torch.finfo(got.dtype).eps * want.abs()
    allowed += tolerance * max(want.abs().max().item() if want.numel() else 0.0, 1.0)
    assert got.shape == want.shape
    assert bool(got.isfinite().all())
    worst = ((got - want).abs() - allowed).max().item() if got.numel() else 0.0
    assert worst <= 0, f"off by {worst:.3g} more than allowed"
