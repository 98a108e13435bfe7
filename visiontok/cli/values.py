"""What stands behind a flag, turned from text into a value."""

from __future__ import annotations

import argparse
import ast
import math
from typing import Any

from visiontok.errors import ParameterError

__all__ = ["literal", "natural", "positive", "setting"]

_MAX_LITERAL = 4096
_WORDS = {"true": True, "false": False, "none": None}


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def natural(text: str) -> int:
    """An int of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return value


def setting(text: str) -> tuple[str, Any]:
    """`name=value` of `--set`: a Python literal, true, false, none, or else plain text.

    Raises:
        argparse.ArgumentTypeError: no `=`, no name, a value that is too long or no finite number.
    """
    name, equals, raw = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected name=value, got {text!r}")
    try:
        return name, literal(raw.strip())
    except ParameterError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def literal(raw: str) -> Any:
    """Reads a value that a user typed: a Python literal without code, a word, or the text itself.

    Raises:
        ParameterError: too long, nested too deeply, or a number that is not finite.
    """
    if len(raw) > _MAX_LITERAL:
        raise ParameterError(f"a value has at most {_MAX_LITERAL} characters, got {len(raw)}")
    if raw.lower() in _WORDS:
        return _WORDS[raw.lower()]
    try:
        value = ast.literal_eval(raw)
    except (ValueError, SyntaxError, TypeError):
        return raw
    except (MemoryError, RecursionError):
        raise ParameterError("a value is nested too deeply") from None
    _check_plain(value, raw)
    return value


def _check_plain(value: Any, raw: str) -> None:
    if isinstance(value, dict):
        parts: list[Any] = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return
    else:
        raise ParameterError(f"{raw!r} is no plain finite value")
    for part in parts:
        _check_plain(part, raw)
