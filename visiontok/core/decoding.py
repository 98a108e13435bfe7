"""Decisions on visual tokens inside a decoder (site LLM) and on its cache (site KV), free of any host library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.core.compacting import Span, compact
from visiontok.core.multimodal import Stop
from visiontok.core.reducer import Where
from visiontok.core.signals import Signals
from visiontok.core.state import TokenState, apply
from visiontok.core.visual import Text
from visiontok.ops.constants import wide_dtype, without_autocast
from visiontok.ops.receiving import Received

__all__ = ["Evicted", "Seen", "Tokens", "evict", "reduce_layer", "survivors", "visible"]


class Seen(NamedTuple):
    """The attention of one decoder layer at prefill.

    Attributes:
        query: (B, H, L, d).
        key, value: (B, Hkv, L, d).
        scale: Factor on the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Tokens:
    """The sequence that a decoder layer sees at prefill.

    Attributes:
        whole: (B, L') int64 column of the prompt that each token stands for.
        live: (B, L') bool, False for padding.
        spans: Visual tokens of each picture.
        first: Visual tokens that each picture had before the decoder.
        carry: Per picture, tensors (m, ...) that follow its tokens.
        padded: Whether there may be padding.
    """

    whole: Tensor
    live: Tensor
    spans: tuple[Span, ...]
    first: tuple[int, ...]
    carry: tuple[Mapping[str, Tensor], ...] = ()
    padded: bool = True


class _Group(NamedTuple):
    members: list[int]
    sample: Tensor
    columns: Tensor


