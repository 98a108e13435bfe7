"""Parametrises every test that takes `case` with the matrix; `-m full` selects what the default run leaves out."""

from __future__ import annotations

import pytest
from conformance_matrix import cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = pytest.mark.full
        metafunc.parametrize(
            "case", [pytest.param(c, id=str(c), marks=() if default else full) for c, default in cases()]
        )
