"""Attention over merged tokens by loops, written from the formula: what the backbones with tables are held against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def lively(model: Any) -> Any:
    """The model in fp64 with no parameter at a constant, where many mistakes would not show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.dim() < 3 else 1.0)
    return model.eval().double()


def image(size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def unfused(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def run(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def caught(model: Any, module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a module got and gave in a forward of the model."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0].clone(), out.clone())))
    run(model, x)
    handle.remove()
    return seen[0]


def pair_bias(table: Tensor, step: Any, rule: str, b: int) -> Tensor:
    """(H, K, K) of sample b, from the (H, N0, N0) table of the original tokens, after one map."""
    origin = step.origin[b].tolist()
    groups = [[i for i, slot in enumerate(origin) if slot == k] for k in range(step.tokens)]
    if rule == "gather":
        groups = [[int(i)] for i in step.map.kept[b]]
    out = torch.zeros(table.shape[0], step.tokens, step.tokens, dtype=table.dtype)
    for k, left in enumerate(groups):
        for m, right in enumerate(groups):
            for i in left:
                for j in right:
                    out[:, k, m] += table[:, i, j] / (len(left) * len(right))
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, size: Tensor | None) -> Tensor:
    """(H, N, d) of one sample: q, k, v (H, N, d), bias (H, N, N), size (N,) tokens that each key stands for."""
    heads, length, _ = q.shape
    out = torch.zeros_like(v)
    for h in range(heads):
        for i in range(length):
            logits = [float(scale * (q[h, i] @ k[h, j]) + bias[h, i, j]) for j in range(length)]
            if size is not None:
                logits = [a + math.log(float(size[j])) for j, a in enumerate(logits)]
            weight = [math.exp(a - max(logits)) for a in logits]
            for j in range(length):
                out[h, i] += weight[j] / sum(weight) * v[h, j]
    return out
