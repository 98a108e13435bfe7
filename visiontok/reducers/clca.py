"""CLCA: cross-layer cache and cross-layer aggregation head around any other reducer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontok.core.reducer import Build, Card, Reducer, Where
from visiontok.core.runtime import free_of_attention
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops.constants import length_of
from visiontok.reducers.evit import EViT

__all__ = ["CLCA", "AggregationHead", "Carrier", "split_official"]

_CLS, _POOL = "clca.cls", "clca.pool"


class Carrier(nn.Module):
    """Learned tokens (CLR) that carry what blocks saw past a reduction.

    Args:
        count: Number of tokens.
        width: C.
        class_token: (1, 1, C) what they start from; zeros if None.
    """

    def __init__(self, count: int, width: int, class_token: Tensor | None = None) -> None:
        super().__init__()
        start = torch.zeros(1, 1, width) if class_token is None else class_token.detach().float()
        self.clr = nn.Parameter(start.expand(1, count, width).clone())
        self.pos = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, width), std=0.02))

    def forward(self) -> Tensor:
        """(1, count, C)."""
        return self.clr + self.pos


class AggregationHead(nn.Sequential):
    """Cross-layer aggregation (CLA) head: logits from the class tokens of several layers.

    Args:
        width: C.
        layers: L, class tokens per sample.
        classes: Outputs.
        groups: Channels per input channel of the depth-wise convolution; 0 for the linear head.
    """

    def __init__(self, width: int, layers: int, classes: int, groups: int = 2) -> None:
        wide = width * groups
        convolution: list[nn.Module] = [
            nn.BatchNorm1d(width), nn.Conv1d(width, wide, layers, groups=width) if groups else nn.Identity(),
            nn.BatchNorm1d(wide) if groups else nn.Identity(), nn.GELU(),
            nn.Conv1d(wide, classes, 1) if groups else nn.Identity(), nn.Flatten(1),
        ]  # fmt: skip
        linear = [nn.Linear(layers, 1), nn.Flatten(1), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, classes)]
        super().__init__(nn.Sequential(*(convolution if groups else linear)))


@dataclass(frozen=True)
class CLCA(Reducer):
    """Cross-Layer Cache Aggregation (arXiv:2501.00243) around another reducer.

    After every block up to the last recovery the mean token and the carrier tokens are cached; after the blocks in
    `reduction_loc`, and after the last but one, the cache joins the sequence again. The head reads the class tokens of
    those blocks and of the last one instead of the final norm.

    Args:
        inner: The reducer that is wrapped; default EViT. `r` and `keep` given here are its budget.
        reduction_loc: Blocks after which the cache returns. Default: those in or before which `inner` acts.
        clc: Whether there is a cache.
        clc_include_gap: Whether the mean token is cached.
        clc_recover_at_last: Whether the cache also returns after the last but one block.
        clc_pool_cls, clc_pool_clr: Whether the mean includes the class token; the carriers (`compat="official"`).
        num_clr: Carrier tokens.
        ifa_head: Whether the head aggregates over layers.
        ifa_dws_conv_groups: Width factor of its depth-wise convolution; 0 for the linear head.
        aside: With `compat="official"`: whether returned tokens are kept from `inner` (officially for DPC-KNN only).
        compat: `"official"` appends returned tokens unprotected at the end, where `inner` may prune or fuse them; by
            default they stand behind the class token and are as safe as it.
    """

    name = "clca"
    card = Card(
        title="CLCA, cross-layer cache aggregation",
        summary="Caches what blocks saw, gives it back after reductions, and classifies from several layers.",
        paper="Rios et al., Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image Recognition, "
        "ICASSP 2025",
        url="https://arxiv.org/abs/2501.00243",
        year=2025,
        license="Apache-2.0",
        training_free=False,
        cons=(
            "A plug-in for fine-tuning: with untrained carriers and head a pretrained model's accuracy is lost.",
            "Adds up to (1 + num_clr) tokens per cached block.",
            "Needs a class token.",
        ),
        official="does not protect cached and carrier tokens from the reducer (only DPC-KNN sets them aside).",
    )
    site = Site.PRE
    trainable = True
    class_token = True

    inner: Reducer | None = None
    reduction_loc: Any = None
    clc: bool = True
    clc_include_gap: bool = True
    clc_recover_at_last: bool = True
    clc_pool_cls: bool = False
    clc_pool_clr: bool = False
    num_clr: int = 1
    ifa_head: bool = True
    ifa_dws_conv_groups: int = 2
    aside: bool = False

    def __post_init__(self) -> None:
        if self.inner is not None and not isinstance(self.inner, Reducer):
            raise ParameterError(f"clca: inner must be a Reducer (or its name with `patch`), got {self.inner!r}.")
        if isinstance(self.inner, CLCA):
            raise ParameterError("clca: inner cannot be clca itself.")
        blocks = self.reduction_loc
        listed = isinstance(blocks, (list, tuple)) and all(
            type(block) is int and 0 <= block < 65_536 for block in blocks
        )
        if blocks is not None and not listed:
            raise ParameterError(f"clca: reduction_loc must be a list of blocks (ints >= 0), got {blocks!r}.")
        for name in ("num_clr", "ifa_dws_conv_groups"):
            if getattr(self, name) < 0:
                raise ParameterError(f"clca: {name} must be at least 0, got {getattr(self, name)!r}.")
        super().__post_init__()
        inner = EViT() if self.inner is None else self.inner
        budget = {name: getattr(self, name) for name in self.budget_names if getattr(self, name) is not None}
        # Made here because torch.compile cannot make one while it traces.
        object.__setattr__(self, "_wrapped", inner.replaced(**budget) if budget else inner)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.wrapped.needs

    def limit(self, n: int) -> int:
        return self.wrapped.limit(n)

    @property
    def wrapped(self) -> Reducer:
        """The inner reducer with the budget given here."""
        return vars(self)["_wrapped"]

    def parts(self) -> tuple[Reducer, ...]:
        inner = self.wrapped
        cache, around = _Cache(owner=self), _Aside(owner=self, inner=inner) if self.aside else inner
        # What clusters before a block finds the cache returned already; what reads a block's scores comes before that.
        first = inner.site is not Site.MID and free_of_attention(inner)
        middle = (cache, around) if first else (around, cache)
        carriers = (_Carriers(owner=self),) if self.clc and self.num_clr else ()
        return (*carriers, *middle, *((_Head(owner=self),) if self.ifa_head else ()))

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        return self.wrapped.decide(signals, state, budget)

    # ---- the schedule

    def reductions(self, depth: int) -> list[int]:
        """Blocks whose class token the head reads, but for the last."""
        if self.reduction_loc is not None:
            return sorted(set(self.reduction_loc))
        inner = self.wrapped
        acting = inner.layers(depth)
        if inner.gflops is None and inner.tokens is None:
            acting = [layer for layer, budget in inner.budgets(depth).items() if inner.always or not budget.idle]
        return sorted(set(acting))

    def recoveries(self, depth: int) -> list[int]:
        """Blocks after which the cache returns."""
        last = [depth - 2] if self.clc_recover_at_last and depth > 1 else []
        return sorted({*self.reductions(depth), *last}) if self.clc else []

    def returning(self, block: int, depth: int) -> int:
        """Tokens that return after a block."""
        recoveries = self.recoveries(depth)
        cached = returned = 0
        for earlier in range(block + 1):
            returned = cached if earlier in recoveries else 0
            cached -= returned
            cached += (int(self.clc_include_gap) + self.num_clr) * bool(recoveries and earlier < recoveries[-1])
        return returned


@dataclass(frozen=True)
class _Part(Reducer):
    owner: CLCA = CLCA()

    name = "clca"
    site = Site.PRE
    always = True

    @property
    def protecting(self) -> bool:
        return self.owner.compat != "official"

    def span(self, depth: int) -> range:
        return range(depth + 1)

    def joined(self, state: TokenState, extra: Tensor, **fields: Any) -> TokenMap:
        """The map that takes tokens in: behind the prefix and protected, or officially at the end."""
        batch, count = state.batch, length_of(extra)
        if count == 0:
            return TokenMap.identity(torch.empty(batch, state.n, device=state.device), **fields)
        index = torch.arange(state.n + count, device=state.device)
        start = state.prefix if self.protecting else state.n
        order = torch.cat((index[:start], index[state.n :], index[start : state.n]))
        place = torch.empty_like(order).scatter(0, order, index)
        return TokenMap(
            place.expand(batch, -1), state.n + count, anchor=order.expand(batch, -1), form="select",
            extra=extra.expand(batch, -1, -1), protect=start + count if self.protecting else None,
            grid=state.grid if self.protecting else None, **fields,
        )  # fmt: skip


@dataclass(frozen=True)
class _Carriers(_Part):
    name = "clca"

    def layers(self, depth: int) -> Sequence[int]:
        return (0,)

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        return -self.owner.num_clr

    def protects(self, where: Where) -> int:
        return self.owner.num_clr if self.protecting else 0

    def modules(self, build: Build) -> nn.Module:
        return Carrier(self.owner.num_clr, build.width, build.class_token)

    def official(self, stage: int) -> str:
        return "clca."

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        return self.joined(state, signals.MODULE())


@dataclass(frozen=True)
class _Cache(_Part):
    name = "clca"

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN,)

    def layers(self, depth: int) -> Sequence[int]:
        recoveries = self.owner.recoveries(depth)
        cached = range(max(recoveries) + 1) if recoveries else ()
        noted = [*self.owner.reductions(depth), depth - 1] if self.owner.ifa_head else []
        return sorted({block + 1 for block in (*cached, *noted)})

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        return -self.owner.returning(where.layer - 1, where.depth)

    def protects(self, where: Where) -> int:
        return self.owner.returning(where.layer - 1, where.depth) if self.protecting else 0

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        owner, block, depth, x = self.owner, state.layer - 1, state.depth, signals.HIDDEN
        recoveries = owner.recoveries(depth)
        memo: dict[str, Any] = {}
        if owner.ifa_head and (block == depth - 1 or block in owner.reductions(depth)):
            memo[_CLS] = (*state.memo.get(_CLS, ()), x[:, 0])
        extra, stash = x[:, :0], x[:, :0] if state.stash is None else state.stash
        pool = state.memo.get(_POOL, state.n0 + (owner.num_clr if owner.clc_pool_clr else 0))
        if block in recoveries:
            extra, stash, pool = stash, stash[:, :0], state.n
        if recoveries and block < recoveries[-1]:
            now = torch.cat((x, extra.to(x.dtype)), dim=1)
            stash = torch.cat((stash, *self._cached(now, extra, state, pool)), dim=1)
        return self.joined(state, extra, stash=stash, memo={**memo, _POOL: pool})

    def _cached(self, x: Tensor, extra: Tensor, state: TokenState, pool: int) -> list[Tensor]:
        owner, count = self.owner, self.owner.num_clr
        if self.protecting:
            patches = x[:, state.prefix : state.n]
            if state.padded and state.size is not None:
                live = (state.size[:, state.prefix :] > 0).to(x.dtype)
                mean = (patches * live).sum(dim=1, keepdim=True) / live.sum(dim=1, keepdim=True).clamp_min(1)
            else:
                mean = patches.mean(dim=1, keepdim=True)
            newest = extra if extra.shape[1] else x[:, : state.prefix]
        else:
            mean = x[:, 0 if owner.clc_pool_cls else 1 : pool].mean(dim=1, keepdim=True)
            newest = x
        carriers = [newest[:, newest.shape[1] - count :].to(x.dtype)] if count else []
        return [*([mean] if owner.clc_include_gap else []), *carriers]


@dataclass(frozen=True)
class _Aside(_Part):
    """Officially for DPC-KNN: the inner reducer without the tokens at the end that returned from the cache."""

    name = "clca"
    always = False

    inner: Reducer = EViT()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.inner.needs

    def layers(self, depth: int) -> Sequence[int]:
        return self.inner.layers(depth)

    def budgets(self, depth: int) -> dict[int, Budget]:
        return self.inner.budgets(depth)

    def modules(self, build: Build) -> nn.Module | None:
        return self.inner.modules(build)

    def official(self, stage: int) -> str:
        return self.inner.official(stage)

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        return self.inner.removed(n - self._behind(where.layer, where.depth), budget, where, prefix)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        behind = self._behind(state.layer, state.depth)
        front = state.changed(n=state.n - behind)
        seen = Signals.of(HIDDEN=signals.HIDDEN[:, : front.n], MODULE=signals.MODULE)
        tm = self.inner.decide(seen, front, budget)
        if tm is None or behind == 0:
            return tm
        slots = torch.arange(tm.K, tm.K + behind, device=state.device).expand(state.batch, -1)
        tail = torch.arange(front.n, state.n, device=state.device).expand(state.batch, -1)
        weight = None if tm.weight is None else torch.cat((tm.weight, torch.ones_like(slots, dtype=tm.weight.dtype)), 1)
        return TokenMap(
            torch.cat((tm.assign, slots), dim=1), tm.K + behind, weight=weight, mode=tm.mode,
            anchor=torch.cat((tm.kept, tail), dim=1),
        )  # fmt: skip

    def _behind(self, layer: int, depth: int) -> int:
        if self.protecting:
            return 0
        return self.owner.num_clr + sum(self.owner.returning(block, depth) for block in range(layer))


@dataclass(frozen=True)
class _Head(_Part):
    name = "clca"
    site = Site.HEAD

    def modules(self, build: Build) -> nn.Module:
        layers = len({*self.owner.reductions(build.depth), build.depth - 1})
        return AggregationHead(build.width, layers, build.classes, self.owner.ifa_dws_conv_groups)

    def official(self, stage: int) -> str:
        return "ifa_head."

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        return None

    def readout(self, module: nn.Module | None, memo: Mapping[str, Any]) -> Any:
        if module is None or _CLS not in memo:
            return None
        stacked = torch.stack(memo[_CLS], dim=-1)
        weight = next(module.parameters())
        return module(stacked.to(weight.dtype))


def split_official(state: Mapping[str, Tensor], num_clr: int, embed_class: bool = True) -> tuple[Any, Any]:
    """Takes a checkpoint of the CLCA repository apart.

    Args:
        state: Its state dict.
        num_clr: Carrier tokens of that model.
        embed_class: Whether class and carrier tokens have position embeddings (`no_embed_class` is False).

    Returns:
        `(host, learned)`: a state dict for timm's VisionTransformer, and one for `Reduction.load_learned`.
    """
    host = {name: tensor for name, tensor in state.items() if name != "clr" and not name.startswith("ifa_head.")}
    learned = {name: tensor for name, tensor in state.items() if name.startswith("ifa_head.")}
    if num_clr:
        pos = state["pos_embed"]
        learned["clca.clr"] = state["clr"]
        learned["clca.pos"] = pos[:, -num_clr:] if embed_class else torch.zeros_like(state["clr"])
        host["pos_embed"] = pos[:, :-num_clr] if embed_class else pos
    return host, learned
