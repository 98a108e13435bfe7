"""TokenMap: where N tokens go among K slots. The one form in which every reducer states its decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import fusing, merging
from visiontok.ops.constants import length_of, wide_dtype
from visiontok.ops.restoring import Fill, restore

__all__ = ["Mode", "TokenMap"]

Mode = Literal["mean", "sum", "amax", "absmax", "mlerp"]
Form = Literal["any", "complete", "select", "identity"]

# Smallest positive normal fp32 number: divides a zero by something.
_TINY = torch.finfo(torch.float32).tiny
_MODES = ("mean", "sum", "amax", "absmax", "mlerp")


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Where each of N tokens goes among K slots.

    Attributes:
        assign: (B, N) int64, the slot of each token in `[0, K)`, or -1 for dropped.
        K: Number of slots. With `counts`, the static cap.
        weight: (B, N) share of each token in its slot's value. Default: the token's size.
        mode: How a slot's value is made: `mean` (divided by the sum of weights), `sum` (not divided), `amax`,
            `absmax` (per channel the entry of largest magnitude), `mlerp` (mean direction with the largest norm;
            ToFu, arXiv:2312.01026).
        mass: (B, N) share of each token in its slot's new size. Default: the token's size.
        anchor: (B, K) int64, the token that stands for a slot (position, packing rank). Default: its token in `stays`,
            else its lowest index.
        counts: (B,) int64 live slots per sample where they differ; slots beyond get size 0.
        grid: (h, w) if the non-prefix slots form a grid in raster order.
        soft: (B, K, N) a learned or attention-like map; then values are `soft @ x` and `assign` is only the origin
            (argmax). The size becomes None unless `mass` is given.
        values: (B, N, C) what `soft` mixes instead of the tokens themselves (e.g. normalised ones).
        back: (B, N, K) weights that restore, where that is not the gather of each token's slot.
        extra: (B, M, C) tokens that join the sequence after its N before the map, which is then over N + M; nothing of
            the input goes into them. Each counts one in sizes.
        protect: New number of leading slots that no reducer may touch, if it changes.
        mute: Whether queries of padding see all keys alike from here on, as some released masks have it.
        carry: New or replaced entries of `TokenState.carry`, already on K slots.
        stash: New `TokenState.stash`.
        memo: New or replaced entries of `TokenState.memo`.
        stays: (start, step) of positions that stand for their slot if they share it with tokens elsewhere.
        form: What is known without looking at the values: `identity`, `select` (value and size are those of the
            anchor), `complete` (nothing dropped) or `any`.
    """

    assign: Tensor
    K: int
    weight: Tensor | None = None
    mode: Mode = "mean"
    mass: Tensor | None = None
    anchor: Tensor | None = None
    counts: Tensor | None = None
    grid: tuple[int, int] | None = None
    soft: Tensor | None = None
    values: Tensor | None = None
    back: Tensor | None = None
    extra: Tensor | None = None
    protect: int | None = None
    mute: bool = False
    carry: Mapping[str, Tensor] | None = None
    stash: Tensor | None = None
    memo: Mapping[str, Any] | None = None
    stays: tuple[int, int] | None = None
    form: Form = "any"

    def __post_init__(self) -> None:
        if self.form == "complete" and self.mode == "mean" and self.plain:
            # Made by the core's own constructors in the hot path; everything else is checked.
            return
        if self.assign.dim() != 2:
            raise ParameterError(f"assign must be (B, N), got shape {tuple(self.assign.shape)}.")
        if self.mode not in _MODES:
            raise ParameterError(f"mode must be one of {', '.join(_MODES)}, got {self.mode!r}.")
        batch, length = self.assign.shape
        for name, value, shape in (
            ("weight", self.weight, (batch, length)),
            ("mass", self.mass, (batch, length)),
            ("anchor", self.anchor, (batch, self.K)),
            ("counts", self.counts, (batch,)),
            ("soft", self.soft, (batch, self.K, length)),
            ("back", self.back, (batch, length, self.K)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ParameterError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")

    @property
    def plain(self) -> bool:
        """Whether values, sizes and restoring follow from `assign` alone."""
        return self.weight is self.mass is self.counts is self.soft is self.back is None

    @property
    def merges_by_size(self) -> bool:
        """Whether this is a size-weighted mean of all tokens, which is one op."""
        return self.form == "complete" and self.mode == "mean" and self.plain

    # ---- construction

    @classmethod
    def identity(cls, like: Tensor, **extra: Any) -> TokenMap:
        """Keeps all tokens in place; `extra` may set carry, stash or memo.

        Args:
            like: (B, N, ...) any tensor over the tokens.
        """
        batch, length = like.shape[0], length_of(like)
        index = torch.arange(length, device=like.device).expand(batch, length)
        return cls(index, length, anchor=index, form="identity", **extra)

    @classmethod
    def keep(cls, index: Tensor, length: int, prefix: int = 0, **extra: Any) -> TokenMap:
        """Keeps some tokens and drops the others.

        Args:
            index: (B, k) int64, kept non-prefix tokens in the order of their slots.
            length: N, prefix included.
            prefix: Leading tokens that stay, before all others.
        """
        batch = index.shape[0]
        anchor = with_prefix(index, prefix)
        count = length_of(anchor)
        slots = torch.arange(count, device=index.device).expand(batch, count)
        assign = torch.full((batch, length), -1, dtype=torch.int64, device=index.device).scatter(1, anchor, slots)
        return cls(assign, count, anchor=anchor, form="select", **extra)

    @classmethod
    def merge(
        cls, src: Tensor, dst: Tensor, order: Tensor, prefix: int = 0, length: int | None = None, **extra: Any
    ) -> TokenMap:
        """Merges source tokens into destination tokens.

        Args:
            src: (B, r) int64, tokens that leave.
            dst: (B, r) int64, the token each of them joins; must be in `order`.
            order: (B, K - prefix) int64, the tokens that stay, in the order of their slots, without the prefix.
            prefix: Leading tokens that stay untouched, before all others.
            length: N if some tokens are in neither `src` nor `order`; those are dropped.
        """
        batch = order.shape[0]
        anchor = with_prefix(order, prefix)
        count = length_of(anchor)
        slots = torch.arange(count, device=order.device).expand(batch, count)
        complete = length is None or length == count + src.shape[1]
        assign = torch.full((batch, length or count + src.shape[1]), -1, dtype=torch.int64, device=order.device)
        assign = assign.scatter(1, anchor, slots)
        assign = assign.scatter(1, src, assign.gather(1, dst))
        return cls(assign, count, anchor=anchor, form="complete" if complete else "any", **extra)

    @classmethod
    def of_slots(cls, slots: merging.Slots, stays: tuple[int, int]) -> TokenMap:
        """A size-weighted merge of all tokens as a matching op states it.

        Args:
            slots: Its result; no token is dropped.
            stays: (start, step) of the positions that others join.
        """
        made = cls(slots.assign, slots.num_slots, stays=stays, form="complete")
        if slots.groups is not None:
            object.__setattr__(made, "_groups", slots.groups)
        return made

    # ---- what the core derives

    @property
    def groups(self) -> merging.Groups:
        """Tokens grouped by slot (CSR), derived once."""
        cached = self.__dict__.get("_groups")
        if cached is None:
            cached = merging.group(self.assign, self.K, complete=self.form == "complete")
            object.__setattr__(self, "_groups", cached)
        return cached

    def share_groups(self) -> None:
        """Derives the grouping now, so that several streams use one."""
        _ = self.groups

    @property
    def csr(self) -> Tensor:
        """(B, K + 1) int64 bounds of each slot in `src`."""
        return self.groups.csr

    @property
    def src(self) -> Tensor:
        """(B, N) int64 tokens ordered by slot; dropped ones last."""
        return self.groups.src

    @property
    def kept(self) -> Tensor:
        """(B, K) int64 the token that stands for each slot; see `anchor`."""
        if self.anchor is not None:
            return self.anchor
        length = self.assign.shape[1]
        rank = torch.arange(length, device=self.assign.device)
        if self.stays is not None:
            start, step = self.stays
            rank = rank + length
            rank[start::step] -= length
        spare = torch.where(self.assign < 0, self.K, self.assign)
        first = rank.new_full((self.assign.shape[0], self.K + 1), 0)
        first = first.scatter_reduce(1, spare, rank.expand_as(spare), reduce="amin", include_self=False)[:, : self.K]
        return first % length

    @property
    def live(self) -> Tensor | None:
        """(B, K) bool, which slots hold a token of this sample, or None if all do."""
        if self.counts is None:
            return None
        return torch.arange(self.K, device=self.assign.device) < self.counts.unsqueeze(1)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Values of the slots.

        Args:
            x: (B, N, C).
            size: (B, N, 1) token sizes, or None for all ones.

        Returns:
            (B, K, C) in x.dtype; sums are accumulated in fp32 (fp64 for fp64).
        """
        if self.form == "identity":
            return x
        if self.soft is not None:
            wide = wide_dtype(x.dtype)
            source = x if self.values is None else self.values
            return (self.soft.to(wide) @ source.to(wide)).to(x.dtype)
        if self.form == "select" and self.mode != "sum":
            kept, live = merging.select(x, self.kept), self.live
            return kept if live is None else kept.masked_fill(~live.unsqueeze(-1), 0)
        if self.mode == "amax":
            return merging.segment_max(x, self.assign, self.K)
        if self.mode == "absmax":
            high = merging.segment_max(x, self.assign, self.K)
            low = -merging.segment_max(-x, self.assign, self.K)
            return torch.where(low.abs() > high.abs(), low, high)
        weight = self.weight if self.weight is not None else (None if size is None else size.squeeze(-1))
        complete = self.form == "complete"
        if self.mode == "sum":
            total = merging.segment_sum(x, self.assign, self.K, weight, complete=complete, groups=self._grouped)
            return total.to(x.dtype)
        weight = self._share(x, weight, complete)
        mean = merging.segment_sum(x, self.assign, self.K, weight, complete=complete, groups=self._grouped)
        mean = mean if mean.dtype == x.dtype else mean.to(x.dtype)
        return mean if self.mode == "mean" else self._rescaled(mean, x)

    def sizes(self, size: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Sizes of the slots.

        Args:
            size: (B, N, 1) sizes of the tokens, or None for all ones.
            dtype: Dtype of the hidden states; sizes use at least fp32.

        Returns:
            (B, K, 1), 0 for a slot without tokens of this sample; None if every slot has size one.
        """
        wide = wide_dtype(dtype)
        if self.form == "identity" and self.mass is None:
            return size
        if self.soft is not None and self.mass is None:
            return self._masked(None, wide)
        if self.form == "select" and self.mass is None:
            new = None if size is None else merging.select(size, self.kept)
            return self._masked(new, wide)
        mass = self.mass if self.mass is not None else self._ones(wide) if size is None else size.squeeze(-1)
        mass = mass if mass.dtype == wide else mass.to(wide)
        new = merging.segment_count(mass, self.assign, self.K, complete=self.form == "complete")
        return self._masked(new.unsqueeze(-1), wide)

    def restore(self, y: Tensor, fill: Fill = "zero", x: Tensor | None = None) -> Tensor:
        """Full-length tokens from slots: each token gets a copy of its slot.

        Args:
            y: (B, K, C).
            fill: What a dropped token gets: `zero`, `mean` (of all live slots), `self` (its own value in `x`) or
                `nearest` (the slot of the closest token in sequence order that has one).
            x: (B, N, C) the tokens before reduction, for `fill="self"`.

        Returns:
            (B, N, C).

        Raises:
            ParameterError: Unknown fill, or `fill="self"` without x.
        """
        if self.back is not None:
            return (self.back.to(wide_dtype(y.dtype)) @ y.to(wide_dtype(y.dtype))).to(y.dtype)
        return restore(y, self.assign, fill, x=x, live=self.live)

    # ---- composition

    def after(self, earlier: TokenMap) -> TokenMap:
        """The single map that does `earlier`, then this one.

        Places compose exactly. Values do so for sums and for weighted means whose weights are the sizes (a mean of
        size-weighted means is the size-weighted mean of all) or were chained explicitly; other modes and soft maps
        keep the later map's mode and are a composition of places only.
        """
        if self.assign.shape[1] != earlier.K:
            taken = self.assign.shape[1]
            raise ParameterError(f"maps do not chain: earlier has {earlier.K} slots, later takes {taken}.")
        inner = earlier.assign
        assign = self.assign.gather(1, inner.clamp_min(0)).masked_fill(inner < 0, -1)
        weight = earlier.weight
        if self.weight is not None:
            later = self.weight.gather(1, inner.clamp_min(0))
            weight = later if weight is None else weight * later
        mass = earlier.mass
        if self.mass is not None:
            # A slot's mass in equal parts to its tokens: only their sum matters.
            ones = torch.ones_like(inner, dtype=self.mass.dtype)
            members = merging.segment_count(ones, inner, earlier.K).clamp_min(1)
            mass = (self.mass / members).gather(1, inner.clamp_min(0))
        anchor = earlier.kept.gather(1, self.kept)
        kinds = {earlier.form, self.form}
        form: Form = "any"
        if kinds <= {"identity", "select"}:
            form = "identity" if kinds == {"identity"} else "select"
        elif kinds <= {"identity", "complete"}:
            form = "complete"
        return TokenMap(
            assign, self.K, weight=weight, mode=self.mode, mass=mass, anchor=anchor, counts=self.counts, grid=self.grid,
            form=form,
        )  # fmt: skip

    def then(self, later: TokenMap) -> TokenMap:
        """`later.after(self)`."""
        return later.after(self)

    def with_state(self, *, carry: Mapping[str, Tensor] | None = None, stash: Tensor | None = None,
                   memo: Mapping[str, Any] | None = None) -> TokenMap:  # fmt: skip
        """The same places with other carried values."""
        return replace(self, carry=carry, stash=stash, memo=memo)

    def compacted(self) -> TokenMap:
        """The same map without the slots that no sample uses; reads `counts`, so it waits for the device."""
        if self.counts is None or self.assign.shape[0] == 0:
            return self
        count = max(int(self.counts.max()), 1)
        if count >= self.K:
            return self
        even = bool((self.counts == count).all())
        cut = {name: None if value is None else value[:, :count]
               for name, value in (("anchor", self.anchor), ("soft", self.soft))}  # fmt: skip
        back = None if self.back is None else self.back[..., :count]
        carry = None if self.carry is None else {name: value[:, :count] for name, value in self.carry.items()}
        return replace(self, K=count, counts=None if even else self.counts, back=back, carry=carry, **cut)

    # ---- helpers

    @property
    def _grouped(self) -> merging.Groups | None:
        # Only if it was derived already: a single stream is grouped where it is summed, if at all.
        return self.__dict__.get("_groups")

    def _ones(self, dtype: torch.dtype) -> Tensor:
        return torch.ones(self.assign.shape, dtype=dtype, device=self.assign.device)

    def _share(self, x: Tensor, weight: Tensor | None, complete: bool) -> Tensor:
        wide = wide_dtype(x.dtype)
        index = self.assign if complete else self.assign.clamp_min(0)
        weight = self._ones(wide) if weight is None else weight.to(wide)
        total = merging.segment_count(weight, self.assign, self.K, complete=complete)
        share = weight / total.clamp_min(_TINY).gather(1, index)
        # A dropped token has no slot; a share of infinity in an empty one would make its gradient NaN.
        return share if complete else share.masked_fill(self.assign < 0, 0)

    def _rescaled(self, mean: Tensor, x: Tensor) -> Tensor:
        # Norms of half-precision tokens may exceed half precision although the result does not.
        wide = wide_dtype(x.dtype)
        return fusing.rescaled(mean.to(wide), x.to(wide), self.assign).to(x.dtype)

    def _masked(self, size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        live = self.live
        if live is None:
            return size
        shown = live.unsqueeze(-1).to(dtype)
        return shown if size is None else size * shown


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Puts tokens 0 … prefix - 1 before `index` (B, k)."""
    if prefix == 0:
        return index
    lead = torch.arange(prefix, device=index.device).expand(index.shape[0], prefix)
    return torch.cat((lead, index), dim=1)
