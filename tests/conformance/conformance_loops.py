"""Values and sizes of a map's slots, one token at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def slots_alive(tm: Any) -> Tensor:
    return torch.ones(1, tm.K, 1) if tm.live is None else tm.live.unsqueeze(-1).float()


def naive_values(tm: Any, x: Tensor, size: Tensor | None) -> Tensor:
    """(B, K, C) slot values, one token at a time."""
    batch, length, channels = x.shape
    if tm.soft is not None:
        source = x if tm.values is None else tm.values
        return sum(tm.soft[:, :, n : n + 1] * source[:, n : n + 1] for n in range(length))
    out = []
    for b in range(batch):
        for k in range(tm.K):
            members = [n for n in range(length) if int(tm.assign[b, n]) == k]
            if not members:
                out.append(x.new_zeros(channels))
                continue
            share = [_share(tm, size, b, n) for n in members]
            rows = [x[b, n] for n in members]
            total = sum((w * row for w, row in zip(share, rows)), x.new_zeros(channels))
            if tm.mode == "sum":
                out.append(total)
            elif tm.mode == "amax":
                out.append(torch.stack(rows).amax(dim=0))
            elif tm.mode == "absmax":
                stacked = torch.stack(rows)
                out.append(stacked.gather(0, stacked.abs().argmax(dim=0, keepdim=True)).squeeze(0))
            else:
                mean = total / sum(share)
                if tm.mode == "mlerp" and len(rows) > 1:
                    mean = mean / mean.norm() * torch.stack([row.norm() for row in rows]).max()
                out.append(mean)
    return torch.stack(out).view(batch, tm.K, channels)


def _share(tm: Any, size: Tensor | None, b: int, n: int) -> float:
    if tm.weight is not None:
        return float(tm.weight[b, n])
    return 1.0 if size is None else float(size[b, n, 0])


def naive_sizes(tm: Any, size: Tensor | None) -> Tensor:
    """(B, K, 1) slot sizes, one token at a time."""
    batch, length = tm.assign.shape
    out = torch.zeros(batch, tm.K, 1, dtype=torch.float64)
    for b in range(batch):
        for n in range(length):
            mass = float(tm.mass[b, n]) if tm.mass is not None else 1.0 if size is None else float(size[b, n, 0])
            if int(tm.assign[b, n]) >= 0:
                out[b, int(tm.assign[b, n])] += mass
    return out if tm.soft is None or tm.mass is not None else torch.ones_like(out)
