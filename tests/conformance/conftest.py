"""Parametrises every test that takes `case` with the matrix; `-m full` selects what the default run leaves out."""

from __future__ import annotations

import pytest
from conformance_matrix import cases

# What a variant of a backbone is asked in the default run where it has no case of its own there.
BRIEF = ("test_c1_", "test_c2_counts", "test_c6_", "test_c7_", "test_training")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        levels = ("all", "brief") if metafunc.function.__name__.startswith(BRIEF) else ("all",)
        full = pytest.mark.full
        metafunc.parametrize(
            "case", [pytest.param(c, id=str(c), marks=() if level in levels else full) for c, level in cases()]
        )
