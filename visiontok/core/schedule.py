"""Budgets: how many tokens each point removes. int | float | list | (r, inflection) | keep | GMACs | final tokens."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visiontok.errors import FormatError, ParameterError

__all__ = ["Budget", "check", "even", "parse_budget", "parse_keep", "parse_r", "quarters", "resolve", "split"]

# Far beyond any model; beyond them floats and memory would fail with errors that name no parameter.
_MOST = 2**40
_LAYERS = 65_536


@dataclass(frozen=True)
class Budget:
    """How many tokens one point removes, for any number of tokens.

    Attributes:
        r: Tokens to remove, if the budget is absolute.
        ratio: Share of tokens to keep, in (0, 1], if relative.
        count: Tokens to keep, if the result is fixed.
    """

    r: int = 0
    ratio: float | None = None
    count: int | None = None

    def removed(self, n: int) -> int:
        """Tokens to remove out of n non-prefix tokens, before the reducer's own limit."""
        if self.ratio is not None:
            # In double precision, as PiToMe computes it: floor(T - T * ratio).
            return math.floor(n - n * self.ratio)
        if self.count is not None:
            return max(n - self.count, 0)
        return self.r

    @property
    def idle(self) -> bool:
        """True if nothing is removed whatever n is."""
        return self.count is None and (self.ratio == 1.0 if self.ratio is not None else self.r <= 0)

    def __str__(self) -> str:
        if self.ratio is not None:
            return f"keep {self.ratio:g}"
        return f"r={self.r}" if self.count is None else f"keep {self.count}"


def parse_r(r: Any, points: int, compat: str | None = None) -> list[int]:
    """Turns `r` into tokens to remove at each point; ToMe's rules (arXiv:2210.09461), bit for bit.

    Args:
        r: int or float (constant), `(r, inflection)` with inflection in [-1, 1] (-1 decreasing from 2r to 0, 0
            constant, 1 increasing), a list (padded with 0), or `{point: r}`.
        points: Number of points.
        compat: `"official"` returns longer lists as they are instead of refusing them.

    Raises:
        ParameterError: Wrong type, negative value, or a list longer than the model.
    """
    if isinstance(r, Mapping):
        return [_tokens(r.get(i, 0), "r") for i in _sparse(r, points, "r")]
    if isinstance(r, tuple) and len(r) == 2 and _is_number(r[0]) and _is_number(r[1]):
        return _inflected(r[0], r[1], points)
    if isinstance(r, Sequence) and not isinstance(r, (str, tuple)):
        values = [_tokens(value, "r") for value in r]
        _fits(len(values), points, "r", compat)
        return values + [0] * (points - len(values))
    if isinstance(r, bool) or not isinstance(r, (int, float)):
        raise ParameterError(f"r must be an int, a float, (r, inflection), a list or a dict, got {r!r}.")
    return _inflected(r, 0.0, points)


def _inflected(r: float, inflection: float, points: int) -> list[int]:
    if not 0 <= r <= _MOST:
        raise ParameterError(f"r must be at least 0 (tokens removed per point) and at most {_MOST}, got {r!r}.")
    if not -1 <= inflection <= 1:
        raise ParameterError(f"the inflection of r must be in [-1, 1], got {inflection!r}.")
    low = int(r * (1.0 - inflection))
    high = 2 * r - low
    step = (high - low) / (points - 1) if points > 1 else 0.0
    return [int(low + step * i) for i in range(points)]


def parse_keep(keep: Any, points: int) -> list[Budget]:
    """Turns `keep` into a budget per point.

    Args:
        keep: float in (0, 1] (share kept at every point), int >= 1 (tokens kept), a list of these (padded with 1.0),
            or `{point: keep}`.
        points: Number of points.

    Raises:
        ParameterError: Wrong type, a float outside (0, 1], an int below 1, or a list longer than the model.
    """
    if isinstance(keep, Mapping):
        return [_kept(keep.get(i, 1.0)) for i in _sparse(keep, points, "keep")]
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        values = [_kept(value) for value in keep]
        _fits(len(values), points, "keep", None)
        return values + [Budget()] * (points - len(values))
    return [_kept(keep)] * points


