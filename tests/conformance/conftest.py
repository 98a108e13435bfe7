"""Parametrises every test that takes `case` with the matrix; `-m full` selects what the default run leaves out."""

from __future__ import annotations

import pytest
from conformance_matrix import cases, multimodal_cases

# What a variant of a backbone is asked in the default run where it has no case of its own there.
BRIEF = ("test_c1_", "test_c2_counts", "test_c6_", "test_c7_", "test_training")
# What takes long: in the default run one case of each reducer.
SLOW = ("test_c9_", "test_c13_compute", "test_c2_far", "test_c8_", "test_c12_gather")
# What every reducer is asked on the first multimodal model.
TALKED = ("test_counts_are_exact",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        name = metafunc.function.__name__
        levels = ("all", "quick", "brief") if name.startswith(BRIEF) else ("all", "quick")
        levels = ("all",) if name.startswith(SLOW) else levels
        full = pytest.mark.full
        metafunc.parametrize(
            "case", [pytest.param(c, id=str(c), marks=() if level in levels else full) for c, level in cases()]
        )
    if "talk" in metafunc.fixturenames:
        levels = ("all", "brief") if metafunc.function.__name__.startswith(TALKED) else ("all",)
        full = pytest.mark.full
        metafunc.parametrize(
            "talk",
            [pytest.param(c, id=str(c), marks=() if level in levels else full) for c, level in multimodal_cases()],
        )
