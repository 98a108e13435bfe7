"""A batch in parts that fit what a CPU's allocator keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_parts"]

# glibc returns blocks over 32 MiB to the system at once and gets them anew, page by page; a batch whose activations
# are that large takes longer than its images one after another.
_MOST = 2**24


def in_parts(run: Callable[..., Tensor], each: int, *tensors: Tensor | None) -> Tensor:
    """`run(*tensors)`, on CPUs without gradients for a few rows at a time.

    Args:
        run: Works row by row: the rows of its result depend on no others.
        each: Bytes per row of the widest tensor in between.
        *tensors: `(B, …)`, or None.

    Returns:
        `(B, …)`.
    """
    batch = len(next(t for t in tensors if t is not None))
    rows = max(_MOST // each, 1)
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or batch <= rows
    if whole or any(t is not None and t.device.type != "cpu" for t in tensors):
        return run(*tensors)
    parts = [range(batch)[start : start + rows] for start in range(0, batch, rows)]
    return torch.cat([run(*(None if t is None else t[part.start : part.stop] for t in tensors)) for part in parts])
