"""Signals: computed only when read, once, in at least fp32."""

from __future__ import annotations

import copy

import pytest
import torch

import visiontok as vt
from visiontok.core.signals import Signal, Signals, Site
from visiontok.errors import IncompatibleError, UnknownNameError


def counting() -> tuple[Signals, list[str]]:
    read: list[str] = []

    def offer(name: str, value: object) -> object:
        read.append(name)
        return value

    offered = {
        "KEY": lambda: offer("KEY", torch.ones(1, 2, 3, 4, dtype=torch.float16)),
        "GRID": lambda: offer("GRID", (2, 3)),
        "QUERY": lambda: offer("QUERY", None),
    }
    return Signals(offered), read


def test_nothing_is_computed_before_it_is_read() -> None:
    signals, read = counting()
    assert "KEY" in signals
    assert Signal.KEY in signals
    assert "VALUE" not in signals
    assert read == []


def test_a_signal_is_computed_once() -> None:
    signals, read = counting()
    first = signals.KEY
    assert signals.KEY is first
    assert signals.get("KEY") is first
    assert signals.GRID == (2, 3)
    # None is a value too, not a reason to ask again.
    assert signals.QUERY is None
    assert signals.QUERY is None
    assert read == ["KEY", "GRID", "QUERY"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_floats_are_widened_and_integers_left_alone(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    value = torch.ones(1, 2, 3).to(dtype)
    assert Signals.of(HIDDEN=value).HIDDEN.dtype == wide
    assert Signals({"HIDDEN": lambda: value}).HIDDEN.dtype == wide


def test_missing_signal_names_what_is_offered() -> None:
    signals, read = counting()
    with pytest.raises(IncompatibleError, match=r"signal ATTN is not offered here \(offered: GRID, KEY, QUERY\)"):
        _ = signals.ATTN
    with pytest.raises(IncompatibleError, match="offered: none"):
        _ = Signals({}).KEY
    assert read == []


def test_unknown_name_by_hand_is_refused_with_a_hint() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown signal 'KEYS'\. Did you mean|Known: HIDDEN"):
        vt.Signals.of(KEYS=torch.ones(1))


def test_private_names_are_ordinary_attribute_errors() -> None:
    assert not hasattr(Signals({}), "_missing")
    assert copy.copy(Signals.of(GRID=(1, 2))).GRID == (1, 2)


def test_a_reducer_reads_only_what_it_needs() -> None:
    key = torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(0))

    def forbidden() -> object:
        raise AssertionError("a signal that ToMe does not need was computed")

    names = {signal.value for signal in Signal} - {"KEY"}
    signals = Signals({"KEY": lambda: key, **dict.fromkeys(names, forbidden)})
    assert vt.reducers.ToMe(r=2).decide(signals, vt.TokenState.initial(torch.zeros(1, 9, 8))) is not None


def test_names_print_as_themselves() -> None:
    assert [str(Site.MID), str(Signal.KEY), f"{Site.PRE}"] == ["MID", "KEY", "PRE"]
