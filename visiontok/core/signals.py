"""What a reducer may ask for. Signals are computed only when read, once, in at least fp32 with autocast off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from torch import Tensor

from visiontok.errors import IncompatibleError, UnknownNameError, did_you_mean
from visiontok.ops.attention import Votes
from visiontok.ops.constants import wide_dtype
from visiontok.ops.probing import prefix_rows

__all__ = ["ATTENTION", "Offers", "Signal", "Signals", "Site", "attention_offers"]

Offers = Mapping[str, Callable[[], Any]]


class Site(str, Enum):
    """Where a reduction happens."""

    MID = "MID"
    PRE = "PRE"
    AROUND = "AROUND"
    KEYS = "KEYS"
    POST = "POST"
    EMBED = "EMBED"
    LLM = "LLM"
    KV = "KV"
    SCAN = "SCAN"
    HEAD = "HEAD"

    def __str__(self) -> str:
        return self.value


class Signal(str, Enum):
    """What a decision may need.

    HIDDEN (B, N, C); QUERY, KEY, VALUE (B, H, N, d) after q/k-norm and positions; ATTN_PREFIX (B, H, P, N) softmax rows
    of the prefix queries; ATTN_VOTE an `ops.attention.Votes`; ATTN (B, H, N, N) the full map; GRID (h, w); MODULE the
    learned part of the point, offered to reducers that have one. The others belong to backbones of later families and
    are listed in ARCHITECTURE §3.
    """

    HIDDEN = "HIDDEN"
    QUERY = "QUERY"
    KEY = "KEY"
    VALUE = "VALUE"
    QUERY_PREFIX = "QUERY_PREFIX"
    ATTN_PREFIX = "ATTN_PREFIX"
    ATTN_LAST = "ATTN_LAST"
    ATTN_TEXT = "ATTN_TEXT"
    ATTN_VOTE = "ATTN_VOTE"
    ATTN_SUM = "ATTN_SUM"
    ATTN = "ATTN"
    TEXT = "TEXT"
    GRID = "GRID"
    CROPS = "CROPS"
    FRAMES = "FRAMES"
    TIMESTEP = "TIMESTEP"
    SSM_OUT = "SSM_OUT"
    SSM_DELTA = "SSM_DELTA"
    RAND = "RAND"
    MODULE = "MODULE"

    def __str__(self) -> str:
        return self.value


_NAMES = tuple(signal.value for signal in Signal)

# What a backbone that can hand over q, k, v has to offer.
ATTENTION = frozenset({Signal.QUERY, Signal.KEY, Signal.VALUE, Signal.ATTN_PREFIX, Signal.ATTN_VOTE, Signal.ATTN})


def attention_offers(
    read: Callable[[], tuple[Tensor, Tensor, Tensor]], scale: float, bias: Tensor | None, prefix: int
) -> Offers:
    """All signals of one attention, from its q, k, v.

    Args:
        read: Returns q, k, v (B, H, N, d) after normalisation and positions; called when a signal is read.
        scale: Factor on the logits.
        bias: (B, 1, 1, N) bias that the attention added, or None.
        prefix: Leading tokens.
    """
    return {
        "QUERY": lambda: read()[0],
        "KEY": lambda: read()[1],
        "VALUE": lambda: read()[2],
        "ATTN_PREFIX": lambda: prefix_rows(read()[0], read()[1], prefix, scale, bias),
        "ATTN_VOTE": lambda: Votes(read()[0], read()[1], scale, bias),
        "ATTN": lambda: Votes(read()[0], read()[1], scale, bias).map,
    }


class Signals:
    """Lazy, read-once signals of one decision: `signals.KEY`.

    Reading a signal that was not offered raises IncompatibleError.
    """

    def __init__(self, offered: Mapping[str, Callable[[], Any]]) -> None:
        # object.__setattr__ and no cached_property: the latter breaks fullgraph on Python 3.11.
        object.__setattr__(self, "_offered", offered)
        object.__setattr__(self, "_values", {})

    @classmethod
    def of(cls, **values: Any) -> Signals:
        """Signals from plain values, for use by hand: `Signals.of(KEY=k, HIDDEN=x, GRID=(h, w))`.

        Raises:
            UnknownNameError: A keyword is not the name of a signal.
        """
        for name in values:
            if name not in _NAMES:
                hint = did_you_mean(name, _NAMES)
                raise UnknownNameError(f"unknown signal {name!r}.{hint} Known: {', '.join(_NAMES)}.")
        signals = cls({})
        signals._values.update({name: _wide(value) for name, value in values.items()})
        return signals

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.get(name)

    def get(self, name: str) -> Any:
        """Returns the signal of that name in at least fp32, computing it on first use."""
        values = self._values
        if name not in values:
            values[name] = _wide(self._offer(name)())
        return values[name]

    def raw(self, name: str) -> Any:
        """Returns the signal of that name in the model's dtype, for kernels that widen in registers."""
        return self._values[name] if name in self._values else self._offer(name)()

    def _offer(self, name: str) -> Callable[[], Any]:
        offered = self._offered
        if name not in offered:
            have = ", ".join(sorted({*offered, *self._values})) or "none"
            raise IncompatibleError(f"signal {name} is not offered here (offered: {have}).")
        return offered[name]

    def __contains__(self, name: str) -> bool:
        return str(name) in self._values or str(name) in self._offered


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        wide = wide_dtype(value.dtype)
        return value if value.dtype == wide else value.to(wide)
    return value
