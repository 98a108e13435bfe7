"""Attention without its map: a bias over keys for kernels that take none, column votes, row entropies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import dispatch
from visiontok.ops.constants import wide_dtype
from visiontok.ops.probing import by_rows, key_votes, rows_of

__all__ = ["Votes", "fold_bias"]

# Most elements per image of a map that is formed for two uses: 2 MiB in fp32, about what a block's MLP holds at that
# length. Beyond, memory traffic costs what a second pass does, and strips need next to no memory. Not per batch: an
# image must be rounded alike in every batch.
_SMALL = 2**19


def fold_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Puts a bias over keys into extra channels, for attention kernels that take no mask.

    Attention over the result with the same, explicitly given scale has logits `scale * q @ k + bias`; its output is in
    the first d channels. The bias takes two channels, the rounded value and what rounding left, so that half precision
    loses nothing to it.

    Args:
        query: (B, H, N, d).
        key: (B, H, N, d).
        value: (B, H, N, d).
        bias: (B, 1, 1, N) additive bias over keys; -inf becomes a number that no logit can outweigh.
        scale: Factor on the logits.

    Returns:
        query, key and value, each (B, H, N, D), D the next multiple of 8 from d + 2 on.

    Raises:
        ParameterError: The bias differs between queries.
    """
    if bias.shape[-2] != 1:
        raise ParameterError(f"bias must be (B, 1, 1, N), one value per key, got shape {tuple(bias.shape)}.")
    width = key.shape[-1]
    blank = -(width + 2) % 8
    least = torch.finfo(key.dtype).min / 2
    wide = torch.promote_types(wide_dtype(bias.dtype), key.dtype)
    share = (bias.to(wide) / scale).clamp_min(least).transpose(-2, -1)
    high = share.to(key.dtype)
    low = (share - high.to(share.dtype)).to(key.dtype)
    one = high.new_ones(()).expand(*query.shape[:3], 2)
    parts = torch.cat((high, low), dim=-1).expand(*key.shape[:3], 2)
    query = F.pad(torch.cat((query, one), dim=-1), (0, blank))
    key = F.pad(torch.cat((key, parts), dim=-1), (0, blank))
    return query, key, F.pad(value, (0, 2 + blank))


def _negentropy(rows: Tensor) -> Tensor:
    # torch.special.entr is exact at 0 too, and takes three times as long.
    return (rows * rows.clamp_min(torch.finfo(rows.dtype).tiny).log()).sum(dim=-1)


