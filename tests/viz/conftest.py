"""Result rows that no machine measured, in the schema of `visiontok.bench`, for plots and reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Row = dict[str, Any]


@pytest.fixture(scope="session")
def row() -> Callable[..., Row]:
    """Makes one valid row of a timed and evaluated trial, with the given values put over it."""
    return make_row


@pytest.fixture
def sweep() -> list[Row]:
    """The rows of a sweep as the command line makes it."""
    return make_sweep()


@pytest.fixture(scope="session")
def new_sweep() -> Callable[[], list[Row]]:
    """Makes the rows of a sweep, for fixtures of wider scope."""
    return make_sweep


def make_row(**values: Any) -> Row:
    """One valid row of a timed and evaluated trial, with `values` put over it."""
    defaults = {
        "schema_version": 1,
        "trial_key": "0" * 64,
        "status": "ok",
        "role": "reduced",
        "model": "tiny_vit",
        "reference": "tiny_vit",
        "reducer": "tome",
        "params": {"r": 4},
        "budget": "r=4",
        "tokens_in": 65,
        "tokens_out": 17,
        "gmacs_base": 0.0364,
        "gmacs": 0.0232,
        "ideal_speedup": 1.57,
        "top1": 97.0,
        "top1_low": 95.1,
        "top1_high": 98.2,
        "delta": -0.4,
        "mcnemar_p": 0.62,
        "n_images": 500,
        "n_failed": 0,
        "latency_ms_p20": 20.1,
        "latency_ms_p50": 20.6,
        "latency_ms_p80": 21.4,
        "images_per_s": 1553.0,
        "speedup": 1.31,
        "speedup_low": 1.27,
        "speedup_high": 1.35,
        "speedup_clear": True,
        "speedup_oracle": 1.42,
        "e_total": 0.83,
        "e_hw": 0.9,
        "e_method": 0.92,
        "clock": "process",
        "rounds": 40,
        "batch_size": 32,
        "seed": 42,
        "spec": {},
    }
    return {**defaults, **values}


def make_sweep() -> list[Row]:
    """A sweep as the command line makes it: three reducers, both dense models, a failure and an unclear speed-up."""
    rows = [
        make_row(role="unreduced", reducer=None, budget="", gmacs=0.0364, ideal_speedup=1.0, top1=97.4, top1_low=95.6,
            top1_high=98.5, delta=None, mcnemar_p=None, tokens_out=65, speedup=None, speedup_low=None,
            speedup_high=None, speedup_clear=None, speedup_oracle=None, e_total=None, e_hw=None, e_method=None),
        make_row(role="smaller", reducer=None, budget="", model="tiny_vit_small_dense", gmacs=0.0182, ideal_speedup=2.0,
            top1=96.0, top1_low=93.9, top1_high=97.4, delta=-1.4, tokens_out=65, speedup=1.93, speedup_low=1.88,
            speedup_high=1.99, e_hw=None, e_method=None, speedup_oracle=None),
    ]  # fmt: skip
    accuracy = {
        "tome": (97.2, 97.0, 95.8, 93.0),
        "pitome": (97.4, 97.0, 96.2, 94.4),
        "random": (96.0, 93.2, 87.0, 71.4),
    }
    for reducer, values in accuracy.items():
        for index, top1 in enumerate(values):
            r, speed = 2 * index + 1, 1.02 + 0.17 * index
            measured = {
                "top1": top1, "top1_low": top1 - 2, "top1_high": top1 + 1.4, "delta": top1 - 97.4,
                "mcnemar_p": 0.8 / 8**index, "gmacs": 0.0334 - 0.0052 * index, "tokens_out": 65 - 6 * r,
                "speedup": speed, "speedup_low": speed - 0.04, "speedup_high": speed + 0.05, "speedup_clear": index > 0,
                "ideal_speedup": 1.09 + 0.24 * index, "e_total": 0.9 - 0.03 * index,
            }  # fmt: skip
            rows.append(make_row(reducer=reducer, budget=f"r={r}", params={"r": r}, **measured))
    failed = ("top1", "gmacs", "speedup", "latency_ms_p50", "e_total", "tokens_out", "delta", "speedup_clear")
    rows.append(make_row(reducer="tofu", budget="r=9", status="error", error="IncompatibleError: needs KEY",
                    **dict.fromkeys(failed)))  # fmt: skip
    return rows
