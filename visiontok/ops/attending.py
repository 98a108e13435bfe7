"""Attention with a bias, so that a fused kernel runs: what backbones call instead of torch's function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import dispatch, library
from visiontok.ops.attention import fold_bias
from visiontok.ops.constants import wide_dtype

__all__ = ["as_mask", "attend", "folds"]

_HALVES = (torch.float16, torch.bfloat16)
# Widest heads of the kernel: tiles hold whole rows.
_WIDEST = 128

_attend = dispatch.op("attend")
_launch = library.launcher("attention.attention")


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, dropout_p: float = 0.0) -> Tensor:
    """softmax(scale q kᵀ + bias) v, in whatever way keeps a fused kernel.

    Without a bias it is torch's function untouched. On the CPU torch's flash kernel takes the bias as a mask. On GPUs a
    mask rules out flash attention and has to be in the dtype of q, in which a log size loses more than the output's
    rounding; there a bias over keys travels in two extra channels of q and k (`fold_bias`).

    Args:
        q: (B, H, Nq, d).
        k: (B, H, Nk, d).
        v: (B, H, Nk, e).
        bias: Added to the logits: (B, 1, 1, Nk) over keys, e.g. log sizes with -inf for padding, or (B, 1 or H, Nq, Nk)
            over pairs, or None. Any floating dtype; give sizes in fp32.
        scale: Factor on the products.
        dropout_p: Probability with which attention weights are dropped.

    Returns:
        (B, H, Nq, e).
    """
    if bias is None and _attend.forced is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    return _attend(q, k, v, bias, scale, dropout_p)


def folds(q: Tensor, bias: Tensor) -> bool:
    """Whether a bias belongs into extra channels of q and k here, for hosts that call torch's function themselves."""
    return _over_keys(bias) and _attend.choose(q).name == "fold"


def as_mask(bias: Tensor, q: Tensor) -> Tensor:
    """The bias in the dtype in which torch's function takes it as a mask beside q."""
    if bias.dtype == q.dtype:
        return bias
    # Only the CPU's fused kernel takes an fp32 mask with queries in half precision.
    exact = q.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return bias.to(wide_dtype(q.dtype) if exact else q.dtype)


def _computed_in(x: Tensor) -> torch.dtype:
    # As torch's function would cast x: a norm of queries leaves fp32 under autocast.
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def _fold_refuses(q: Tensor) -> str | None:
    if not q.is_cuda:
        return "not on a GPU"
    return None if _computed_in(q) in _HALVES else "flash attention is for half precision"


def _over_keys(bias: Tensor) -> bool:
    return bias.shape[-2] == 1


@_attend.implementation("fold", _fold_refuses, "a bias over keys in two extra channels, which flash attention allows")
def _fold(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float) -> Tensor:
    if bias is None or not _over_keys(bias):
        return _mask(q, k, v, bias, scale, dropout_p)
    dtype = _computed_in(q)
    parts = fold_bias(q.to(dtype), k.to(dtype), v.to(dtype), bias, scale)
    out = F.scaled_dot_product_attention(*parts, dropout_p=dropout_p, scale=scale)
    return out[..., : v.shape[-1]]


@_attend.implementation("mask", lambda q: None, "torch's fused attention takes the bias as a mask")
def _mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float) -> Tensor:
    bias = None if bias is None else as_mask(bias, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


@_attend.implementation("triton", lambda q: "only on request, as the vendors' kernels are faster", "forced")
def _triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float) -> Tensor:
    if bias is not None and not (_over_keys(bias) and bias.shape[1] == 1):
        return _mask(q, k, v, bias, scale, dropout_p)
    if dropout_p or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        raise ParameterError(
            f"the triton implementation of attend is for inference, got dropout_p={dropout_p} and "
            f"{'' if torch.is_grad_enabled() else 'no '}gradients; use fold or mask, or torch.no_grad()."
        )
    if max(q.shape[-1], v.shape[-1]) > _WIDEST or q.shape[-1] != v.shape[-1]:
        raise ParameterError(
            f"the triton implementation of attend takes heads of one width up to {_WIDEST}, got {q.shape[-1]} for q "
            f"and {v.shape[-1]} for v; use fold or mask."
        )
    keys = None if bias is None else bias.float().expand(q.shape[0], -1, -1, -1)[:, 0, 0]
    return _launch(q, k, v, keys, scale)[0]
