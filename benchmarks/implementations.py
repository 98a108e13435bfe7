"""visiontok's implementations behind one set of signatures, called past the dispatcher so that each can be timed."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.ops import attending, cpu, dispatch, matching, merging, probing

# What registers the ops whose implementations are looked up by name.
_REGISTERED = (attending, matching, merging, probing)

Norm = tuple[Tensor, Tensor, float]


class Plan(NamedTuple):
    """Where tokens go; csr and src group them by slot, if an implementation makes that along the way."""

    assign: Tensor
    csr: Tensor | None = None
    src: Tensor | None = None


class Merged(NamedTuple):
    """Tokens of the slots, and their LayerNorm if asked for."""

    out: Tensor
    normed: Tensor | None = None


class Implementation:
    """What can be timed: any of `match`, `merge`, `best_match`, `restore`, `attention`, `votes`, `class_row`."""

    name: str


class Torch(Implementation):
    """The plain torch references."""

    name = "torch"

    def __init__(self) -> None:
        names = ("match_slots", "best_match", "spread", "key_votes", "class_rows")
        self._match, self._best, self._spread, self._votes, self._rows = (run_of(name, "torch") for name in names)
        self._attend = run_of("attend", "mask")

    def match(self, key: Tensor, r: int, prefix: int) -> Plan:
        return Plan(*self._match(key, r, prefix))

    def merge(
        self, x: Tensor, plan: Plan, count: int, size: Tensor, y: Tensor | None = None, norm: Norm | None = None
    ) -> Merged:
        x = x if y is None else x + y
        out = merging.merge_mean(x, size.unsqueeze(-1), plan.assign, count)[0]
        return Merged(out, None if norm is None else F.layer_norm(out, out.shape[-1:], *norm))

    def best_match(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self._best(matching.unit(x), a, b)

    def restore(self, y: Tensor, assign: Tensor, residual: Tensor) -> Tensor:
        return self._spread(y, assign, residual, None)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        return self._attend(q, k, v, bias[:, None, None], scale, 0.0)

    def votes(self, q: Tensor, k: Tensor, lse: Tensor, bias: Tensor, scale: float) -> Tensor:
        return self._votes(q, k, scale, bias[:, None, None], torch.ones_like(lse))

    def class_row(self, q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
        return self._rows(q, k, 1, scale, bias[:, None, None])


class Cpp(Implementation):
    """The C++ op for CPUs."""

    name = "cpp"

    def match(self, key: Tensor, r: int, prefix: int) -> Plan:
        return Plan(*cpu.match_slots(key, r, prefix))

    def merge(
        self, x: Tensor, plan: Plan, count: int, size: Tensor, y: Tensor | None = None, norm: Norm | None = None
    ) -> Merged:
        out, _, _, normed = cpu.merge(x, plan.csr, plan.src, y=y, size=size, norm=norm)
        return Merged(out, normed)


class Fold(Implementation):
    """Attention on GPUs with the bias in two extra channels, so that a flash kernel runs."""

    name = "fold"

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        return run_of("attend", "fold")(q, k, v, bias[:, None, None], scale, 0.0)


class Fused(Implementation):
    """The Triton kernels."""

    name = "triton"

    def __init__(self) -> None:
        names = ("matching", "merging", "attention")
        self._matching, self._merging, self._attention = (
            importlib.import_module(f"visiontok.ops.triton.{name}") for name in names
        )

    def match(self, key: Tensor, r: int, prefix: int) -> Plan:
        return Plan(*self._matching.match_slots(key, r, prefix))

    def merge(
        self, x: Tensor, plan: Plan, count: int, size: Tensor, y: Tensor | None = None, norm: Norm | None = None
    ) -> Merged:
        merged = self._merging.merge(x, plan.csr, plan.src, y=y, size=size, norm=norm)
        return Merged(merged.out, merged.normed)

    def best_match(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self._matching.best_match(x, a, b)

    def restore(self, y: Tensor, assign: Tensor, residual: Tensor) -> Tensor:
        return self._merging.spread(y, assign, residual)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        return self._attention.attention(q, k, v, bias, scale)[0]

    def votes(self, q: Tensor, k: Tensor, lse: Tensor, bias: Tensor, scale: float) -> Tensor:
        return self._attention.key_votes(q, k, lse, bias, scale)

    def class_row(self, q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
        return self._attention.class_rows(q, k, bias, scale, 1)


def run_of(op: str, name: str) -> Any:
    """The function of one implementation of an op of the dispatcher, whose module has to be imported."""
    return next(found.run for found in dispatch.op(op).implementations if found.name == name)


def available(device: str) -> list[Implementation]:
    """What runs on a device, the reference first."""
    found: list[Implementation] = [Torch()]
    if device == "cpu" and cpu.refuses(torch.empty(0)) is None:
        found.append(Cpp())
    if device != "cpu" and dispatch.triton_refuses(torch.empty(0, device=device)) is None:
        found += [Fused(), Fold()]
    return found
