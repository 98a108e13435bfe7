"""What every kernel test needs before it replaces functions of torch."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def known_constructors() -> None:
    """Lets torch list its own constructors first.

    It does so once per process, at the first device context or compilation. Made while a test has `torch.empty`
    replaced, the list lacks the real one for good, and `torch.device("meta")` then allocates in every later test.
    """
    with torch.device("cpu"):
        torch.empty(0)
