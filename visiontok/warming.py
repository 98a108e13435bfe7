"""Compiling ahead of time what a model would otherwise compile during its first images."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visiontok.errors import ParameterError
from visiontok.ops import cpu

__all__ = ["Prepared", "warmup"]

_KERNELS = "visiontok.ops.triton."
Shape = tuple[int, ...]


class Prepared(NamedTuple):
    """One thing that is ready now.

    Attributes:
        kind: `C++ kernels`, `Triton kernel` or `forward`.
        name: The device, the kernel's name, or the input's shape and dtype.
        detail: Where the library lies or why there is none, variants compiled by this call, or seconds taken.
    """

    kind: str
    name: str
    detail: str


def warmup(
    model: nn.Module,
    input_shape: Shape | Sequence[Shape],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> list[Prepared]:
    """Compiles every kernel that a model needs for inference, by one forward of noise per distinct shape.

    On a CPU the C++ kernels are built too if they are not in the cache. Weights, buffers, random state and training
    mode are as before; what is compiled later for gradients is not included.

    Args:
        model: Patched or not, on the device that it will run on.
        input_shape: Of the images, (B, C, H, W), or several such. Variants hardly depend on it: one per batch that is
            served is more than enough.
        dtype: Of the images. Default: that of the model's first floating parameter.
        device: Where the images are made. Default: the model's.

    Returns:
        What was prepared, the forwards with their times last.

    Raises:
        ParameterError: A shape has no image in it, or the model is on another device.
    """
    shapes = _shapes(input_shape)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    where = like.device if device is None else torch.device(device)
    if where.type != like.device.type or (where.index or 0) != (like.device.index or 0):
        raise ParameterError(
            f"device is {str(where)!r}, but the model is on {str(like.device)!r}; move it there first."
        )
    kind = like.dtype if dtype is None else dtype
    rows = [Prepared("C++ kernels", "cpu", _library(like))] if where.type == "cpu" else []
    before = dict(_variants())
    forwards = [_forward(model, shape, kind, where) for shape in shapes]
    made = ((name, count - before.get(name, 0)) for name, count in _variants())
    rows += [Prepared("Triton kernel", name, f"{count} variant(s) compiled") for name, count in made if count]
    return rows + forwards


def _shapes(given: Any) -> list[Shape]:
    shapes = [given] if given and isinstance(given[0], int) else given
    found = [tuple(int(side) for side in shape) for shape in dict.fromkeys(map(tuple, shapes))]
    if not found or any(not shape or min(shape) < 1 for shape in found):
        raise ParameterError(f"input_shape must be (B, C, H, W) or a list of such, sides at least 1, got {given!r}.")
    return found


def _library(like: Tensor) -> str:
    from visiontok.ops.cpu import building

    with torch.inference_mode():
        refused = cpu.refuses(torch.empty(0, dtype=like.dtype))
    return building.library().note if refused is None else f"not used: {refused}"


def _forward(model: nn.Module, shape: Shape, dtype: torch.dtype, device: torch.device) -> Prepared:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    modes = {module: module.training for module in model.modules()}
    start = time.perf_counter()
    try:
        model.eval()
        # Reducers that draw must not move the caller's random numbers.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        for module, training in modes.items():
            module.training = training
    name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {device}"
    return Prepared("forward", name, f"{time.perf_counter() - start:.2f} s")


def _variants() -> Iterator[tuple[str, int]]:
    # Compiled variants of each kernel in this process; only what is imported can have any.
    seen: set[int] = set()
    for path in [name for name in sys.modules if name.startswith(_KERNELS)]:
        for value in list(vars(sys.modules[path]).values()):
            caches = getattr(value, "device_caches", None)
            if isinstance(caches, dict) and id(value) not in seen:
                seen.add(id(value))
                yield value.__name__, sum(len(cache[0]) for cache in caches.values())
