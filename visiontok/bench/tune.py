"""Offline search for launch options of the Triton kernels on the GPU at hand: the entries of their launch table.

A climb from what the table has: all options one change away (a tile halved or doubled, half or twice the warps, one
pipeline stage more or less) are timed in turns with the current ones, and the fastest becomes current until none is
clearly faster. Options that do not compile, need more shared memory than there is, or change a result are out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.bench.kernel_calls import KERNELS, call
from visiontok.bench.timing import interleave
from visiontok.errors import MissingDependencyError, ParameterError, VisionTokError

__all__ = ["Found", "TuningError", "climb", "entries", "merged", "neighbours", "search", "shipped", "start", "widths"]

Options = Mapping[str, int]
# Largest sensible value of what is no tile.
_MOST = {"num_warps": 16, "num_stages": 5, "unroll": 8}
_SMALLEST_TILE = 16
_ROUNDS = 20
# Steps of a climb: more would mean that the start was no neighbourhood of the goal.
_STEPS = 8
# Share of indices that may differ.
_TURNED = 0.01
# Below this gain a difference is noise, and an entry more to explain.
_GAIN = 0.02


class TuningError(VisionTokError, RuntimeError):
    """Nothing can be tuned here."""


@dataclass(frozen=True)
class Found:
    """The outcome for one kernel at one width.

    Attributes:
        kernel: Its name in the table.
        width: What was tuned.
        options: The fastest.
        milliseconds: Its median.
        before: The median of the options that the table had.
        tried: Options that ran and agreed.
        failed: Options that did not.
    """

    kernel: str
    width: int
    options: dict[str, int]
    milliseconds: float
    before: float
    tried: int
    failed: int


class Climb(NamedTuple):
    """Where a climb ended.

    Attributes:
        options: The best.
        seconds: Their median.
        before: The median of the start, in the same run.
        tried: Options that ran.
        failed: Options that did not.
    """

    options: dict[str, int]
    seconds: float
    before: float
    tried: int
    failed: int


def shipped() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The launch table of the package.

    Raises:
        MissingDependencyError: Triton is not installed, or too old.
    """
    try:
        from visiontok.ops.triton.configuring import table
    except (ImportError, AttributeError) as error:
        told = "the kernels need Triton 3.9 or newer, which comes with torch 2.14 and newer for CUDA and ROCm"
        raise MissingDependencyError(f"{told} ({error}).") from error
    return table()


def widths(kernel: str) -> tuple[int, ...]:
    """The widths that are tuned for a kernel of the table."""
    return KERNELS[kernel.removesuffix("_fp32")].widths


def start(kernel: str, width: int, architecture: str = "any") -> dict[str, int]:
    """The options that the table has for a width."""
    by_architecture = shipped()[kernel]
    found = by_architecture.get(architecture) or by_architecture["any"]
    return dict(next(e["options"] for e in found if e["upto"] is None or width <= e["upto"]))


