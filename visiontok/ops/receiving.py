"""What every key of a causal attention receives from the queries of a prefill, without the attention map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops.constants import arange_row, wide_dtype
from visiontok.ops.ordering import stable_order

__all__ = ["Perturb", "Received", "heaviest_and_last"]

Perturb = Callable[[Tensor, Tensor], Tensor]

# Most logits per sample that exist at one time: 16 MiB in fp32. Not per batch: a sample must be rounded alike in every
# batch.
_AT_ONCE = 2**22


class Received:
    """Softmax columns of a causal attention, summed over its queries: what H2O (arXiv:2306.14048) accumulates.

    Query i stands at key position `offset + i` and sees the keys up to there. Queries whose own key is padding count
    nothing. Nothing is computed before `sum`.

    Args:
        query: (B, H, Lq, d) after normalisation and positions.
        key: (B, Hkv, L, d); query head h reads key head `h // (H // Hkv)`.
        scale: Factor on the logits.
        live: (B, L) bool, False for keys that are padding; None if there are none.
        offset: Keys that were cached before the first query.

    Raises:
        ParameterError: The shapes do not fit each other.
    """

    def __init__(self, query: Tensor, key: Tensor, scale: float, live: Tensor | None = None, offset: int = 0) -> None:
        heads, length, keys = query.shape[1], query.shape[2], key.shape[2]
        if heads % key.shape[1]:
            raise ParameterError(f"{heads} query heads cannot share {key.shape[1]} key heads evenly.")
        if not 0 <= offset <= keys - length:
            raise ParameterError(f"offset must be in [0, {keys - length}] for {length} queries and {keys} keys, "
                                 f"got {offset!r}.")  # fmt: skip
        if live is not None and live.shape != (key.shape[0], keys):
            raise ParameterError(f"live must be {(key.shape[0], keys)}, got shape {tuple(live.shape)}.")
        self._query, self._key = query.detach(), key.detach()
        self._scale, self._live, self._offset = scale, live, offset

    def sum(self, perturb: Perturb | None = None, last: int | None = None) -> Tensor:
        """What each key receives, averaged over the query heads that share its head.

        Args:
            perturb: `perturb(logits (B, H, q, L), rows (q,)) -> logits`, applied to every strip of scaled logits
                before the mask; `rows` are the key positions of the strip's queries. May write to the logits.
            last: Only the last so many queries of each sample that are no padding; None for all.

        Returns:
            (B, Hkv, L) in at least fp32, 0 for padding. Strips of rows: never Lq x L logits at once.

        Raises:
            ParameterError: `last` is below 1.
        """
        if last is not None and last < 1:
            raise ParameterError(f"last must be at least 1 (queries), got {last!r}.")
        query, at, share = self._asked(last, gathers=perturb is None)
        wide = wide_dtype(self._key.dtype)
        batch, shared, keys, width = self._key.shape
        group = query.shape[1] // shared
        columns = self._key.to(wide).transpose(-2, -1)
        place = arange_row(0, keys, query.device)
        hidden = None if self._live is None else ~self._live.view(batch, 1, 1, keys)
        total = columns.new_zeros(batch, shared, keys)
        length = query.shape[2]
        step = max(_AT_ONCE // (query.shape[1] * keys), 1)
        for a in range(0, length, step):
            b = min(a + step, length)
            # No query of the strip sees a later key; noise, however, is laid out over all of them.
            contiguous = perturb is None and at.shape[0] == 1
            reach = self._offset + self._query.shape[2] - length + b if contiguous else keys
            rows = query[:, :, a:b].to(wide) * self._scale
            logits = rows.reshape(batch, shared, group * (b - a), width) @ columns[..., :reach]
            logits = logits.view(batch, shared * group, b - a, reach)
            if perturb is not None:
                logits = perturb(logits, at[0, a:b])
            unseen = (place[:, :reach] > at[:, a:b, None]).unsqueeze(1)
            if hidden is not None:
                unseen = unseen | hidden[..., :reach]
            # The least finite number, because a row of -inf alone, which only padding has, would turn into NaN.
            given = logits.masked_fill(unseen, torch.finfo(logits.dtype).min).softmax(dim=-1)
            if share is not None:
                given = given * share[:, None, a:b, None]
            total[..., :reach] += given.view(batch, shared, group * (b - a), reach).sum(dim=2)
        return total / group

    def _asked(self, last: int | None, *, gathers: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        # Queries (B, H, q, d), their key positions (1, q) or (B, q), and what each counts: (B, q) or None for 1.
        query, live, offset = self._query, self._live, self._offset
        length = query.shape[2]
        place = arange_row(offset, offset + length, query.device)
        count = length if last is None else min(last, length)
        if live is None:
            return query[:, :, length - count :], place[:, length - count :], None
        own = live[:, offset : offset + length]
        if count == length:
            return query, place, own
        if not gathers:
            later = own.flip(1).cumsum(dim=1).flip(1)
            return query, place, own & (later <= count)
        # Samples may be padded on either side, so their last queries need not be the last ones of the batch.
        found = torch.where(own, place, -1).topk(count, dim=1).values
        index = (found - offset).clamp_min(0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        return query.gather(2, index), found.clamp_min(0), found >= 0


def heaviest_and_last(score: Tensor, count: int, last: int) -> Tensor:
    """The last entries of each row and the best of the others.

    Args:
        score: (R, n); among equals the lower index wins.
        count: Entries to choose, at most n.
        last: How many of them are simply the last ones, at most `count`.

    Returns:
        (R, count) int64, ascending.
    """
    rows, n = score.shape
    best = stable_order(score[:, : n - last], descending=True)[:, : count - last].sort(dim=1).values
    return torch.cat((best, arange_row(n - last, n, score.device).expand(rows, last)), dim=1)
