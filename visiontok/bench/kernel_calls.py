"""Typical calls of the Triton kernels, one per entry of their launch table: what is tuned, or only compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.errors import UnknownNameError, did_you_mean

__all__ = ["KERNELS", "Kernel", "call"]

Call = Callable[[], Any]
_PLAIN = "_fp32"


class Kernel(NamedTuple):
    """One kernel of the launch table.

    Attributes:
        make: Given device, dtype, width and batch, the call that runs it.
        widths: The widths that are tuned, of the models that exist; the largest stands for all beyond.
        batch: Images of a call that fills a GPU.
    """

    make: Callable[[torch.device, torch.dtype, int, int], Call]
    widths: tuple[int, ...]
    batch: int = 64


def call(kernel: str, device: torch.device, dtype: torch.dtype, width: int, batch: int | None = None) -> Call:
    """The call of an entry.

    Args:
        kernel: Its name in the launch table; `_fp32` at its end is for fp32 inputs, which `dtype` then has to be.
        device: Where the tensors are.
        dtype: Of the activations.
        width: Channels, head width or, for kernels that only see indices, their number.
        batch: Default: enough to fill a GPU.

    Raises:
        UnknownNameError: No such kernel.
    """
    name = kernel.removesuffix(_PLAIN)
    if name not in KERNELS:
        raise UnknownNameError(f"no kernel {kernel!r}; known: {', '.join(KERNELS)}.{did_you_mean(name, KERNELS)}")
    made = KERNELS[name]
    return made.make(device, dtype, width, made.batch if batch is None else batch)


def _module(name: str) -> Any:
    return importlib.import_module(f"visiontok.ops.triton.{name}")


def _draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _heads(device: torch.device, dtype: torch.dtype, width: int, batch: int, tokens: int = 197) -> Tensor:
    # (3, B, H, N, d), as a projection leaves queries, keys and values: 384 channels or more.
    heads = max(384 // width, 1)
    return _draw(device, dtype, batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)


def _even_odd(device: torch.device, batch: int, tokens: int = 197, r: int = 13) -> Tensor:
    # The slots of a merge of the first r even tokens behind the class token, without a match.
    place = torch.arange(tokens)
    leaving = (place % 2 == 0) & (place >= 2) & (place < 2 + 2 * r)
    slot = (~leaving).cumsum(0) - 1
    slot[leaving] = slot[place[leaving] - 1]
    return slot.expand(batch, -1).to(device)


def _grouped(device: torch.device, batch: int, tokens: int = 197, r: int = 13) -> tuple[Tensor, Tensor]:
    # Grouped by torch, so that nothing but the kernel itself runs.
    assign = _even_odd(torch.device("cpu"), batch, tokens, r)
    ordered, src = assign.sort(dim=1, stable=True)
    csr = torch.searchsorted(ordered, torch.arange(tokens - r + 1).repeat(batch, 1))
    return csr.int().to(device), src.int().to(device)


def _match(device: torch.device, dtype: torch.dtype, width: int, batch: int) -> Call:
    # Keys of several heads are averaged in fp32 whatever they are; those of one stay half.
    wide = dtype == torch.float32
    key = _heads(device, torch.bfloat16 if wide else dtype, width, batch)[1]
    run = _module("matching").match_slots
    key = key if wide else key[:, :1]
    return lambda: run(key, 13, 1)


def _best(device: torch.device, dtype: torch.dtype, width: int, batch: int, tokens: int = 4096) -> Call:
    metric, run = _draw(device, dtype, batch, tokens, width), _module("matching").best_match
    place = torch.arange(tokens, device=device)
    a, b = place[place % 4 != 0], place[place % 4 == 0]
    return lambda: run(metric, a, b)


def _plan(device: torch.device, dtype: torch.dtype, width: int, batch: int) -> Call:
    run = _module("planning").plan
    tokens = width + width // 3
    place = torch.arange(tokens, device=device)
    a, b = place[:width], place[width:]
    score = _draw(device, torch.float32, batch, width)
    partner = a.remainder(len(b)).expand(batch, -1).contiguous()
    return lambda: run(score, partner, a, b, tokens // 2, 0, tokens, False)


def _energy(device: torch.device, dtype: torch.dtype, width: int, batch: int) -> Call:
    metric, run = _draw(device, dtype, batch, 197, width), _module("scoring").energy
    return lambda: run(metric, 0.5, 1.0, "elu")


def _group(device: torch.device, dtype: torch.dtype, width: int, batch: int) -> Call:
    assign, run = _even_odd(device, batch, width).contiguous(), _module("merging").group
    return lambda: run(assign, width - 13)


def _merge(device: torch.device, dtype: torch.dtype, width: int, batch: int) -> Call:
    x, y = (_draw(device, dtype, batch, 197, width) for _ in range(2))
    csr, src = _grouped(device, batch)
    size, run = torch.ones(batch, 197, device=device), _module("merging").merge
    norm = (_draw(device, dtype, width), _draw(device, dtype, width), 1e-6)
    return lambda: run(x, csr, src, y=y, size=size, norm=norm)


def _spread(device: torch.device, dtype: torch.dtype, width: int, batch: int) -> Call:
    y, residual = _draw(device, dtype, batch, 184, width), _draw(device, dtype, batch, 197, width)
    assign, run = _even_odd(device, batch).contiguous(), _module("merging").spread
    return lambda: run(y, assign, residual)


def _attention(device: torch.device, dtype: torch.dtype, width: int, batch: int) -> Call:
    q, k, v = _heads(device, dtype, width, batch)
    bias, run = torch.zeros(batch, q.shape[2], device=device), _module("attention").attention
    return lambda: run(q, k, v, bias, width**-0.5)


def _key_votes(device: torch.device, dtype: torch.dtype, width: int, batch: int) -> Call:
    q, k, _ = _heads(device, dtype, width, batch)
    bias = torch.zeros(batch, q.shape[2], device=device)
    lse, run = torch.full(q.shape[:3], 8.0, device=device), _module("attention").key_votes
    return lambda: run(q, k, lse, bias, width**-0.5)


def _class_rows(device: torch.device, dtype: torch.dtype, width: int, batch: int) -> Call:
    q, k, _ = _heads(device, dtype, width, batch)
    bias, run = torch.zeros(batch, q.shape[2], device=device), _module("attention").class_rows
    return lambda: run(q, k, bias, width**-0.5, 1)


_CHANNELS, _HEADS, _METRICS, _COUNTS = (384, 768, 1024, 1280), (64, 128), (64, 320, 640), (197, 1024, 4096)
KERNELS: dict[str, Kernel] = {
    "match": Kernel(_match, _HEADS, 256),
    "norm": Kernel(_best, _METRICS, 8),
    "best": Kernel(_best, _METRICS, 8),
    "rank": Kernel(_plan, _COUNTS, 8),
    "place": Kernel(_plan, _COUNTS, 8),
    "energy": Kernel(_energy, _HEADS, 256),
    "group": Kernel(_group, _COUNTS),
    "merge": Kernel(_merge, _CHANNELS, 256),
    "spread": Kernel(_spread, _CHANNELS, 256),
    "attention": Kernel(_attention, _HEADS),
    "key_votes": Kernel(_key_votes, _HEADS),
    "class_rows": Kernel(_class_rows, _HEADS),
}