class Votes:
    """A row-stochastic attention A (B, H, N, N) that is multiplied with, and formed only on request.

    Args:
        query: (B, H, N, d) after normalisation and positions.
        key: (B, H, N, d).
        scale: Factor on the logits.
        bias: (B, 1, 1, N) additive bias over keys, e.g. log sizes or padding, or (B, 1, N, N).
    """

    def __init__(self, query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> None:
        self._query, self._key = query, key
        self._scale, self._bias = scale, bias
        self._map: Tensor | None = None

    @classmethod
    def of(cls, attention: Tensor) -> Votes:
        """Votes of an explicit map.

        Args:
            attention: (B, H, N, N), rows summing to one.

        Raises:
            ParameterError: The map is not square.
        """
        if attention.dim() != 4 or attention.shape[2] != attention.shape[3]:
            raise ParameterError(f"attention must be (B, H, N, N), got shape {tuple(attention.shape)}.")
        votes = cls(attention[..., :1], attention[..., :1], 1.0)
        votes._map = attention.to(wide_dtype(attention.dtype))
        return votes

    @classmethod
    def joined(cls, parts: Sequence[Votes]) -> Votes:
        """One attention with the heads of several over the same tokens and scale."""
        first = parts[0]
        query = torch.cat([part._query for part in parts], dim=1)
        key = torch.cat([part._key for part in parts], dim=1)
        return cls(query, key, first._scale, first._bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, H, N)."""
        batch, heads, length = self._query.shape[:3]
        return batch, heads, length

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all results, at least fp32."""
        return wide_dtype(self._query.dtype)

    @property
    def map(self) -> Tensor:
        """(B, H, N, N), formed on first use and kept; worth it when it is multiplied with many times."""
        if self._map is None:
            self._map = self._formed()
        return self._map

    def expect(self, uses: int) -> None:
        """Forms the map if that is cheaper for so many multiplications; decided by shapes alone.

        Args:
            uses: Calls of `vote` and `attend` to come. Three or more form the map, two a small one.
        """
        _, heads, length = self.shape
        if uses > 2 or (uses == 2 and heads * length * length <= _SMALL):
            _ = self.map

    def vote(self, s: Tensor, among: Tensor | None = None) -> Tensor:
        """What each key receives when query i spends s_i by its attention: Aᵀ s.

        Args:
            s: (B, H, N), or broadcastable to it.
            among: (B, N) 1 for the tokens that take part, 0 for the others, which neither spend nor receive; rows of A
                sum to one over those that do.

        Returns:
            (B, H, N).
        """
        s = s.to(self.dtype).expand(self.shape).unsqueeze(2)
        if self._map is None:
            bias = self._bias if among is None else _added(self._bias, among[:, None, None].to(self.dtype).log())
            s = s if among is None else s * among[:, None, None]
            return key_votes(self._query, self._key, self._scale, bias, s.squeeze(2))
        if among is None:
            return (s @ self._map).squeeze(2)
        live = among[:, None, None].to(self.dtype)
        spent = self.attend(live.transpose(2, 3).expand(*self.shape, 1)).transpose(2, 3)
        return (s * live / spent.clamp_min(torch.finfo(self.dtype).tiny) @ self._map * live).squeeze(2)

    def attend(self, v: Tensor) -> Tensor:
        """A v for v (B, H, N, d)."""
        if self._map is not None:
            return self._map @ v
        if v.shape[-1] != self._query.shape[-1]:
            # The fused kernels take values as wide as queries only.
            return torch.cat(self._by_rows(lambda rows, a, b: rows @ v, self._bias), dim=2)
        mask = None if self._bias is None else self._bias.to(self.dtype)
        query, key = self._query.to(self.dtype), self._key.to(self.dtype)
        return F.scaled_dot_product_attention(query, key, v.to(self.dtype), attn_mask=mask, scale=self._scale)

    def entropy(self) -> Tensor:
        """(B, H, N) entropy of each row in nats."""
        if self._map is not None:
            return -_negentropy(self._map)
        return -torch.cat(self._by_rows(lambda rows, a, b: _negentropy(rows), self._bias), dim=2)

    def mean_entropy(self, size: Tensor | None = None) -> Tensor:
        """(B, N) entropy in nats of each row after averaging over heads.

        Args:
            size: (B, N) token sizes; undoes a log-size bias of the attention. Keys of size 0 stay out.
        """
        if self._map is None:
            bias = self._bias
            if size is not None:
                # Padding's -inf stays.
                wide = size.to(self.dtype)[:, None, None]
                bias = _added(bias, wide.log().neg()).masked_fill(wide == 0, -torch.inf)
            return -torch.cat(self._by_rows(lambda rows, a, b: _negentropy(rows.mean(dim=1)), bias), dim=1)
        rows = self._map
        if size is not None:
            # A key with a = 0 divided by a tiny size stays 0.
            rows = rows / size.to(self.dtype).clamp_min(torch.finfo(self.dtype).tiny)[:, None, None]
            rows = rows / rows.sum(dim=-1, keepdim=True)
        return -_negentropy(rows.mean(dim=1))

    def _formed(self) -> Tensor:
        length = self.shape[2]
        needs_graph = torch.is_grad_enabled() and (self._query.requires_grad or self._key.requires_grad)
        if dispatch.tracing() or needs_graph:
            query, key = self._query.to(self.dtype) * self._scale, self._key.to(self.dtype)
            return rows_of(query, key.transpose(-2, -1), self._bias)
        # Strips, because logits beside the map would be as much memory again.
        formed = self._query.new_empty(*self.shape, length, dtype=self.dtype)
        self._by_rows(lambda rows, a, b: formed[:, :, a:b].copy_(rows), self._bias)
        return formed

    def _by_rows(self, use: Callable[[Tensor, int, int], Tensor], bias: Tensor | None) -> list[Tensor]:
        return by_rows(self._query.to(self.dtype) * self._scale, self._key.to(self.dtype), bias, use)


def _added(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias.to(more.dtype) + more