def neighbours(options: Options) -> list[dict[str, int]]:
    """Options that differ from given ones in one place."""
    made: list[dict[str, int]] = []
    for name, value in options.items():
        values = [value - 1, value + 1] if name == "num_stages" else [value // 2, value * 2]
        least = 1 if name in _MOST else min(_SMALLEST_TILE, value)
        made += [{**options, name: other} for other in values if least <= other <= _MOST.get(name, other)]
    return made


def climb(options: Options, times_of: Callable[[list[dict[str, int]]], list[float | None]]) -> Climb:
    """Follows the fastest neighbour until none is clearly faster.

    Args:
        options: Where to start.
        times_of: Seconds of each of some options, timed together, None for those that fail.

    Raises:
        TuningError: The start itself fails.
    """
    current, known = dict(options), {_name(options)}
    outcomes: list[bool] = []
    for _ in range(_STEPS):
        new = [found for found in neighbours(current) if _name(found) not in known]
        known.update(map(_name, new))
        own, *others = times_of([current, *new])
        if own is None:
            raise TuningError(f"the options {current} fail here")
        outcomes += [seconds is not None for seconds in others]
        ran = [(seconds, index) for index, seconds in enumerate(others) if seconds is not None]
        fastest, index = min(ran, default=(own, 0))
        if fastest > own * (1 - _GAIN):
            break
        current = new[index]
    # Once more side by side: the best of many was also the luckiest.
    before, seconds = times_of([dict(options), current])
    if before is None or seconds is None:
        raise TuningError(f"the options {current} fail at random here")
    if seconds > before * (1 - _GAIN):
        current, seconds = dict(options), before
    return Climb(current, seconds, before, 1 + sum(outcomes), len(outcomes) - sum(outcomes))


def _name(options: Options) -> str:
    return json.dumps(options, sort_keys=True)


def search(kernel: str, width: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Found:
    """Tunes one kernel at one width.

    Args:
        kernel: Its name in the table; those for fp32 get fp32 inputs whatever `dtype` is.
        width: Channels, head width or number of indices.
        device: A GPU.
        dtype: Of the activations.

    Raises:
        TuningError: No GPU, or the shipped options themselves fail.
    """
    from visiontok.ops.triton.configuring import architecture, forced

    if device.type != "cuda":
        raise TuningError(f"tuning times kernels on a GPU, and {str(device)!r} is none; run it where CUDA or ROCm is.")
    run = call(kernel, device, torch.float32 if kernel.endswith("_fp32") else dtype, width)
    expected = _tensors(run())

    def launched(chosen: Options) -> Callable[[], Any]:
        def launch() -> Any:
            with forced(kernel, chosen):
                return run()

        return launch

    def times_of(options: list[dict[str, int]]) -> list[float | None]:
        calls = {str(index): launched(chosen) for index, chosen in enumerate(options)}
        alive = {name: launch for name, launch in calls.items() if _agrees(launch, expected)}
        times = interleave(alive, device=device, warm=3, rounds=_ROUNDS) if alive else {}
        return [times[name].p50 if name in times else None for name in calls]

    ended = climb(start(kernel, width, architecture(device)), times_of)
    return Found(kernel, width, ended.options, 1e3 * ended.seconds, 1e3 * ended.before, ended.tried, ended.failed)


def _tensors(out: Any) -> list[Tensor]:
    parts = out if isinstance(out, tuple) else (out,)
    return [part.clone() for part in parts if isinstance(part, Tensor)]


def _agrees(run: Callable[[], Any], expected: Sequence[Tensor]) -> bool:
    try:
        found = _tensors(run())
        torch.cuda.synchronize()
    except Exception:  # out of registers or shared memory, or a tile that the kernel's shapes do not allow
        return False
    return all(map(_alike, found, expected))


def _alike(a: Tensor, b: Tensor) -> bool:
    # Other tiles sum in another order, which turns a near tie here and there.
    if a.is_floating_point():
        return torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)
    return (a != b).float().mean().item() < _TURNED


def entries(found: Iterable[Found]) -> dict[str, list[dict[str, Any]]]:
    """The table's entries of one architecture: by kernel, ascending widths, the last one for all beyond."""
    by_kernel: dict[str, list[Found]] = {}
    for each in found:
        by_kernel.setdefault(each.kernel, []).append(each)
    made: dict[str, list[dict[str, Any]]] = {}
    for kernel, group in by_kernel.items():
        rows: list[dict[str, Any]] = []
        for each in sorted(group, key=lambda item: item.width):
            if rows and rows[-1]["options"] == each.options:
                rows[-1]["upto"] = each.width
            else:
                rows.append({"upto": each.width, "options": each.options})
        rows[-1]["upto"] = None
        made[kernel] = rows
    return made


def merged(path: Path, architecture: str, made: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The table of a file, or the package's where there is no file, with the entries of one architecture replaced.

    Raises:
        ParameterError: The file is no launch table.
    """
    table: Any = json.loads(json.dumps(shipped()))
    if path.exists():
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ParameterError(f"{path} is no JSON: {error}") from error
        if not isinstance(table, dict) or not all(isinstance(value, dict) for value in table.values()):
            raise ParameterError(f"{path} is no launch table: it must map kernels to architectures to entries")
    for kernel, rows in made.items():
        table.setdefault(kernel, {})[architecture] = rows
    return table
