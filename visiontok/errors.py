"""Errors raised by visiontok.

Every error is a `VisionTokError` and also the built-in kind that a caller would expect, so that `except ValueError`
written before visiontok was known keeps working. Messages name the argument, the value and what would be accepted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AlreadyPatchedError",
    "FormatError",
    "IncompatibleError",
    "MissingDependencyError",
    "NotPatchedError",
    "NothingPatchedError",
    "ParameterError",
    "StateLostError",
    "UnknownNameError",
    "VisionTokError",
    "did_you_mean",
]


class VisionTokError(Exception):
    """Base of every error that visiontok raises on purpose."""


class ParameterError(VisionTokError, ValueError):
    """An argument has a wrong type or a value outside what is accepted."""


class UnknownNameError(VisionTokError, ValueError):
    """A reducer, backbone, preset or parameter of that name does not exist."""


class IncompatibleError(VisionTokError, ValueError):
    """The reducer cannot work on this model; the message names what is missing."""


class NothingPatchedError(VisionTokError, ValueError):
    """No part of the model was recognised, so nothing was changed."""


class AlreadyPatchedError(VisionTokError, RuntimeError):
    """The model is patched already."""


class NotPatchedError(VisionTokError, RuntimeError):
    """The model (or this reduction) is not patched."""


class StateLostError(VisionTokError, RuntimeError):
    """The token state that travels with the hidden tensor did not reach the next block."""


class FormatError(VisionTokError, ValueError):
    """A configuration, recipe or file does not follow its schema."""


class MissingDependencyError(VisionTokError, ImportError):
    """An optional library is needed for this; the message says which extra installs it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name).lower(), sorted(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
