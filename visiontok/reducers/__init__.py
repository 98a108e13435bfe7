"""One file per method. `create` builds one by name; classes are attributes: `visiontok.reducers.ToMe(r=13)`."""

from __future__ import annotations

from typing import Any

from visiontok.core.reducer import Reducer
from visiontok.registry import Registry

__all__ = ["create", "registry"]

registry: Registry[Reducer] = Registry("reducer", "visiontok.reducers", "visiontok.reducers")


def create(name: str, **params: Any) -> Reducer:
    """Builds a reducer by its registered name.

    Args:
        name: See `visiontok.list_reducers`.
        **params: Its fields.

    Raises:
        UnknownNameError: No such reducer or parameter; the message offers the closest name.
        ParameterError: A value is outside its range.
    """
    return registry.get(name).create(**params)


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        cls = registry.by_class_name(name)
        if cls is not None:
            return cls
    raise AttributeError(f"module 'visiontok.reducers' has no attribute {name!r}")