def even(total: int, points: int) -> list[int]:
    """Splits `total` removals over the points as evenly as integers allow."""
    return [total * (i + 1) // points - total * i // points for i in range(points)]


def quarters(depth: int) -> tuple[int, ...]:
    """Blocks at a quarter, a half and three quarters of a model; (3, 6, 9) for 12 blocks, fewer where they coincide."""
    return tuple(sorted({depth * i // 4 for i in (1, 2, 3)}))


def split(total: int, points: int, items: int, spacing: str = "even") -> list[int]:
    """Splits `total` removals over the points.

    Args:
        total: Tokens to remove in all, less than `items`.
        points: Number of points.
        items: Tokens at the first point.
        spacing: `even` (the same number everywhere), `ratio` (the same share everywhere) or `linear` (falling to zero).

    Raises:
        ParameterError: Unknown spacing.
    """
    if spacing == "even":
        return even(total, points)
    if spacing == "ratio":
        share = ((items - total) / items) ** (1 / points)
        left = [round(items * share**i) for i in range(points)] + [items - total]
    elif spacing == "linear":
        whole = points * (points + 1) // 2
        done = [sum(range(points, points - i, -1)) for i in range(points + 1)]
        left = [items - total * part // whole for part in done]
    else:
        raise ParameterError(f"spacing must be 'even', 'ratio' or 'linear', got {spacing!r}.")
    return [a - b for a, b in zip(left, left[1:])]


def resolve(r: Any, keep: Any, layers: Sequence[int], compat: str | None = None) -> tuple[Budget, ...]:
    """Budgets of all points from `r` or `keep`; at most one may be given.

    Args:
        r: See `parse_r`.
        keep: See `parse_keep`.
        layers: Layer number of each point; dictionaries are keyed by layer.
        compat: See `parse_r`.
    """
    if r is not None and keep is not None:
        raise ParameterError(f"give r or keep, not both (r={r!r}, keep={keep!r}).")
    points = len(layers)
    if isinstance(r, Mapping):
        r = _placed(r, layers, "r")
    if isinstance(keep, Mapping):
        keep = _placed(keep, layers, "keep")
    if keep is not None:
        return tuple(parse_keep(keep, points))
    return tuple(Budget(r=value) for value in parse_r(0 if r is None else r, points, compat)[:points])


def check(r: Any, keep: Any) -> None:
    """Raises ParameterError if `r` or `keep` would be refused by a model of any depth."""
    given = keep if keep is not None else r
    if isinstance(given, Mapping):
        highest = max((key for key in given if isinstance(key, int)), default=0)
        if highest >= _LAYERS:
            raise ParameterError(f"a budget names layer {highest}; no model has more than {_LAYERS} layers.")
        points = 1 + highest
    else:
        points = len(given) if isinstance(given, (list, tuple)) else 1
    resolve(r, keep, range(max(points, 1)))


def parse_budget(text: str) -> Any:
    """Reads a budget written as text: `13`, `0.7`, `(16, -1.0)`, `[10, 0, 7]`, `{3: 20, 6: 10}`.

    Raises:
        FormatError: The text is none of these.
    """
    if len(text) > 4096:
        raise FormatError(f"a budget has at most 4096 characters, got {len(text)}.")
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise FormatError(f"cannot read budget {text!r}; write 13, 0.7, (16, -1.0), [10, 0, 7] or {{3: 20}}.") from None
    values = value.items() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    flat = [part for item in values for part in (item if isinstance(value, dict) else [item])]
    if not all(_is_number(part) for part in flat):
        raise FormatError(f"a budget holds numbers only, got {text!r}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tokens(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ParameterError(f"entries of {name} must be ints >= 0 (tokens removed), got {value!r}.")
    return value


def _kept(value: Any) -> Budget:
    if isinstance(value, float):
        if 0 < value <= 1:
            return Budget(ratio=value)
        raise ParameterError(f"a float keep must be in (0, 1] (share of tokens kept), got {value!r}.")
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= 1:
            return Budget(count=value)
        raise ParameterError(f"an int keep must be at least 1 (tokens kept), got {value!r}.")
    raise ParameterError(f"keep must be a float in (0, 1], an int >= 1, a list or a dict of these, got {value!r}.")


def _fits(given: int, points: int, name: str, compat: str | None) -> None:
    if given > points and compat != "official":
        raise ParameterError(f"{name} has {given} entries but the model has {points} points; give at most {points}.")


def _sparse(values: Mapping[Any, Any], points: int, name: str) -> range:
    wrong = [key for key in values if not isinstance(key, int) or isinstance(key, bool) or not 0 <= key < points]
    if wrong:
        raise ParameterError(f"{name} names layers {wrong}, which are no points of this model (0 … {points - 1}).")
    return range(points)


def _placed(values: Mapping[Any, Any], layers: Sequence[int], name: str) -> dict[int, Any]:
    place = {layer: i for i, layer in enumerate(layers)}
    wrong = [key for key in values if isinstance(key, bool) or key not in place]
    if wrong:
        known = f"{layers[0]} … {layers[-1]}" if layers else "none"
        raise ParameterError(f"{name} names layers {wrong}, which are no points of this model ({known}).")
    return {place[key]: value for key, value in values.items()}
