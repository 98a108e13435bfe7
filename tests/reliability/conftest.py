"""Marker used here too when this folder is run alone."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out by default where the whole suite is collected")
