"""Entropy coding of ids with static tables, one for each place in the row.

Tokens at different places of a row are distributed differently: the first ones carry the image, the last ones often
hardly vary. A range coder (Martin, 1979; the carry-less form) writes forwards, so a stream that was cut off still
gives the tokens before the cut. Ids of a large codebook are split into digits: those of FSQ are its channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visiontok.errors import FormatError, ParameterError
from visiontok.tokenizers.base import Tokenizer

__all__ = ["Tables", "build_tables", "decode", "encode", "load_tables", "radices_of", "save_tables"]

_TOTAL = 1 << 16
_TOP, _BOTTOM = np.uint64(1 << 24), np.uint64(1 << 16)
_MASK = np.uint64(0xFFFFFFFF)
_LARGEST_RADIX = 1 << 14
_KEY = "visiontok_tables"


@dataclass(frozen=True)
class Tables:
    """Frequencies of digits.

    Attributes:
        radices: Sizes of the digits, the fastest first; their product is the size of the codebook.
        counts: `(N, sum(radices))` int64; those of one digit at one place are at least 1 and sum to 65536.
    """

    radices: tuple[int, ...]
    counts: NDArray[np.int64]

    @property
    def length(self) -> int:
        """Places, N."""
        return len(self.counts)

    @property
    def identifier(self) -> str:
        """Eight hexadecimal digits that tell tables apart."""
        digest = hashlib.sha256(json.dumps(self.radices).encode() + self.counts.astype("<i8").tobytes())
        return digest.hexdigest()[:8]

    def bounds(self) -> list[NDArray[np.uint64]]:
        """For every digit, `(N, radix + 1)`: where the share of each symbol begins."""
        parts = np.split(self.counts, np.cumsum(self.radices)[:-1], axis=1)
        return [np.pad(part.cumsum(1), ((0, 0), (1, 0))).astype(np.uint64) for part in parts]


def radices_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Into which digits the ids of a tokenizer are split: the levels of FSQ, else the id itself."""
    levels = tokenizer.config.get("levels")
    return tuple(int(level) for level in levels) if levels else (tokenizer.codebook_size,)


def build_tables(ids: ArrayLike, radices: Sequence[int]) -> Tables:
    """Tables from tokens that were seen; what was not seen stays possible.

    Args:
        ids: `(n, N)` integers below the product of `radices`.
        radices: See `radices_of`.

    Raises:
        ParameterError: No rows, ids out of range, or a digit of more than 16384 symbols.
    """
    rows, radices = np.asarray(ids), tuple(radices)
    wrong = [radix for radix in radices if not 1 <= radix <= _LARGEST_RADIX]
    if wrong or not radices:
        raise ParameterError(f"radices must be 1 to {_LARGEST_RADIX} each, got {radices}.")
    if rows.ndim != 2 or not rows.size:
        raise ParameterError(f"ids must be (n, N) with at least one row, got shape {rows.shape}.")
    _check_ids(rows, radices)
    columns = []
    for digit, radix in zip(_digits(rows, radices), radices):
        seen = np.stack([np.bincount(place, minlength=radix) for place in digit.T])
        columns.append(np.stack([_scaled(place) for place in seen]))
    return Tables(radices, np.concatenate(columns, axis=1))


def encode(ids: ArrayLike, tables: Tables) -> list[bytes]:
    """Codes rows of one length, all at once.

    Args:
        ids: `(n, k)`, k at most the length of the tables.
        tables: As `decode` will get them.

    Raises:
        ParameterError: Longer rows than the tables have places, or ids out of range.
    """
    rows = np.asarray(ids)
    if rows.ndim != 2 or rows.shape[1] > tables.length:
        raise ParameterError(f"ids must be (n, k) with k up to {tables.length}, got shape {rows.shape}.")
    _check_ids(rows, tables.radices)
    digits, bounds = _digits(rows, tables.radices), tables.bounds()
    writer = _Writer(len(rows), rows.shape[1] * len(bounds))
    for place in range(rows.shape[1]):
        for digit, bound in zip(digits, bounds):
            symbol = digit[:, place]
            writer.put(bound[place, symbol], bound[place, symbol + 1])
    return writer.finish()


def decode(streams: Sequence[bytes], count: int, tables: Tables, truncated: bool = False) -> list[NDArray[np.int64]]:
    """Ids of streams; of those that were cut off, the ids that do not depend on what is missing.

    Args:
        streams: What `encode` gave.
        count: Ids per row.
        tables: Those of `encode`.
        truncated: Whether the streams lack their ends.

    Raises:
        ParameterError: More ids than the tables have places.
    """
    if not 0 <= count <= tables.length:
        raise ParameterError(f"count must be 0 to {tables.length} with these tables, got {count}.")
    low = _read(streams, count, tables, 0x00)
    if not truncated:
        return list(low)
    # The symbols are ordered as the streams are, so what the least and the greatest end agree on is certain.
    same = np.cumprod(low == _read(streams, count, tables, 0xFF), axis=1).sum(axis=1)
    return [row[:certain] for row, certain in zip(low, same)]


def save_tables(tables: Tables, path: str | Path) -> None:
    """Writes tables to a `.safetensors` file."""
    from safetensors.numpy import save_file

    counts = (tables.counts - 1).astype(np.uint16)
    save_file({"counts": counts}, str(path), metadata={_KEY: json.dumps(list(tables.radices))})


