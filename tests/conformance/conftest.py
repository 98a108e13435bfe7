"""Parametrises every test that takes `case` with the matrix; `-m full` selects what the default run leaves out."""

from __future__ import annotations

import pytest
from conformance_matrix import cases


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: the rest of the matrix; run everything with -m 'full or not full'")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = pytest.mark.full
        metafunc.parametrize(
            "case", [pytest.param(c, id=str(c), marks=() if default else full) for c, default in cases()]
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full" in (config.getoption("markexpr") or ""):
        return
    left = [item for item in items if item.get_closest_marker("full")]
    if left:
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)
