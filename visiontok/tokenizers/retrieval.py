"""Images that are alike, found by their tokens alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.tokenizers.base import Tokenizer

__all__ = ["TokenIndex"]

_STRIP = 1 << 24


class TokenIndex:
    """The tokens of a data set, to be searched.

    Args:
        tokenizer: That made them.
        ids: `(n, k)`.
        weights: `(k,)` weight of each place. Default 1 / (place + 1): earlier tokens say more about the whole image.

    Raises:
        ParameterError: Ids of another shape or range, or weights that are not positive and k in number.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Tensor, weights: Sequence[float] | None = None) -> None:
        self.tokenizer = tokenizer
        self.ids, _ = tokenizer._checked_ids(ids)
        length = self.ids.shape[1]
        values = [1 / (place + 1) for place in range(length)] if weights is None else list(weights)
        if len(values) != length or not all(value > 0 for value in values):
            raise ParameterError(f"weights must be {length} positive numbers, got {values}.")
        self.weights = torch.tensor(values, device=self.ids.device) / sum(values)

    def nearest(self, ids: Tensor, count: int = 5, by: str = "codes") -> tuple[Tensor, Tensor]:
        """The images whose tokens are nearest.

        Args:
            ids: `(q, k')` queries; k' up to k, and then only the first k' places count.
            count: How many to find.
            by: "codes": weighted cosine of the code vectors place by place. "match": weighted share of equal ids.

        Returns:
            Rows of the index `(q, count)`, best first (of equal ones the first), and their scores, 1 for equal tokens.

        Raises:
            ParameterError: Queries longer than the index, another `by`, or more than there are.
        """
        queries, _ = self.tokenizer._checked_ids(ids)
        length = queries.shape[1]
        if by not in ("codes", "match") or length > self.ids.shape[1] or not 1 <= count <= len(self.ids):
            raise ParameterError(
                f"by must be 'codes' or 'match', queries at most {self.ids.shape[1]} tokens long and count 1 to "
                f"{len(self.ids)}; got {by!r}, {length} and {count}."
            )
        weights = self.weights[:length] / self.weights[:length].sum()
        stored = self.ids[:, :length]
        rows = max(1, _STRIP // max(1, stored.numel()))
        scores = torch.cat([self._scores(part, stored, weights, by) for part in queries.split(rows)])
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        return best, scores.gather(1, best)

    def _scores(self, queries: Tensor, stored: Tensor, weights: Tensor, by: str) -> Tensor:
        if by == "match":
            return ((queries[:, None] == stored[None]) * weights).sum(-1)
        left, right = self._vectors(queries, weights), self._vectors(stored, weights)
        return left @ right.T

    def _vectors(self, ids: Tensor, weights: Tensor) -> Tensor:
        codes = torch.nn.functional.normalize(self.tokenizer.code_vectors(ids).float(), dim=-1)
        return (codes * weights.sqrt()[:, None]).flatten(1)
