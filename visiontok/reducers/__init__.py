"""One file per method. `create` builds one by name; classes are attributes: `visiontok.reducers.ToMe(r=13)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from visiontok.core.reducer import Reducer
from visiontok.registry import Registry

__all__ = ["create", "registry"]

registry: Registry[Reducer] = Registry("reducer", "visiontok.reducers", "visiontok.reducers")


def create(name: str, **params: Any) -> Reducer:
    """Builds a reducer by its registered name.

    Args:
        name: See `visiontok.list_reducers`.
        **params: Its fields. A field that holds another reducer takes a name, `(name, {params})`, its saved form
            `{"name": ..., "fields": {...}}` or a Reducer.

    Raises:
        UnknownNameError: No such reducer or parameter; the message offers the closest name.
        ParameterError: A value is outside its range.
    """
    cls = registry.get(name)
    holders = {field.name for field in dataclasses.fields(cls) if "Reducer" in str(field.type)}
    return cls.create(**{key: _nested(value) if key in holders else value for key, value in params.items()})


def _nested(value: Any) -> Any:
    if isinstance(value, str):
        return create(value)
    if isinstance(value, Mapping) and set(value) == {"name", "fields"}:
        return create(value["name"], **value["fields"])
    if isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], Mapping):
        return create(value[0], **value[1])
    return value


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        cls = registry.by_class_name(name)
        if cls is not None:
            return cls
    raise AttributeError(f"module 'visiontok.reducers' has no attribute {name!r}")