def load_tables(path: str | Path) -> Tables:
    """Reads tables.

    Raises:
        FormatError: Not a file of tables.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            radices: Any = json.loads((file.metadata() or {})[_KEY])
            counts = file.get_tensor("counts")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FormatError(f"{path} holds no tables for entropy coding: {error!r}") from None
    plain = isinstance(radices, list) and bool(radices) and all(isinstance(x, int) and x > 0 for x in radices)
    if not plain or counts.dtype != np.uint16 or counts.ndim != 2 or counts.shape[1] != sum(radices):
        raise FormatError(f"{path} holds tables of shape {counts.shape} for digits {radices!r}.")
    tables = Tables(tuple(radices), counts.astype(np.int64) + 1)
    if any(not (bound[:, -1] == _TOTAL).all() for bound in tables.bounds()):
        raise FormatError(f"{path} holds tables that do not sum to {_TOTAL}.")
    return tables


def _check_ids(rows: NDArray[Any], radices: tuple[int, ...]) -> None:
    size = int(np.prod(radices))
    if rows.size and not (rows.dtype.kind in "iu" and int(rows.min()) >= 0 and int(rows.max()) < size):
        raise ParameterError(f"ids must be integers in [0, {size}), got {rows.dtype} {rows.min()} to {rows.max()}.")


def _digits(rows: NDArray[Any], radices: tuple[int, ...]) -> list[NDArray[np.int64]]:
    digits, rest = [], rows.astype(np.int64)
    for radix in radices:
        digits.append(rest % radix)
        rest = rest // radix
    return digits


def _scaled(seen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts that sum to 65536, none below 1, nearest to the shares of what was seen plus a half each."""
    share = (seen + 0.5) / (seen.sum() + 0.5 * len(seen))
    counts = 1 + np.floor(share * (_TOTAL - len(seen))).astype(np.int64)
    counts[int(counts.argmax())] += _TOTAL - counts.sum()
    return counts


class _Writer:
    """The state of many coders that go in step."""

    def __init__(self, rows: int, symbols: int) -> None:
        self.low = np.zeros(rows, np.uint64)
        self.range = np.full(rows, _MASK)
        # A symbol costs at most 16 bits, and the carry-less form gives away at most 16 more when it narrows.
        self.bytes = np.zeros((rows, 4 * symbols + 8), np.uint8)
        self.used = np.zeros(rows, np.int64)

    def put(self, start: NDArray[np.uint64], stop: NDArray[np.uint64]) -> None:
        unit = self.range // np.uint64(_TOTAL)
        self.low = (self.low + start * unit) & _MASK
        self.range = (stop - start) * unit
        ready = _settle(self.low, self.range)
        while ready.any():
            self._emit(ready)
            ready = _settle(self.low, self.range)

    def finish(self) -> list[bytes]:
        # A value within [low, low + range) with as many zero bytes at its end as there are: readers fill up with
        # zeros, so those need not be written. After settling, the range is at least 2 ** 16.
        edge = (self.low + _BOTTOM - np.uint64(1)) // _BOTTOM * _BOTTOM
        fits = edge < np.minimum(self.low + self.range, _MASK + np.uint64(1))
        self.low = np.where(fits, edge, self.low)
        everywhere = np.ones(len(self.low), bool)
        for _ in range(4):
            self._emit(everywhere)
        return [row[:used].tobytes().rstrip(b"\0") for row, used in zip(self.bytes, self.used)]

    def _emit(self, ready: NDArray[np.bool_]) -> None:
        rows = np.flatnonzero(ready)
        self.bytes[rows, self.used[rows]] = (self.low[rows] >> np.uint64(24)).astype(np.uint8)
        self.used[rows] += 1
        self.low[rows] = (self.low[rows] << np.uint64(8)) & _MASK
        self.range[rows] = self.range[rows] << np.uint64(8)


def _settle(low: NDArray[np.uint64], width: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which coders have a finished byte; a range too small to go on is cut off at the next boundary, in place."""
    same = (low ^ (low + width)) < _TOP
    small = ~same & (width < _BOTTOM)
    width[small] = (_MASK + np.uint64(1) - low[small]) & (_BOTTOM - np.uint64(1))
    return same | small


def _read(streams: Sequence[bytes], count: int, tables: Tables, fill: int) -> NDArray[np.int64]:
    """`(n, count)` ids; missing bytes read as `fill`."""
    bounds, rows = tables.bounds(), len(streams)
    longest = max(map(len, streams), default=0) + 4
    data = np.full((rows, longest), fill, np.uint64)
    for row, stream in zip(data, streams):
        row[: len(stream)] = np.frombuffer(stream, np.uint8)
    low, width, used = np.zeros(rows, np.uint64), np.full(rows, _MASK), np.full(rows, 4)
    code = (data[:, 0] << np.uint64(24)) | (data[:, 1] << np.uint64(16)) | (data[:, 2] << np.uint64(8)) | data[:, 3]
    ids = np.zeros((rows, count), np.int64)
    for place in range(count):
        scale = 1
        for radix, bound in zip(tables.radices, bounds):
            unit = np.maximum(width // np.uint64(_TOTAL), np.uint64(1))
            target = np.minimum(((code - low) & _MASK) // unit, np.uint64(_TOTAL - 1))
            symbol = np.searchsorted(bound[place], target, side="right") - 1
            ids[:, place] += scale * symbol
            scale *= radix
            low = (low + bound[place, symbol] * unit) & _MASK
            width = (bound[place, symbol + 1] - bound[place, symbol]) * unit
            ready = _settle(low, width)
            while ready.any():
                at = np.flatnonzero(ready)
                # A stream of random bytes may ask for more than there is.
                inside = used[at] < longest
                following = np.where(inside, data[at, np.minimum(used[at], longest - 1)], np.uint64(fill))
                code[at] = ((code[at] << np.uint64(8)) & _MASK) | following
                low[at] = (low[at] << np.uint64(8)) & _MASK
                width[at] = width[at] << np.uint64(8)
                used[at] += 1
                ready = _settle(low, width)
    return ids