def _groups(spans: Sequence[Span], removed: Sequence[int]) -> list[_Group]:
    """Pictures of equal length and budget, to be decided at once."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, (span, r) in enumerate(zip(spans, removed)):
        if len(span.columns):
            found.setdefault((len(span.columns), r), []).append(i)
    groups = []
    for members in found.values():
        columns = torch.stack([spans[i].columns for i in members])
        sample = torch.tensor([spans[i].sample for i in members], device=columns.device)
        groups.append(_Group(members, sample, columns))
    return groups


def reduce_layer(
    stop: Stop, depth: int, x: Tensor, tokens: Tokens, seen: Callable[[], Seen] | None
) -> tuple[Tensor, Tokens, list[Tensor]] | None:
    """Drops visual tokens before a decoder layer.

    Args:
        stop: Who decides.
        depth: Decoder layers.
        x: (B, L', C) hidden states.
        tokens: What they are.
        seen: The attention that the decision reads.

    Returns:
        The shorter hidden states, what they are, and per picture the columns that stay; None if nothing changes.
    """
    where = [Where(stop.layer, depth, start=n) for n in tokens.first]
    removed = [stop.reducer.removed(len(s.columns), stop.budget, at, 0) for s, at in zip(tokens.spans, where)]
    if not stop.reducer.always and not any(removed):
        return None
    kept: list[Tensor] = [torch.arange(len(span.columns), device=x.device) for span in tokens.spans]
    values: list[Tensor | None] = [None] * len(kept)
    carry = [dict(own) for own in tokens.carry] or [{} for _ in kept]
    for group in _groups(tokens.spans, removed):
        amount = removed[group.members[0]]
        if amount == 0 and not stop.reducer.always:
            continue
        _ask(stop, depth, amount, x, tokens, group, seen, (kept, values, carry))
    short = compact(tokens.live, tokens.spans, kept)
    y = x.gather(1, short.place.unsqueeze(2).expand(-1, -1, x.shape[2]))
    for i, made in enumerate(values):
        if made is not None:
            # Slots stand in the order of their columns.
            y[short.spans[i].sample, short.spans[i].columns] = made[kept[i].argsort(stable=True)]
    stays = [span.columns[chosen] for span, chosen in zip(tokens.spans, kept)]
    after = Tokens(
        tokens.whole.gather(1, short.place), short.live, tuple(short.spans), tokens.first, tuple(carry), short.padded
    )
    return y, after, stays


def _ask(
    stop: Stop,
    depth: int,
    amount: int,
    x: Tensor,
    tokens: Tokens,
    group: _Group,
    seen: Callable[[], Seen] | None,
    out: tuple[list[Tensor], list[Tensor | None], list[dict[str, Tensor]]],
) -> None:
    kept, values, carry = out
    reducer = stop.reducer
    hidden = x[group.sample.unsqueeze(1), group.columns]
    names = set.intersection(*(set(carry[i]) for i in group.members))
    own = {name: torch.stack([carry[i][name] for i in group.members]) for name in names}
    state = TokenState.initial(hidden, 0).changed(
        layer=stop.layer, depth=depth, n0=tokens.first[group.members[0]], carry=own, carry_rules=reducer.carry_rules
    )
    offers: dict[str, Callable[[], Any]] = {"HIDDEN": lambda: hidden}
    if seen is not None:
        offers |= _Rows(x, tokens, group, seen).offers()
    with without_autocast(x.device.type):
        tm = reducer.decide(Signals(offers), state, amount)
        if tm is None:
            return
        reduced, after = apply(tm, hidden, state)
    counts = [tm.K] * len(group.members) if tm.counts is None else tm.counts.tolist()
    for row, (i, count) in enumerate(zip(group.members, counts)):
        kept[i] = tm.kept[row, :count]
        if tm.form not in ("select", "identity"):
            values[i] = reduced[row, :count]
        carry[i] = {name: value[row, :count] for name, value in after.carry.items()}


class _Rows:
    """Attention signals of a group of pictures, from one layer's queries and keys."""

    def __init__(self, x: Tensor, tokens: Tokens, group: _Group, seen: Callable[[], Seen]) -> None:
        self.x, self.tokens, self.group, self.seen = x, tokens, group, seen

    def offers(self) -> dict[str, Callable[[], Any]]:
        return {
            "ATTN_LAST": self.last,
            "ATTN_TEXT": lambda: self.attended(self.text_columns())[0],
            "TEXT": self.text,
            "KEY": lambda: self.cut(self.seen().key),
            "VALUE": lambda: self.cut(self.seen().value),
        }

    def cut(self, tensor: Tensor) -> Tensor:
        """(B, H, L, d) to (R, H, n, d)."""
        index = self.group.columns[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor[self.group.sample].gather(2, index)

    def last(self) -> Tensor:
        length = self.tokens.live.shape[1]
        places = torch.arange(length, device=self.x.device)
        final = torch.where(self.tokens.live, places, 0).amax(dim=1)[self.group.sample]
        return self.attended((final.unsqueeze(1), torch.ones_like(final, dtype=torch.bool).unsqueeze(1)))[0][:, :, 0]

    def text_columns(self) -> tuple[Tensor, Tensor]:
        """(R, T) columns of the text that follows each picture, and which of them exist."""
        live = self.tokens.live.clone()
        for span in self.tokens.spans:
            live[span.sample, span.columns] = False
        places = torch.arange(live.shape[1], device=live.device)
        after = live[self.group.sample] & (places > self.group.columns.amax(dim=1, keepdim=True))
        count = max(int(after.sum(dim=1).amax()), 1)
        order = (~after).to(torch.int64).argsort(dim=1, stable=True)[:, :count]
        return order, after.gather(1, order)

    def text(self) -> Text:
        columns, live = self.text_columns()
        vectors = self.x[self.group.sample.unsqueeze(1), columns]
        return Text(vectors.to(wide_dtype(vectors.dtype)).masked_fill(~live.unsqueeze(2), 0), live)

    def attended(self, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(R, H, T, n) softmax rows of some queries at the pictures' columns, zero where a query does not exist."""
        (columns, exists), seen, sample = rows, self.seen(), self.group.sample
        query, key = seen.query, seen.key
        wide, shared = wide_dtype(query.dtype), query.shape[1] // key.shape[1]
        index = columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        chosen = query[sample].gather(2, index).to(wide) * seen.scale
        logits = chosen.unflatten(1, (-1, shared)).flatten(2, 3) @ key[sample].to(wide).mT
        logits = logits.unflatten(2, (shared, -1)).flatten(1, 2)
        places = torch.arange(key.shape[2], device=key.device)
        sees = (places <= columns.unsqueeze(2)) & self.tokens.live[sample].unsqueeze(1)
        weights = logits.masked_fill(~sees.unsqueeze(1), -torch.inf).softmax(dim=-1).nan_to_num(0)
        cut = self.group.columns[:, None, None].expand(-1, weights.shape[1], weights.shape[2], -1)
        return weights.gather(3, cut).masked_fill(~exists[:, None, :, None], 0), exists


# ---- the cache


class Evicted(NamedTuple):
    """A layer's cache after eviction.

    Attributes:
        keys, values: (B, Hkv, E, d).
        live: (B, E) bool, False for padding.
        kept: Per sample (Hkv, m) columns of the item that stay.
        padded: Whether any entry is padding.
    """

    keys: Tensor
    values: Tensor
    live: Tensor
    kept: list[Tensor]
    padded: bool


@dataclass
class _Sample:
    columns: Tensor
    others: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def evict(
    stop: Stop,
    depth: int,
    keys: Tensor,
    values: Tensor,
    tokens: Tokens,
    seen: Callable[[], Seen] | None,
    alive: Sequence[Tensor] | None = None,
) -> Evicted | None:
    """Drops or merges entries of one layer's cache.

    Args:
        stop: Who decides.
        depth: Decoder layers.
        keys, values: (B, Hkv, L', d) cached at prefill.
        tokens: What the entries are.
        seen: The layer's attention at prefill.
        alive: Per picture (m,) bool, which of its tokens the last decoder layer still saw.
    """
    samples = [_sample(stop, tokens, b) for b in range(keys.shape[0])]
    where = Where(stop.layer, depth)
    removed = [stop.reducer.removed(len(s.columns), stop.budget, where, 0) if len(s.columns) else 0 for s in samples]
    if not stop.reducer.always and not any(removed):
        return None
    found: dict[tuple[int, int], list[int]] = {}
    for b, (sample, r) in enumerate(zip(samples, removed)):
        found.setdefault((len(sample.columns), r), []).append(b)
    made: list[tuple[Tensor, Tensor, Tensor]] = [None] * len(samples)  # type: ignore[list-item]
    for (count, r), members in found.items():
        whole = count == 0 or (r == 0 and not stop.reducer.always)
        for b, entry in zip(
            members, _evicted(stop, depth, r, keys, values, samples, members, tokens, seen, alive, whole)
        ):
            made[b] = entry
    return _joined(keys, values, samples, made)


def _sample(stop: Stop, tokens: Tokens, b: int) -> _Sample:
    every = tokens.live[b].nonzero().squeeze(1)
    own = [span.columns for span in tokens.spans if span.sample == b]
    if stop.reducer.over == "all":
        return _Sample(every, every[:0])
    if not own:
        return _Sample(every[:0], every)
    columns = torch.cat(own)
    rest = tokens.live[b].index_fill(0, columns, False)
    return _Sample(columns, rest.nonzero().squeeze(1))


def _evicted(
    stop: Stop,
    depth: int,
    amount: int,
    keys: Tensor,
    values: Tensor,
    samples: Sequence[_Sample],
    members: Sequence[int],
    tokens: Tokens,
    seen: Callable[[], Seen] | None,
    alive: Sequence[Tensor] | None,
    whole: bool,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per sample (Hkv, m, d) keys and values of the item and (Hkv, m) its columns."""
    columns = torch.stack([samples[b].columns for b in members])
    rows = torch.tensor(members, device=keys.device)
    heads = keys.shape[1]

    def cut(tensor: Tensor) -> Tensor:
        index = columns[:, None, :, None].expand(-1, heads, -1, tensor.shape[3])
        return tensor[rows].gather(2, index).flatten(0, 1)

    own_keys, own_values = cut(keys), cut(values)
    spots = columns.repeat_interleave(heads, 0)
    tm = None
    if not whole:
        carry = {} if alive is None else {"alive": _alive(tokens, alive, members, heads)}
        state = TokenState.initial(own_keys, 0).changed(layer=stop.layer, depth=depth, carry=carry)
        offers: dict[str, Callable[[], Any]] = {"KEY": lambda: own_keys[:, None], "VALUE": lambda: own_values[:, None]}
        if seen is not None:
            offers["ATTN_SUM"] = lambda: _Sums(seen(), tokens.live, rows, columns)
        with without_autocast(keys.device.type):
            tm = stop.reducer.decide(Signals(offers), state, amount)
            if tm is not None:
                (own_keys, own_values), _ = apply(tm, (own_keys, own_values), state)
                spots = spots.gather(1, tm.kept)
    counts = [own_keys.shape[1]] * len(members) if tm is None or tm.counts is None else tm.counts[::heads].tolist()
    parts = zip(
        own_keys.unflatten(0, (-1, heads)), own_values.unflatten(0, (-1, heads)), spots.unflatten(0, (-1, heads))
    )
    return [(k[:, :n], v[:, :n], s[:, :n]) for (k, v, s), n in zip(parts, counts)]


def _alive(tokens: Tokens, alive: Sequence[Tensor], members: Sequence[int], heads: int) -> Tensor:
    rows = [torch.cat([flag for flag, span in zip(alive, tokens.spans) if span.sample == b]) for b in members]
    return torch.stack(rows).repeat_interleave(heads, 0)


class _Sums:
    """ATTN_SUM: what each entry of the items received from the prompt's queries; see `ops.receiving.Received`."""

    def __init__(self, seen: Seen, live: Tensor, rows: Tensor, columns: Tensor) -> None:
        key = seen.key[rows]
        more = key.shape[2] - live.shape[1]
        alive = torch.nn.functional.pad(live[rows], (0, more), value=True)
        self._received = Received(seen.query[rows], key, seen.scale, alive, key.shape[2] - seen.query.shape[2])
        self._columns = columns

    def sum(self, perturb: Any = None, last: int | None = None) -> Tensor:
        """(R, n) sums over the queries (only the last ones), averaged over the query heads that share a key head."""
        whole = self._received.sum(perturb, last)
        return whole.gather(2, self._columns.unsqueeze(1).expand(-1, whole.shape[1], -1)).flatten(0, 1)


def _joined(
    keys: Tensor, values: Tensor, samples: Sequence[_Sample], made: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Evicted:
    """Text entries, then those of the items that stay, padded at the end to the longest sample."""
    lengths = [len(sample.others) + entry[0].shape[1] for sample, entry in zip(samples, made)]
    longest, (batch, heads) = max(lengths), keys.shape[:2]
    out_keys = keys.new_zeros(batch, heads, longest, keys.shape[3])
    out_values = values.new_zeros(batch, heads, longest, values.shape[3])
    live = torch.zeros(batch, longest, dtype=torch.bool, device=keys.device)
    for b, (sample, (k, v, _)) in enumerate(zip(samples, made)):
        text, length = len(sample.others), lengths[b]
        out_keys[b, :, :text], out_values[b, :, :text] = keys[b][:, sample.others], values[b][:, sample.others]
        out_keys[b, :, text:length], out_values[b, :, text:length] = k, v
        live[b, :length] = True
    return Evicted(out_keys, out_values, live, [spots for _, _, spots in made], min(lengths) < longest)


def visible(stop: Stop, depth: int, tokens: Tokens, seen: Seen) -> Tensor | None:
    """(B, Hkv, L') bool, which entries of the prompt the next tokens see in a layer; None for all of them.

    Args:
        stop: Who decides.
        depth: Decoder layers.
        tokens: What the entries are.
        seen: The layer's last attention, over the whole cache.
    """
    length = tokens.live.shape[1]
    made = evict(stop, depth, seen.key[:, :, :length], seen.value[:, :, :length], tokens, lambda: seen)
    if made is None:
        return None
    sees = tokens.live.unsqueeze(1).repeat(1, seen.key.shape[1], 1)
    for b, kept in enumerate(made.kept):
        columns = _sample(stop, tokens, b).columns
        sees[b, :, columns] = False
        sees[b].scatter_(1, kept, True)
    return sees


def survivors(before: Tokens, final: Tokens) -> list[Tensor]:
    """Per picture (m,) bool, which of the tokens before are still there in the end."""
    flags = []
    for own, last in zip(before.spans, final.spans):
        here, there = before.whole[own.sample, own.columns], final.whole[last.sample, last.columns]
        flags.append(torch.isin(here, there))
    return flags
