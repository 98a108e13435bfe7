"""Calls the C++ kernels: outputs are allocated here, everything else happens in one call without the GIL."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from visiontok.ops import dispatch
from visiontok.ops.cpu import building

__all__ = ["MODES", "match_slots", "merge", "missing", "refuses"]

# The codes that the kernels know, see Dtype and Mode in the sources.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MODES = {"mean": 0, "sum": 1, "amax": 2, "absmax": 3, "mlerp": 4}
MODES = tuple(_MODES)

_CPU = torch.device("cpu")
_PLAIN = (Tensor, torch.nn.Parameter)
# Under a mode or a transform such as vmap a tensor may have no memory of its own.
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
_INT, _LONG, _POINTER, _DOUBLE = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
_MATCH = [_INT, _POINTER, *[_LONG] * 9, *[_POINTER] * 3, _INT]
_MERGE = [
    *[_INT] * 2, *[_POINTER, _LONG, _LONG] * 2, _POINTER, _INT, *[_POINTER] * 4, *[_LONG] * 4, _POINTER, _LONG,
    *[_POINTER] * 4, *[_POINTER, _INT] * 2, _DOUBLE, _INT,
]  # fmt: skip
# Below this much work waking the other threads costs more than they save.
_MULTIPLICATIONS = 2**20
_NUMBERS = 2**17


def refuses(x: Tensor) -> str | None:
    """What speaks against the C++ kernels for a call whose main operand is x, or None. Compiles them if need be."""
    if dispatch.tracing():
        return "a recorded graph must run without visiontok's library"
    if not x.is_cpu:
        return "not on a CPU"
    if x.dtype not in _DTYPES:
        return f"no kernel for {str(x.dtype).removeprefix('torch.')}"
    if x.requires_grad and torch.is_grad_enabled():
        return "gradients are wanted"
    if type(x) not in _PLAIN or _modes() != 0 or _transform() is not None:
        return "the tensor is not an ordinary one with memory of its own"
    return missing()


@functools.cache
def missing() -> str | None:
    """Why there are no C++ kernels on this machine, or None; compiles them if need be."""
    built = building.library()
    return built.note if built.library is None else None


@functools.cache
def _kernel(name: str) -> Any:
    built = building.library().library
    function = getattr(built, f"visiontok_{name}")
    function.argtypes, function.restype = {"match_slots": _MATCH, "merge": _MERGE}[name], _INT
    return function


def match_slots(key: Tensor, r: int, prefix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's even/odd matching from keys to slots (arXiv:2210.09461); see `visiontok.ops.matching.match_slots`.

    Args:
        key: (B, H, N, d) fp32, bf16 or fp16; heads are summed in fp32.
        r: Tokens to merge, 1 … (N - prefix) // 2.
        prefix: Leading tokens to protect.

    Returns:
        (B, N) int64 slots, and tokens by slot: (B, N - r + 1) int32 bounds, (B, N) int32 tokens.
    """
    if key.stride(3) != 1:
        key = key.contiguous()
    batch, heads, length, depth = key.shape
    image, head, token, _ = key.stride()
    bounds = length - r + 1
    # Given strides, torch makes a tensor in two thirds of the time.
    assign = torch.empty_strided((batch, length), (length, 1), dtype=torch.int64, device=_CPU)
    csr = torch.empty_strided((batch, bounds), (bounds, 1), dtype=torch.int32, device=_CPU)
    src = torch.empty_strided((batch, length), (length, 1), dtype=torch.int32, device=_CPU)
    many = batch * length * length * depth >= 4 * _MULTIPLICATIONS
    failed = _kernel("match_slots")(
        _DTYPES[key.dtype], key.data_ptr(), batch, heads, length, depth, image, head, token, r, prefix,
        assign.data_ptr(), csr.data_ptr(), src.data_ptr(), torch.get_num_threads() if many else 1,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to match {batch} x {length} tokens")
    return assign, csr, src


def merge(
    x: Tensor,
    csr: Tensor,
    src: Tensor,
    *,
    y: Tensor | None = None,
    gamma: Tensor | None = None,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: str = "mean",
    rows: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Reduces the tokens `x + gamma * y` of each slot to one, in fp32; see `visiontok.ops.fusing.merge`.

    Args:
        x: (B, N, C) fp32, bf16 or fp16.
        csr: (B, K + 1) bounds of the slots in `src`; tokens after the last are dropped.
        src: (B, N) tokens by slot.
        y: (B, N, C) branch to add first.
        gamma: (C,) its scale per channel.
        weight: (B, N) weights. Default: the sizes.
        size: (B, N) token sizes. Default: ones.
        mode: One of `MODES`.
        rows: (B, N, R) fp32 values that follow the tokens by the weights of the mean.
        norm: Weight, bias (C,) or None and eps of a layer norm to apply to the result.

    Returns:
        (B, K, C) values in x.dtype, (B, K) fp32 sizes, (B, K, R) rows or None, (B, K, C) normed values or None.
    """
    batch, length, channels = x.shape
    slots = csr.shape[1] - 1
    x = x if x.stride(2) == 1 else x.contiguous()
    x_image, x_token, _ = x.stride()
    y_image = y_token = width = 0
    if y is not None:
        y = _dense(y, x.dtype) if y.dtype != x.dtype or y.stride(2) != 1 else y
        y_image, y_token, _ = y.stride()
    csr, src = _dense(csr, torch.int32), _dense(src, torch.int32)
    weight = None if weight is None else _dense(weight, torch.float32)
    size = None if size is None else _dense(size, torch.float32)
    scale, shift, eps = norm or (None, None, 0.0)
    gamma, scale, shift = _vector(gamma), _vector(scale), _vector(shift)
    shape, strides = (batch, slots, channels), (slots * channels, channels, 1)
    out = torch.empty_strided(shape, strides, dtype=x.dtype, device=_CPU)
    new_size = torch.empty_strided((batch, slots), (slots, 1), dtype=torch.float32, device=_CPU)
    moved = normed = None
    if rows is not None:
        rows, width = _dense(rows, torch.float32), rows.shape[2]
        moved = torch.empty((batch, slots, width), dtype=torch.float32, device=_CPU)
    if norm is not None:
        normed = torch.empty_like(out)
    failed = _kernel("merge")(
        _DTYPES[x.dtype], _MODES[mode], x.data_ptr(), x_image, x_token, _at(y), y_image, y_token,
        *_parameter(gamma), _at(weight), _at(size), csr.data_ptr(), src.data_ptr(), batch, length, slots, channels,
        _at(rows), width, out.data_ptr(), new_size.data_ptr(), _at(moved), _at(normed), *_parameter(scale),
        *_parameter(shift), eps, torch.get_num_threads() if out.numel() >= _NUMBERS else 1,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to merge {batch} x {length} tokens")
    return out, new_size, moved, normed


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype in _DTYPES and x.is_contiguous() else x.float().contiguous()


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _parameter(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), _DTYPES[x.dtype])
