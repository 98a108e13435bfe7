"""Scores read from attention without its map: rows of a few queries, column votes, row entropies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops.constants import wide_dtype

__all__ = ["Votes", "prefix_rows"]

# Query rows whose probabilities exist at one time.
_ROWS = 64


def prefix_rows(query: Tensor, key: Tensor, prefix: int, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax rows of the leading queries, in at least fp32.

    Args:
        query: (B, H, N, d) after normalisation and positions.
        key: (B, H, N, d).
        prefix: Number P of leading queries.
        scale: Factor on the logits.
        bias: (B, 1, 1, N) additive bias over keys.

    Returns:
        (B, H, P, N); costs H * P * N * d MACs, 1 / N of the whole map for a class token.
    """
    wide = wide_dtype(query.dtype)
    return _rows(query[:, :, :prefix].to(wide), key.to(wide), scale, bias)


def _rows(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    logits = (query * scale) @ key.transpose(-2, -1)
    return (logits if bias is None else logits + bias.to(logits.dtype)).softmax(dim=-1)


class Votes:
    """A row-stochastic attention A (B, H, N, N) that is multiplied with, and formed only on request.

    Args:
        query: (B, H, N, d) after normalisation and positions.
        key: (B, H, N, d).
        scale: Factor on the logits.
        bias: (B, 1, 1, N) additive bias over keys, e.g. log sizes or padding.
    """

    def __init__(self, query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> None:
        wide = wide_dtype(query.dtype)
        self._query, self._key = query.to(wide), key.to(wide)
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
        return self._query.dtype

    @property
    def map(self) -> Tensor:
        """(B, H, N, N), formed on first use and kept; worth it when it is multiplied with many times."""
        if self._map is None:
            self._map = _rows(self._query, self._key, self._scale, self._bias)
        return self._map

    def vote(self, s: Tensor) -> Tensor:
        """What each key receives when query i spends s_i by its attention: Aᵀ s.

        Args:
            s: (B, H, N), or broadcastable to it.

        Returns:
            (B, H, N).
        """
        s = s.expand(self.shape).unsqueeze(2)
        if self._map is not None:
            return (s @ self._map).squeeze(2)
        parts = self._by_rows(lambda rows, a, b: s[..., a:b].to(rows.dtype) @ rows)
        return torch.stack(parts).sum(dim=0).squeeze(2) if len(parts) > 1 else parts[0].squeeze(2)

    def attend(self, v: Tensor) -> Tensor:
        """A v for v (B, H, N, d)."""
        if self._map is not None:
            return self._map @ v
        mask = None if self._bias is None else self._bias.to(self.dtype)
        return F.scaled_dot_product_attention(self._query, self._key, v, attn_mask=mask, scale=self._scale)

    def entropy(self) -> Tensor:
        """(B, H, N) entropy of each row in nats."""
        if self._map is not None:
            return torch.special.entr(self._map).sum(dim=-1)
        return torch.cat(self._by_rows(lambda rows, a, b: torch.special.entr(rows).sum(dim=-1)), dim=2)

    def mean_entropy(self, size: Tensor | None = None) -> Tensor:
        """(B, N) entropy in nats of each row after averaging over heads.

        Args:
            size: (B, N) token sizes; undoes a log-size bias of the attention. Keys of size 0 stay out.
        """
        # A key with a = 0 divided by a tiny size stays 0.
        scale = None if size is None else size.to(self.dtype).clamp_min(torch.finfo(self.dtype).tiny)[:, None, None]

        def use(rows: Tensor, a: int, b: int) -> Tensor:
            if scale is not None:
                rows = rows / scale
                rows = rows / rows.sum(dim=-1, keepdim=True)
            return torch.special.entr(rows.mean(dim=1)).sum(dim=-1)

        if self._map is not None:
            return use(self._map, 0, self.shape[2])
        return torch.cat(self._by_rows(use), dim=1)

    def _by_rows(self, use: Callable[[Tensor, int, int], Tensor]) -> list[Tensor]:
        length = self.shape[2]
        bounds = [(a, min(a + _ROWS, length)) for a in range(0, length, _ROWS)]
        return [use(_rows(self._query[:, :, a:b], self._key, self._scale, self._bias), a, b) for a, b in bounds]
