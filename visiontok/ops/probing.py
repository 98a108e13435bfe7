"""What a few queries see and what keys receive, without the attention map: kernels where there are some, and torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visiontok.ops import dispatch, library
from visiontok.ops.constants import wide_dtype

__all__ = ["by_rows", "key_votes", "prefix_rows", "rows_of", "strip"]

# Widest heads of the kernels: their tiles hold whole rows.
_WIDEST = 128
# Query rows whose probabilities exist at one time.
_ROWS = 64
# Most heads times rows for which products with zeros are cheaper than copying the keys into another order.
_FEW = 32


def _refuses(query: Tensor) -> str | None:
    if torch.is_grad_enabled() and query.requires_grad:
        return "with gradients"
    if query.dim() == 4 and query.shape[-1] > _WIDEST:
        return f"heads wider than {_WIDEST}"
    return dispatch.triton_refuses(query)


def _per_key(bias: Tensor | None) -> bool:
    return bias is None or bias.shape[1:3] == (1, 1)


def _flat(bias: Tensor | None, batch: int) -> Tensor | None:
    # (B, N) fp32, as the kernels take it.
    return None if bias is None else bias.float().flatten(1).expand(batch, -1).contiguous()


def _unflat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[:, None, None]


_class_rows = dispatch.op("class_rows")


def prefix_rows(query: Tensor, key: Tensor, prefix: int, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax rows of the leading queries, in at least fp32.

    Args:
        query: (B, H, N, d) after normalisation and positions.
        key: (B, H, N, d).
        prefix: Number P of leading queries.
        scale: Factor on the logits.
        bias: (B, 1, 1, N) additive bias over keys, or (B, 1, N, N).

    Returns:
        (B, H, P, N); costs H * P * N * d MACs, 1 / N of the whole map for a class token, or H times that where it saves
        a copy of all keys.
    """
    run = _class_rows if _per_key(bias) else _class_rows_torch
    return run(query, key, prefix, scale, bias)


_class_rows_kernel = library.define(
    "class_rows(Tensor query, Tensor key, Tensor? bias, float scale, int prefix) -> Tensor",
    lambda query, key, bias, scale, prefix: _class_rows_torch(query, key, prefix, scale, _unflat(bias)),
    lambda query, key, bias, scale, prefix: query.new_empty(
        (*query.shape[:2], prefix, key.shape[2]), dtype=wide_dtype(query.dtype)
    ),
    "attention.class_rows",
)


@_class_rows.implementation("triton", _refuses, "one pass over the keys")
def _class_rows_triton(query: Tensor, key: Tensor, prefix: int, scale: float, bias: Tensor | None) -> Tensor:
    return _class_rows_kernel(query, key, _flat(bias, query.shape[0]), scale, prefix)


@_class_rows.implementation("torch", lambda query: None, "one product with the keys and a softmax")
def _class_rows_torch(query: Tensor, key: Tensor, prefix: int, scale: float, bias: Tensor | None) -> Tensor:
    wide = wide_dtype(query.dtype)
    query, key, bias = query[:, :, :prefix].to(wide), key.to(wide), strip(bias, 0, prefix)
    heads, width = key.shape[1], key.shape[3]
    # Keys as a projection leaves them, the heads of one token side by side.
    woven = key.stride(1) == width and key.stride(3) == 1
    if not woven or not 1 < heads * prefix <= _FEW:
        return rows_of(query * scale, key.transpose(-2, -1), bias)
    apart = torch.eye(heads, dtype=wide, device=key.device).view(heads, 1, heads, 1)
    alone = ((query * scale).unsqueeze(3) * apart).flatten(3).flatten(1, 2)
    logits = torch.bmm(alone, key.transpose(1, 2).flatten(2).transpose(1, 2))
    return _softmax(logits.unflatten(1, (heads, prefix)), bias)


_key_votes = dispatch.op("key_votes")


def key_votes(query: Tensor, key: Tensor, scale: float, bias: Tensor | None, weight: Tensor) -> Tensor:
    """What each key receives when query i spends weight_i by its attention: Aᵀ w, without A.

    Args:
        query: (B, H, N, d) after normalisation and positions.
        key: (B, H, N, d).
        scale: Factor on the logits.
        bias: (B, 1, 1, N) additive bias over keys, (B, 1, N, N), or None.
        weight: (B, H, N).

    Returns:
        (B, H, N) in at least fp32. Strips of rows, or two passes of a kernel; never (B, H, N, N).
    """
    run = _key_votes if _per_key(bias) else _key_votes_torch
    return run(query, key, scale, bias, weight)


def _launch_votes(query: Tensor, key: Tensor, scale: float, bias: Tensor | None, weight: Tensor) -> Tensor:
    # The normaliser of each row is a by-product of attention over any values.
    _, lse = library.launcher("attention.attention")(query, key, key, bias, scale)
    return library.launcher("attention.key_votes")(query, key, lse, bias, scale, weight)


_key_votes_kernel = library.define(
    "key_votes(Tensor query, Tensor key, float scale, Tensor? bias, Tensor weight) -> Tensor",
    lambda query, key, scale, bias, weight: _key_votes_torch(query, key, scale, _unflat(bias), weight),
    lambda query, key, scale, bias, weight: query.new_empty(query.shape[:3], dtype=wide_dtype(query.dtype)),
    _launch_votes,
)


@_key_votes.implementation("triton", _refuses, "one program per block of keys, no map and no atomics")
def _key_votes_triton(query: Tensor, key: Tensor, scale: float, bias: Tensor | None, weight: Tensor) -> Tensor:
    return _key_votes_kernel(query, key, scale, _flat(bias, query.shape[0]), weight.float().contiguous())


@_key_votes.implementation("torch", lambda query: None, "strips of rows")
def _key_votes_torch(query: Tensor, key: Tensor, scale: float, bias: Tensor | None, weight: Tensor) -> Tensor:
    wide = wide_dtype(query.dtype)
    weight = weight.to(wide).unsqueeze(2)
    take = lambda rows, a, b: weight[..., a:b] @ rows  # noqa: E731
    parts = by_rows(query.to(wide) * scale, key.to(wide), bias, take)
    return torch.stack(parts).sum(dim=0).squeeze(2) if len(parts) > 1 else parts[0].squeeze(2)


def by_rows(query: Tensor, key: Tensor, bias: Tensor | None, use: Callable[[Tensor, int, int], Tensor]) -> list[Tensor]:
    """Results of `use(rows, a, b)` over strips of softmax rows a … b, so that a map never exists as a whole.

    Args:
        query: (B, H, N, d) scaled.
        key: (B, H, N, d).
        bias: As in `prefix_rows`.
        use: Takes rows (B, H, b - a, N) and their bounds.
    """
    length = query.shape[2]
    step = -(-length // -(-length // _ROWS))
    columns = key.contiguous().transpose(-2, -1)
    bounds = [(a, min(a + step, length)) for a in range(0, length, step)]
    return [use(rows_of(query[:, :, a:b], columns, strip(bias, a, b)), a, b) for a, b in bounds]


def rows_of(query: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax rows of scaled queries (B, H, n, d) over transposed keys (B, H, d, N)."""
    return _softmax(query @ columns, bias)


def _softmax(logits: Tensor, bias: Tensor | None) -> Tensor:
    return (logits if bias is None else logits.add_(bias.to(logits.dtype))).softmax(dim=-1)


def strip(bias: Tensor | None, a: int, b: int) -> Tensor | None:
    """The rows a … b of a bias that may be the same for all rows."""
    return bias if bias is None or bias.shape[-2] == 1 else bias[..., a:b, :]
