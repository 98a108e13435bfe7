"""Interleaved timing: baseline, reduced model and oracle take turns, so that drift hits all of them alike.

A round calls every contestant once, in an order that alternates from round to round. Medians of rounds are compared;
where the p20-p80 intervals of two contestants overlap no speed-up may be claimed, whatever the ratio of their medians.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from visiontok.errors import ParameterError

CLOCKS = ("auto", "process", "wall", "cuda")
MIN_SAMPLE_S = 2e-3
MAX_CALLS = 64
LAUNCH_BOUND_SHARE = 0.85
_CACHE_BYTES = 256 << 20

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Times of one contestant.

    Attributes:
        name: the contestant.
        samples: seconds per call, one per round.
        clock: `cuda` (device events), `process` (CPU time of this process) or `wall`.
        launch_bound: GPU only: queueing the kernels takes as long as running them; None on a CPU.
    """

    name: str
    samples: tuple[float, ...]
    clock: str
    launch_bound: bool | None = None

    def quantile(self, share: float) -> float:
        """Seconds per call at a quantile in [0, 1]."""
        return float(np.quantile(self.samples, share))

    @property
    def p20(self) -> float:
        """Seconds per call, 20 % quantile."""
        return self.quantile(0.2)

    @property
    def p50(self) -> float:
        """Seconds per call, median."""
        return self.quantile(0.5)

    @property
    def p80(self) -> float:
        """Seconds per call, 80 % quantile."""
        return self.quantile(0.8)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contestant is than another.

    Attributes:
        value: ratio of medians.
        low: lower end of its 95 % bootstrap interval (rounds are resampled in pairs).
        high: upper end.
        clear: the p20-p80 intervals of the two do not overlap.
    """

    value: float
    low: float
    high: float
    clear: bool

    def __str__(self) -> str:
        """`1.42x [1.38, 1.47]`, or `=` where the intervals overlap."""
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]" if self.clear else "="


def speedup(baseline: Timing, contestant: Timing, resamples: int = 1000) -> Ratio:
    """The speed-up of a contestant over the baseline of the same interleaved run.

    Args:
        baseline: what is compared with.
        contestant: what should be faster.
        resamples: bootstrap resamples for the interval.

    Raises:
        ParameterError: the two do not come from one interleaved run.
    """
    if len(baseline.samples) != len(contestant.samples) or baseline.clock != contestant.clock:
        raise ParameterError(
            f"'{baseline.name}' and '{contestant.name}' were not timed together "
            f"({len(baseline.samples)} and {len(contestant.samples)} rounds, clocks {baseline.clock} and "
            f"{contestant.clock}); pass both to one interleave()"
        )
    first, second = np.asarray(baseline.samples), np.asarray(contestant.samples)
    picks = np.random.default_rng(0).integers(0, len(first), (resamples, len(first)))
    ratios = np.median(first[picks], axis=1) / np.median(second[picks], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    clear = contestant.p80 < baseline.p20 or baseline.p80 < contestant.p20
    return Ratio(baseline.p50 / contestant.p50, float(low), float(high), clear)


@dataclass(frozen=True)
class Efficiency:
    """The three efficiencies of a reduction; None where there is no oracle.

    Attributes:
        ideal: S_flops, the ratio of MACs.
        total: S / S_flops.
        hardware: S_oracle / S_flops, what the machine allows.
        method: S / S_oracle, what the method leaves of it.
    """

    ideal: float
    total: float
    hardware: float | None
    method: float | None


def efficiency(ideal: float, baseline: Timing, reduced: Timing, oracle: Timing | None = None) -> Efficiency:
    """Splits what is lost against the ideal speed-up into the machine's part and the method's part."""
    total = baseline.p50 / reduced.p50 / ideal
    if oracle is None:
        return Efficiency(ideal, total, None, None)
    return Efficiency(ideal, total, baseline.p50 / oracle.p50 / ideal, oracle.p50 / reduced.p50)


def resolve_clock(clock: str, device: torch.device) -> str:
    """The clock that `auto` stands for: `cuda` on a GPU, CPU time with one thread, else wall time.

    Raises:
        ParameterError: unknown clock, or `cuda` without a GPU.
    """
    if clock not in CLOCKS:
        raise ParameterError(f"unknown clock '{clock}', expected one of {', '.join(CLOCKS)}")
    if clock == "auto":
        if device.type == "cuda":
            return "cuda"
        return "process" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    if (clock == "cuda") != (device.type == "cuda"):
        raise ParameterError(f"clock '{clock}' cannot time device '{device}'; use 'auto'")
    return clock


def interleave(
    calls: Mapping[str, Call],
    *,
    device: torch.device | str = "cpu",
    warm: int = 10,
    rounds: int = 40,
    clock: str = "auto",
    on_round: Callable[[], Any] | None = None,
) -> dict[str, Timing]:
    """Times several callables in turns.

    Args:
        calls: the contestants by name; each call does the whole work once.
        device: where they run; a GPU is synchronised and its cache flushed before every sample.
        warm: untimed calls of each, at least one.
        rounds: timed rounds, at least two.
        clock: one of `CLOCKS`.
        on_round: called after every round, for a progress bar.

    Returns:
        One `Timing` per contestant, all with the same number of samples.

    Raises:
        ParameterError: nothing to time, or too few rounds.
    """
    if not calls or rounds < 2:
        raise ParameterError(f"timing needs a contestant and two rounds, got {len(calls)} and {rounds}")
    where = torch.device(device)
    sampler = _sampler(resolve_clock(clock, where), where)
    for call in calls.values():
        for _ in range(max(warm, 1)):
            call()
    repeats = {name: sampler.repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            for name in list(calls) if index % 2 == 0 else reversed(list(calls)):
                samples[name].append(sampler.sample(calls[name], repeats[name]))
            if on_round is not None:
                on_round()
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(name, tuple(samples[name]), sampler.clock, sampler.launch_bound(call))
        for name, call in calls.items()
    }


def with_batch_decay(run: Callable[[int], Any], batch_size: int, retry: bool = True) -> tuple[Any, int, list[int]]:
    """Calls `run(batch_size)`, halving the batch each time it runs out of memory.

    Args:
        run: what to try.
        batch_size: first batch size.
        retry: False gives up at once, as timm's `--no-retry`.

    Returns:
        The result, the batch size that worked and those that did not.

    Raises:
        torch.OutOfMemoryError: a batch of one does not fit either.
    """
    failed: list[int] = []
    while True:
        try:
            return run(batch_size), batch_size, failed
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_oom(error) or not retry or batch_size == 1:
                raise
        # Outside the except block: the traceback there keeps the failed batch's tensors alive.
        failed.append(batch_size)
        batch_size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_oom(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or in the CPU allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "not enough memory", "can't allocate memory")
    )


class _Sampler:
    """Times calls on the host's clock; short calls are repeated until the clock's grain does not matter."""

    def __init__(self, clock: str, now: Callable[[], float]) -> None:
        self.clock = clock
        self.now = now

    def repeats(self, call: Call) -> int:
        seconds = max(self.sample(call, 1), 1e-9)
        return min(max(round(MIN_SAMPLE_S / seconds), 1), MAX_CALLS)

    def sample(self, call: Call, repeats: int) -> float:
        start = self.now()
        for _ in range(repeats):
            call()
        return (self.now() - start) / repeats

    def launch_bound(self, call: Call) -> bool | None:
        return None


class _CudaSampler(_Sampler):
    """Times calls with device events, on a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        super().__init__("cuda", time.perf_counter)
        self.device = device
        self._cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)

    def repeats(self, call: Call) -> int:
        return 1

    def sample(self, call: Call, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cache.zero_()
        start.record(torch.cuda.current_stream(self.device))
        call()
        end.record(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3

    def launch_bound(self, call: Call) -> bool | None:
        torch.cuda.synchronize(self.device)
        start = self.now()
        call()
        queued = self.now() - start
        torch.cuda.synchronize(self.device)
        return queued > LAUNCH_BOUND_SHARE * (self.now() - start)


def _sampler(clock: str, device: torch.device) -> _Sampler:
    if clock == "cuda":
        return _CudaSampler(device)
    if device.type == "cpu":
        return _Sampler(clock, time.process_time if clock == "process" else time.perf_counter)
    return _Sampler(clock, _synchronised_wall(device))


def _synchronised_wall(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now
