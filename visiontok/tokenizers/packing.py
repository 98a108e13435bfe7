"""Ids as a string of bits of fixed width: token i lies at bit i * bits, lowest bit first."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visiontok.errors import ParameterError

__all__ = ["MAX_BITS", "bits_for", "pack", "packed_size", "unpack"]

MAX_BITS = 24


def bits_for(codebook_size: int) -> int:
    """Bits that hold every id below `codebook_size`.

    Raises:
        ParameterError: No ids at all, or more than 24 bits hold.
    """
    bits = max(1, (codebook_size - 1).bit_length())
    if codebook_size < 1 or bits > MAX_BITS:
        raise ParameterError(f"codebook_size must be 1 to {1 << MAX_BITS}, got {codebook_size}.")
    return bits


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` ids take."""
    return (count * bits + 7) // 8


def pack(ids: ArrayLike, bits: int) -> bytes:
    """Packs ids; the last byte is filled up with zeros.

    Args:
        ids: `(k,)` integers in [0, 2 ** bits).
        bits: 1 to 24. With 12, two ids take three bytes.

    Raises:
        ParameterError: Not a row of integers, an id that does not fit, or a width out of range.
    """
    _check_bits(bits)
    values = np.asarray(ids)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ParameterError(f"ids must be a row of integers, got {values.dtype} of shape {values.shape}.")
    if values.size and not (int(values.min()) >= 0 and int(values.max()) < 1 << bits):
        raise ParameterError(f"ids must be in [0, {1 << bits}), got {values.min()} to {values.max()}.")
    if bits == 16:
        return values.astype("<u2").tobytes()
    tokens, size = _group(bits)
    columns = np.zeros((-(-len(values) // tokens), tokens), np.uint32)
    columns.reshape(-1)[: len(values)] = values
    packed = np.zeros((len(columns), size), np.uint8)
    for token, byte, shift in _overlaps(bits):
        column = columns[:, token]
        packed[:, byte] |= (column >> shift if shift >= 0 else column << -shift).astype(np.uint8)
    return packed.tobytes()[: packed_size(len(values), bits)]


def unpack(data: bytes, bits: int, count: int) -> NDArray[np.int64]:
    """Ids of packed bytes; of data that was cut off, those that are there whole.

    Args:
        data: What `pack` gave, or the beginning of it.
        bits: As in `pack`.
        count: Most ids to read.

    Returns:
        `(min(count, ids in data),)`.

    Raises:
        ParameterError: A width out of range or a negative count.
    """
    _check_bits(bits)
    if count < 0:
        raise ParameterError(f"count must be at least 0, got {count}.")
    count = min(count, len(data) * 8 // bits)
    data = data[: packed_size(count, bits)]
    if bits == 16:
        return np.frombuffer(data, "<u2").astype(np.int64)
    tokens, size = _group(bits)
    packed = np.zeros((-(-count // tokens), size), np.uint8)
    packed.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
    columns = np.zeros((len(packed), tokens), np.uint32)
    for token, byte, shift in _overlaps(bits):
        part = packed[:, byte].astype(np.uint32)
        columns[:, token] |= part << shift if shift >= 0 else part >> -shift
    columns &= (1 << bits) - 1
    return columns.reshape(-1)[:count].astype(np.int64)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ParameterError(f"bits must be 1 to {MAX_BITS}, got {bits}.")


def _group(bits: int) -> tuple[int, int]:
    """The shortest run of tokens that fills whole bytes: how many tokens, how many bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """(token, byte, first bit of the byte within the token) for all that share a bit within a group."""
    tokens, _ = _group(bits)
    spans = [(token, token * bits) for token in range(tokens)]
    return [
        (token, byte, byte * 8 - start)
        for token, start in spans
        for byte in range(start // 8, (start + bits - 1) // 8 + 1)
    ]
