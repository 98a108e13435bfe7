"""Interleaved timing on a clock that the test drives: no assertion hangs on real time."""

from __future__ import annotations

import pytest
import torch

from visiontok.bench import timing
from visiontok.bench.timing import Timing, efficiency, interleave, is_oom, speedup, with_batch_decay
from visiontok.errors import ParameterError


def steady(name: str, seconds: float, spread: float = 0.0, clock: str = "wall") -> Timing:
    return Timing(name, tuple(seconds * (1 + spread * (index % 5 - 2)) for index in range(40)), clock)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"s": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now["s"])
    return now


def test_rounds_alternate_and_every_contestant_gets_each(fake_clock: dict[str, float]) -> None:
    order: list[str] = []

    def contestant(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            fake_clock["s"] += seconds

        return call

    times = interleave({"a": contestant("a", 0.5), "b": contestant("b", 0.25)}, warm=1, rounds=4, clock="wall")
    assert order[4:12] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert times["a"].samples == (0.5,) * 4
    assert times["b"].p50 == 0.25
    assert times["a"].launch_bound is None


def test_short_calls_are_repeated(fake_clock: dict[str, float]) -> None:
    def call() -> None:
        fake_clock["s"] += 1e-4

    times = interleave({"a": call}, warm=1, rounds=2, clock="wall")
    assert times["a"].p50 == pytest.approx(1e-4)


def test_speedup_is_printed_where_intervals_part() -> None:
    ratio = speedup(steady("base", 2.0, 0.01), steady("fast", 1.0, 0.01))
    assert ratio.value == pytest.approx(2.0)
    assert ratio.low <= 2.0 <= ratio.high
    assert ratio.clear
    assert str(ratio).startswith("2.00x [")


def test_no_speedup_where_intervals_overlap() -> None:
    ratio = speedup(steady("base", 1.02, 0.05), steady("fast", 1.0, 0.05))
    assert ratio.value > 1
    assert not ratio.clear
    assert str(ratio) == "="


def test_slow_down_is_told_too() -> None:
    ratio = speedup(steady("base", 1.0), steady("slow", 2.0))
    assert ratio.clear
    assert ratio.value == 0.5


def test_interval_is_reproducible() -> None:
    pair = steady("base", 2.0, 0.1), steady("fast", 1.0, 0.07)
    assert speedup(*pair) == speedup(*pair)


def test_only_one_run_can_be_compared() -> None:
    with pytest.raises(ParameterError, match="were not timed together"):
        speedup(steady("a", 1.0), steady("b", 1.0, clock="process"))


def test_three_efficiencies_multiply() -> None:
    split = efficiency(2.0, steady("base", 1.8), steady("reduced", 1.2), steady("oracle", 1.0))
    assert split.total == pytest.approx(0.75)
    assert split.hardware == pytest.approx(0.9)
    assert split.method == pytest.approx(1.0 / 1.2)
    assert split.hardware * split.method == pytest.approx(split.total)
    assert efficiency(2.0, steady("base", 1.8), steady("reduced", 1.2)).method is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"calls": {}}, "needs a contestant"),
        ({"calls": {"a": lambda: None}, "rounds": 1}, "two rounds"),
        ({"calls": {"a": lambda: None}, "clock": "sundial"}, "unknown clock 'sundial'"),
        ({"calls": {"a": lambda: None}, "clock": "cuda"}, "cannot time device 'cpu'"),
    ],
)
def test_wrong_use(arguments: dict, text: str) -> None:
    with pytest.raises(ParameterError, match=text):
        interleave(**arguments)


def test_automatic_clock_counts_cpu_time_with_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert timing.resolve_clock("auto", torch.device("cpu")) == "process"
        torch.set_num_threads(2)
        assert timing.resolve_clock("auto", torch.device("cpu")) == "wall"
    finally:
        torch.set_num_threads(before)


def test_batch_is_halved_until_it_fits() -> None:
    def run(batch_size: int) -> str:
        if batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return f"ran {batch_size}"

    assert with_batch_decay(run, 32) == ("ran 8", 8, [32, 16])


@pytest.mark.parametrize(("retry", "size"), [(False, 32), (True, 1)])
def test_decay_ends(retry: bool, size: int) -> None:
    def run(batch_size: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        with_batch_decay(run, size, retry)


def test_other_errors_are_not_memory() -> None:
    def run(batch_size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        with_batch_decay(run, 32)
    assert is_oom(MemoryError())
    assert is_oom(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_oom(ValueError("out of memory"))
