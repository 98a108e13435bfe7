"""What a set of tokens says about a tokenizer: which codes it uses, and how much each place of the row tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.tokenizers.packing import bits_for

__all__ = ["TokenStatistics", "token_statistics"]


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Statistics of ids.

    Attributes:
        images: Rows.
        tokens: Ids in all rows.
        used: Different codes that occur.
        usage: `used` as a share of the codebook.
        perplexity: 2 to the entropy of all ids together: as many codes, used equally, would tell as much.
        entropy: `(N,)` bits, of the ids at each place over the rows that reach it.
        counts: `(N,)`, rows that reach each place.
        bits_per_image: Mean over the rows of the sum of `entropy`: what static tables for each place could reach on
            these very rows. With few rows this is too low, because it cannot exceed log2(rows) at any place.
        packed_bits_per_image: What fixed width takes.
    """

    images: int
    tokens: int
    used: int
    usage: float
    perplexity: float
    entropy: Tensor
    counts: Tensor
    bits_per_image: float
    packed_bits_per_image: float


def token_statistics(ids: Tensor | Sequence[Tensor], codebook_size: int) -> TokenStatistics:
    """Statistics of a set of images' tokens.

    Args:
        ids: `(n, N)` or n rows of different lengths.
        codebook_size: Of the tokenizer.

    Raises:
        ParameterError: No tokens, or ids out of range.
    """
    rows = list(ids)
    if not rows or not sum(len(row) for row in rows):
        raise ParameterError("ids must hold at least one token, got none.")
    everything = torch.cat([row.reshape(-1) for row in rows])
    if int(everything.min()) < 0 or int(everything.max()) >= codebook_size:
        raise ParameterError(
            f"ids must be in [0, {codebook_size}), got {int(everything.min())} to {int(everything.max())}."
        )
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    entropy = torch.stack([_entropy(place[place >= 0]) for place in padded.T])
    counts = (padded >= 0).sum(0)
    used = int(everything.unique().numel())
    return TokenStatistics(
        images=len(rows),
        tokens=len(everything),
        used=used,
        usage=used / codebook_size,
        perplexity=float(2 ** _entropy(everything)),
        entropy=entropy,
        counts=counts,
        bits_per_image=float((entropy * counts).sum()) / len(rows),
        packed_bits_per_image=bits_for(codebook_size) * len(everything) / len(rows),
    )


def _entropy(values: Tensor) -> Tensor:
    share = values.unique(return_counts=True)[1].double() / len(values)
    return -(share * share.log2()).sum()
