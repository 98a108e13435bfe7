"""Where in the image a token matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.tokenizers.base import Tokenizer

__all__ = ["contribution_maps"]


@torch.no_grad()
def contribution_maps(
    tokenizer: Tokenizer, ids: Tensor, *, draws: int = 4, seed: int = 0, batch_size: int = 64, **options: Any
) -> Tensor:
    """How much each pixel changes when one token is replaced by a random other one.

    Args:
        tokenizer: With ids, not vectors.
        ids: `(k,)` of one image.
        draws: Replacements per token, over which the change is averaged.
        seed: Of the replacements.
        batch_size: Images to decode at once.
        **options: Of `decode`. Flow decoders use one noise for all of them.

    Returns:
        `(k, H, W)`, mean absolute change over channels and draws.

    Raises:
        ParameterError: Not one row of ids, continuous tokens, or fewer than one draw.
    """
    if not tokenizer.discrete or ids.dim() != 1:
        raise ParameterError(f"ids must be the ids (k,) of one image, got shape {tuple(ids.shape)}.")
    if draws < 1 or tokenizer.codebook_size < 2:
        raise ParameterError(f"draws must be at least 1, got {draws}.")
    count = len(ids)
    generator = torch.Generator().manual_seed(seed)
    # A step of 1 to V - 1 never leads back to the token itself.
    step = torch.randint(1, tokenizer.codebook_size, (count, draws), generator=generator)
    rows = ids.cpu().expand(count, draws, count).clone()
    own = rows.diagonal(dim1=0, dim2=2)
    own.copy_((own + step.T) % tokenizer.codebook_size)
    original = tokenizer.decode(ids[None], **options)
    parts = [tokenizer.decode(part, **options) - original for part in rows.view(-1, count).split(batch_size)]
    return torch.cat(parts).abs().mean(1).unflatten(0, (count, draws)).mean(1)
