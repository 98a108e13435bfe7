"""What this machine can do at best: bytes copied and products summed per second, measured next to what is judged."""

from __future__ import annotations

import functools
import time

import torch

_ENOUGH_S = 0.05
_GPU_BYTES = 1 << 30


@functools.cache
def copy_bandwidth(device: str, nbytes: int) -> float:
    """Bytes per second, read and written together, of a copy that moves `nbytes`.

    Args:
        device: A CPU copies as many bytes as asked, from whatever cache holds them; a GPU always a GiB, because a small
            copy times its launch.
        nbytes: Rounded up to a power of two, at least 64 KiB.
    """
    size = max(1 << (nbytes - 1).bit_length(), 1 << 16) if device == "cpu" else _GPU_BYTES
    source = torch.ones(size // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return size / _best(lambda: target.copy_(source), device)


@functools.cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a square matrix product: 1024 on a CPU, 8192 on a GPU.

    A CPU without instructions for halves computes faster in fp32, so its limit is the better of the two.
    """
    if device == "cpu" and dtype != torch.float32:
        return max(_rate(device, dtype), _rate(device, torch.float32))
    return _rate(device, dtype)


def _rate(device: str, dtype: torch.dtype) -> float:
    side = 1024 if device == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _best(lambda: a @ b, device)


def _best(call, device: str, samples: int = 7) -> float:  # noqa: ANN001
    # The fastest sample: a limit is not made by the neighbours on the machine.
    now = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = _sample(call, device, 1, now)
    repeats = max(int(_ENOUGH_S / max(seconds, 1e-7)), 1)
    return min(_sample(call, device, repeats, now) for _ in range(samples))


def _sample(call, device: str, repeats: int, now) -> float:  # noqa: ANN001
    if device != "cpu":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = now()
    for _ in range(repeats):
        call()
    return (now() - begin) / repeats
