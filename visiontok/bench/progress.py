"""Progress bars that stay out of logs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm.auto import tqdm


def bar(total: int, label: str, quiet: bool = False) -> tqdm:
    """A progress bar on standard error; off under `quiet` and where standard error is no terminal."""
    return tqdm(total=total, desc=label, disable=quiet or not sys.stderr.isatty(), leave=False, dynamic_ncols=True)


def tracked(label: str, quiet: bool = False) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Wraps whatever is gone through with a bar."""

    def wrap(items: Iterable[Any]) -> Iterable[Any]:
        return tqdm(items, desc=label, disable=quiet or not sys.stderr.isatty(), leave=False, dynamic_ncols=True)

    return wrap
