"""Launch parameters of the kernels, from a shipped table by kernel, architecture and width: no tuning at run time."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import torch
from triton import knobs

__all__ = ["INTERPRETED", "architecture", "forced", "launch_options", "table"]

# Whether the kernels of this import run in Triton's interpreter, on CPU tensors. Its dots are full fp32 and it has no
# bf16 arithmetic, so kernels take it as a constant.
INTERPRETED = bool(knobs.runtime.interpret)


@functools.cache
def table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Kernel name to architecture (`sm_90`, …, or `any`) to entries `{"upto": width or null, "options": {...}}`."""
    return json.loads(resources.files("visiontok.ops.triton").joinpath("configs.json").read_text())


def launch_options(kernel: str, width: int, device: torch.device) -> dict[str, int]:
    """Tile sizes, `num_warps` and `num_stages` for one kernel.

    Args:
        kernel: Its name in the table.
        width: What the entries are bucketed by: channels or head dimension.
        device: Where it runs; an architecture without entries of its own uses `any`.
    """
    return dict(_forced.get(kernel) or _options(kernel, width, architecture(device)))


_forced: dict[str, Mapping[str, int]] = {}


@contextlib.contextmanager
def forced(kernel: str, options: Mapping[str, int]) -> Iterator[None]:
    """Launches a kernel with other options inside a `with` block, at every width (tuning)."""
    before = dict(_forced)
    _forced[kernel] = options
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@functools.cache
def _options(kernel: str, width: int, architecture: str) -> dict[str, int]:
    by_architecture = table()[kernel]
    entries = by_architecture.get(architecture) or by_architecture["any"]
    return next(entry["options"] for entry in entries if entry["upto"] is None or width <= entry["upto"])


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of a device in the table: `sm_90`, `gfx942`, or `any` for what is no GPU."""
    if device.type != "cuda":
        return "any"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
