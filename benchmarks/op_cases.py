"""One op at one shape: its inputs, everybody who can run it here, and how their results are compared.

Contestants are visiontok's implementations (`torch`, `cpp`, `triton`, `fold`), the `official` formulation, the oracle
`slice`, which reduces for free, and for the merge inside a block the `unpatched` residual and LayerNorm it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import official
import torch
import torch.nn.functional as F
from implementations import Implementation, Plan, available
from shapes import Shape
from torch import Tensor

Run = Callable[[Any], Any]
# Sets of inputs that calls take in turn, so that none finds its own in a cache.
COPIES = 3
# Largest difference of an entry that counts as agreement, relative to the reference's largest one.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Contestants whose results are not meant to equal the reference.
DIFFERENT = ("slice", "unpatched")


class Inputs(NamedTuple):
    """Tensors of one set.

    Attributes:
        x: (B, N, C) tokens.
        y: (B, N, C) what a block adds to them.
        q: (B, H, N, d) as a projection leaves it, not contiguous.
        k: Likewise.
        v: Likewise.
        size: (B, N) fp32 token sizes.
        bias: (B, N) fp32 log sizes.
        norm: Weight, bias and eps of the LayerNorm that follows.
    """

    x: Tensor
    y: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    size: Tensor
    bias: Tensor
    norm: tuple[Tensor, Tensor, float]


class Case(NamedTuple):
    """An op at a shape.

    Attributes:
        runs: Contestants by name, the reference first; each takes one of `inputs`.
        inputs: What they take in turn.
        comparable: Brings a contestant's result to (rows, entries), the same for all that agree.
    """

    runs: dict[str, Run]
    inputs: list[Any]
    comparable: Callable[[str, Any, Any], Tensor]


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Random inputs, sizes from 1 to 4."""
    torch.manual_seed(seed)
    n, c = shape.tokens, shape.channels
    x, y = (torch.randn(batch, n, c, device=device).to(dtype) for _ in range(2))
    q, k, v = torch.randn(batch, n, 3, shape.heads, shape.width, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    size = torch.randint(1, 5, (batch, n), device=device).float()
    norm = (torch.rand(c, device=device).to(dtype), torch.randn(c, device=device).to(dtype), 1e-6)
    return Inputs(x, y, q, k, v, size, size.log(), norm)


def build(op: str, shape: Shape, batch: int, dtype: torch.dtype, device: str) -> Case:
    """The case of an op of `OPS`."""
    inputs = [make_inputs(shape, batch, dtype, device, seed) for seed in range(COPIES)]
    return OPS[op](shape, inputs, available(device))


def _ours(implementations: list[Implementation], name: str, run: Callable[[Implementation], Run]) -> dict[str, Run]:
    return {impl.name: run(impl) for impl in implementations if hasattr(impl, name)}


def _rows(_: str, __: Any, out: Tensor) -> Tensor:
    return out.flatten(0, -2)


def _leaders(assign: Tensor) -> Tensor:
    # The first token of every token's slot: alike for equal groups, whatever the order of the slots.
    length = assign.shape[1]
    place = torch.arange(length, device=assign.device).expand_as(assign)
    first = torch.full_like(assign, length).scatter_reduce(1, assign, place, "amin")
    return first.gather(1, assign).flatten().unsqueeze(-1).float()


def _match(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> Case:
    r, prefix = shape.r, shape.prefix
    runs = _ours(ours, "match", lambda impl: lambda i: impl.match(i.k, r, prefix))
    runs["official"] = lambda i: official.match(i.k.mean(1), r)

    def comparable(name: str, i: Inputs, out: Any) -> Tensor:
        return _leaders(official.slots(out, shape.tokens) if name == "official" else out.assign)

    return Case(runs, inputs, comparable)


class _Planned(NamedTuple):
    given: Inputs
    plans: dict[str, Plan]
    pairs: official.Pairs


def _planned(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> list[_Planned]:
    # Everybody merges the same pairs, found in fp32.
    planned = []
    for given in inputs:
        key = given.k.float()
        plans = {impl.name: impl.match(key, shape.r, shape.prefix) for impl in ours if hasattr(impl, "merge")}
        planned.append(_Planned(given, plans, official.match(key.mean(1), shape.r)))
    return planned


def _merge(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> Case:
    k = shape.kept
    runs = _ours(ours, "merge", lambda impl: lambda p: impl.merge(p.given.x, p.plans[impl.name], k, p.given.size).out)
    runs["official"] = lambda p: official.merge(p.given.x, p.given.size.unsqueeze(-1).to(p.given.x.dtype), p.pairs)[0]
    runs["slice"] = lambda p: p.given.x[:, :k].clone()
    return Case(runs, _planned(shape, inputs, ours), _rows)


def _merge_add_norm(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> Case:
    k = shape.kept

    def reduced(impl: Implementation) -> Run:
        def run(p: _Planned) -> Tensor:
            merged = impl.merge(p.given.x, p.plans[impl.name], k, p.given.size, p.given.y, p.given.norm)
            return merged.normed

        return run

    def normed(x: Tensor, given: Inputs) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *given.norm)

    def released(p: _Planned) -> Tensor:
        size = p.given.size.unsqueeze(-1).to(p.given.x.dtype)
        return normed(official.merge(p.given.x + p.given.y, size, p.pairs)[0], p.given)

    runs = _ours(ours, "merge", reduced)
    runs["official"] = released
    runs["slice"] = lambda p: normed((p.given.x + p.given.y)[:, :k], p.given)
    runs["unpatched"] = lambda p: normed(p.given.x + p.given.y, p.given)
    return Case(runs, _planned(shape, inputs, ours), _rows)


def _match_merge(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> Case:
    k, r, prefix = shape.kept, shape.r, shape.prefix

    def whole(impl: Implementation) -> Run:
        def run(i: Inputs) -> tuple[Tensor, Tensor]:
            plan = impl.match(i.k, r, prefix)
            return plan.assign, impl.merge(i.x, plan, k, i.size).out

        return run

    def released(i: Inputs) -> tuple[official.Pairs, Tensor]:
        pairs = official.match(i.k.mean(1), r)
        return pairs, official.merge(i.x, i.size.unsqueeze(-1).to(i.x.dtype), pairs)[0]

    def comparable(name: str, i: Inputs, out: Any) -> Tensor:
        plan, merged = out
        assign = official.slots(plan, shape.tokens) if name == "official" else plan
        return merged.gather(1, assign.unsqueeze(-1).expand(-1, -1, merged.shape[-1])).flatten(0, 1)

    runs = _ours(ours, "merge", whole)
    runs["official"] = released
    runs["slice"] = lambda i: i.x[:, :k].clone()
    return Case(runs, inputs, comparable)


def partition(grid: tuple[int, int], device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random 2-D partition: one destination in every 2 x 2 cell; positions that may leave, and destinations."""
    generator = torch.Generator().manual_seed(seed)
    height, width = grid
    chosen = torch.randint(4, (height // 2, width // 2, 1), generator=generator)
    cells = torch.zeros(height // 2, width // 2, 4).scatter_(2, chosen, 1).view(height // 2, width // 2, 2, 2)
    is_target = cells.permute(0, 2, 1, 3).reshape(-1).bool()
    return (~is_target).nonzero().flatten().to(device), is_target.nonzero().flatten().to(device)


def _best_match(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> Case:
    a, b = partition(shape.grid or (2, 2), str(inputs[0].x.device))

    def released(i: Inputs) -> tuple[Tensor, Tensor]:
        rows = i.x / i.x.norm(dim=-1, keepdim=True)
        batch, _, channels = rows.shape
        source = rows.gather(1, a.view(1, -1, 1).expand(batch, -1, channels))
        target = rows.gather(1, b.view(1, -1, 1).expand(batch, -1, channels))
        return (source @ target.transpose(-1, -2)).max(dim=-1)

    runs = _ours(ours, "best_match", lambda impl: lambda i: impl.best_match(i.x, a, b))
    runs["official"] = released
    return Case(runs, inputs, lambda _, __, out: out[0].flatten().unsqueeze(-1).float())


class _Merged(NamedTuple):
    y: Tensor
    residual: Tensor
    assign: Tensor
    grid: official.Grid


def _restore(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> Case:
    a, b = partition(shape.grid or (2, 2), str(inputs[0].x.device))
    merged = []
    for given in inputs:
        # Which tokens merged does not matter here, so the scores are drawn rather than computed.
        grid = official.match_grid(torch.randn_like(given.x[..., :8]), a, b, shape.r)
        merged.append(_Merged(given.y[:, : shape.kept].contiguous(), given.x, official.slots_grid(grid), grid))
    runs = _ours(ours, "restore", lambda impl: lambda m: impl.restore(m.y, m.assign, m.residual))
    runs["official"] = lambda m: official.restore_grid(m.y, m.grid) + m.residual
    return Case(runs, merged, _rows)


def _attention(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> Case:
    scale = shape.width**-0.5
    runs = _ours(ours, "attention", lambda impl: lambda i: impl.attention(i.q, i.k, i.v, i.bias, scale))
    runs["official"] = lambda i: official.attention(i.q, i.k, i.v, i.size.unsqueeze(-1).to(i.q.dtype), scale)
    # Free would be attention that knows no sizes.
    runs["slice"] = lambda i: F.scaled_dot_product_attention(i.q, i.k, i.v, scale=scale)
    return Case(runs, inputs, _rows)


def _with_lse(inputs: list[Inputs], scale: float) -> list[tuple[Inputs, Tensor]]:
    # The attention before has it; a kernel that needs it is not charged for it.
    logits = ((i.q.float() @ i.k.float().transpose(-2, -1)) * scale + i.bias[:, None, None] for i in inputs)
    return [(i, rows.logsumexp(dim=-1)) for i, rows in zip(inputs, logits)]


def _votes(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> Case:
    scale = shape.width**-0.5

    def released(given: tuple[Inputs, Tensor]) -> Tensor:
        i = given[0]
        return official.probabilities(i.q, i.k, i.size.unsqueeze(-1).to(i.q.dtype), scale).sum(dim=2)

    runs = _ours(ours, "votes", lambda impl: lambda g: impl.votes(g[0].q, g[0].k, g[1], g[0].bias, scale))
    runs["official"] = released
    return Case(runs, _with_lse(inputs, scale), _rows)


def _class_row(shape: Shape, inputs: list[Inputs], ours: list[Implementation]) -> Case:
    scale = shape.width**-0.5

    def released(i: Inputs) -> Tensor:
        return official.probabilities(i.q, i.k, i.size.unsqueeze(-1).to(i.q.dtype), scale)[:, :, :1]

    runs = _ours(ours, "class_row", lambda impl: lambda i: impl.class_row(i.q, i.k, i.bias, scale))
    runs["official"] = released
    return Case(runs, inputs, _rows)


OPS: dict[str, Callable[[Shape, list[Inputs], list[Implementation]], Case]] = {
    "match": _match,
    "merge": _merge,
    "match_merge": _match_merge,
    "merge_add_norm": _merge_add_norm,
    "best_match": _best_match,
    "restore": _restore,
    "attention": _attention,
    "votes": _votes,
    "class_row": _class_row,
}
# Ops of diffusion models, which have a grid and no class token; all others are of encoders.
ON_GRIDS = ("best_match", "restore")


def fits(op: str, shape: Shape) -> bool:
    """Whether an op belongs to a shape."""
    return (op in ON_GRIDS) == (shape.grid is not None)


def apart(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Share of rows by which each contestant differs from the reference, the first of `runs`."""
    shares: dict[str, float] = {}
    given = case.inputs[0]
    names = [name for name in case.runs if name not in DIFFERENT]
    expected = case.comparable(names[0], given, case.runs[names[0]](given)).double()
    for name in names:
        found = case.comparable(name, given, case.runs[name](given)).double()
        if found.shape != expected.shape:
            shares[name] = 1.0
            continue
        gap = (found - expected).abs().amax(dim=-1)
        # Written so that NaN counts as a difference.
        near = gap <= TOLERANCE[dtype] * expected.abs().max()
        shares[name] = 1 - near.double().mean().item()
    return shares
