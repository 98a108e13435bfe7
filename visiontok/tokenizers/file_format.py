"""`.vtok`: the tokens of one image in a file of a few dozen bytes.

All numbers are little-endian. Fields in brackets are there if their flag is set.

    magic     4   "VTOK"
    version   1   1
    flags     1   1 size, 2 seed, 4 steps, 8 guidance, 16 range coded, 32 checksum
    bits      1   width of a packed id, 1 to 24
    family    1   1 one_d_piece, 2 titok, 3 flextok; 0: followed by a length (1) and that many ASCII characters
    model     4   `Tokenizer.model_id`
    count     2   number of tokens, at least 1
    [size]    4   width and height of the picture that was encoded
    [seed]    4
    [steps]   2
    [guidance] 4  float32
    [tables]  6   identifier of the range coder's tables (4), bytes of the payload (2)
    [checksum] 4  CRC-32 of the payload
    crc       2   CRC-16 (CCITT, initial value 0xFFFF) of all of the above
    payload       ids in order: packed with the lowest bit first, or range coded

The payload ends the file, so a file that was cut off within it is the same image with fewer tokens.
"""

from __future__ import annotations

import binascii
import math
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visiontok.errors import FormatError, IncompatibleError, ParameterError
from visiontok.tokenizers import packing, range_coder
from visiontok.tokenizers.base import Tokenizer

__all__ = ["TokenFile", "check_model", "dumps", "header_size", "loads", "open", "save"]

_MAGIC, _VERSION = b"VTOK", 1
_SIZE, _SEED, _STEPS, _GUIDANCE, _TABLES, _CHECKSUM = 1, 2, 4, 8, 16, 32
_FAMILIES = {1: "one_d_piece", 2: "titok", 3: "flextok"}
_CODES = {name: code for code, name in _FAMILIES.items()}
_LONGEST_NAME, _MOST_TOKENS = 32, 0xFFFF
_LARGEST = 128 + packing.packed_size(_MOST_TOKENS, packing.MAX_BITS)


@dataclass(frozen=True, eq=False)
class TokenFile:
    """What a `.vtok` file holds.

    Attributes:
        ids: `(k,)` int64; fewer than `length` if the file was cut off.
        family: Name of the tokenizer's family.
        model_id: Of the tokenizer that made the ids; `check_model` compares.
        length: Number of tokens that were stored.
        codec: "packed" or "range".
        size: Width and height of the picture that was encoded, or None.
        seed, steps, guidance: Options of `decode` that were recommended, or None.
        truncated: The end of the file is missing.
        damaged: The checksum of the payload does not match.
    """

    ids: Tensor
    family: str
    model_id: str
    length: int
    codec: str
    size: tuple[int, int] | None
    seed: int | None
    steps: int | None
    guidance: float | None
    truncated: bool
    damaged: bool

    def options(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The recommended options that `tokenizer.decode` takes."""
        known = tokenizer.option_names()["decode"]
        hints = {"seed": self.seed, "steps": self.steps, "guidance": self.guidance}
        return {name: value for name, value in hints.items() if value is not None and name in known}


@dataclass(frozen=True)
class _Header:
    bits: int
    family: str
    model_id: str
    count: int
    size: tuple[int, int] | None
    seed: int | None
    steps: int | None
    guidance: float | None
    tables: str | None
    payload: int
    checksum: int | None
    end: int


def save(path: str | os.PathLike[str], ids: Tensor, tokenizer: Tokenizer, **options: Any) -> int:
    """Writes the tokens of one image to a file that appears whole or not at all.

    Args:
        path: The file; an older one is replaced.
        ids: As in `dumps`.
        tokenizer: As in `dumps`.
        **options: Those of `dumps`.

    Returns:
        Size of the file in bytes.

    Raises:
        ParameterError: As `dumps`, or the folder does not exist.
    """
    data, target = dumps(ids, tokenizer, **options), Path(path)
    if not target.parent.is_dir():
        raise ParameterError(f"path must be in a folder that exists, got {target}.")
    write_atomically(target, data)
    return len(data)


def open(
    source: str | os.PathLike[str] | bytes,
    *,
    tables: range_coder.Tables | None = None,
    allow_damaged: bool = False,
) -> TokenFile:
    """Reads a `.vtok` file. One that was cut off behind its header gives the tokens that are there whole.

    Args:
        source: Path, or the bytes themselves.
        tables: Those that a range-coded file was written with.
        allow_damaged: Give the tokens even where the checksum says that they are wrong.

    Raises:
        ParameterError: There is no such file, or tables are missing.
        FormatError: No `.vtok` file, a header that is damaged or cut off, or a damaged payload.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return loads(bytes(source), tables=tables, allow_damaged=allow_damaged)
    path = Path(source)
    if not path.is_file():
        raise ParameterError(f"source must be a .vtok file or its bytes, got {path}, which is not a file.")
    if path.stat().st_size > _LARGEST:
        raise FormatError(f"{path} is no .vtok file: {path.stat().st_size} bytes, and none has more than {_LARGEST}.")
    try:
        return loads(path.read_bytes(), tables=tables, allow_damaged=allow_damaged)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def dumps(
    ids: Tensor,
    tokenizer: Tokenizer,
    *,
    size: tuple[int, int] | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    tables: range_coder.Tables | None = None,
    checksum: bool = True,
) -> bytes:
    """The bytes of a `.vtok` file.

    Args:
        ids: `(k,)` integers of one image.
        tokenizer: The one that made them.
        size: Width and height of the original picture, up to 65535.
        seed: To decode with, below 2 ** 32.
        steps: To decode with, up to 65535.
        guidance: To decode with.
        tables: Code with these instead of packing; readers need the same ones.
        checksum: Add a CRC-32 of the payload (4 bytes).

    Raises:
        ParameterError: Something does not fit into its field, or the tokenizer's tokens are not ids.
    """
    row = _checked_row(ids, tokenizer)
    bits = packing.bits_for(tokenizer.codebook_size)
    numbers = ((seed, 1 << 32, "seed"), (steps, 1 << 16, "steps"), *((side, 1 << 16, "size") for side in size or ()))
    for value, limit, name in numbers:
        if value is not None and not 0 <= value < limit:
            raise ParameterError(f"{name} must be in [0, {limit}), got {value}.")
    if size is not None and len(size) != 2:
        raise ParameterError(f"size must be width and height, got {size}.")
    if guidance is not None and not (math.isfinite(guidance) and abs(guidance) < 3e38):
        raise ParameterError(f"guidance must be a finite float32, got {guidance}.")
    payload = packing.pack(row, bits) if tables is None else _coded(row, tokenizer, tables)
    fields: list[tuple[int, str, tuple[Any, ...] | None]] = [
        (_SIZE, "<HH", size),
        (_SEED, "<I", None if seed is None else (seed,)),
        (_STEPS, "<H", None if steps is None else (steps,)),
        (_GUIDANCE, "<f", None if guidance is None else (guidance,)),
        (_TABLES, "<4sH", None if tables is None else (bytes.fromhex(tables.identifier), len(payload))),
        (_CHECKSUM, "<I", (zlib.crc32(payload),) if checksum else None),
    ]
    flags = sum(flag for flag, _, values in fields if values is not None)
    model = bytes.fromhex(tokenizer.model_id or tokenizer.identify())
    head = struct.pack("<4sBBB", _MAGIC, _VERSION, flags, bits) + _family_field(tokenizer.name)
    head += struct.pack("<4sH", model, len(row))
    head += b"".join(struct.pack(layout, *values) for _, layout, values in fields if values is not None)
    return head + struct.pack("<H", _crc(head)) + payload


def loads(data: bytes, *, tables: range_coder.Tables | None = None, allow_damaged: bool = False) -> TokenFile:
    """`open` for bytes; arguments, result and errors as there."""
    header = _parse(data)
    payload = data[header.end :]
    if len(payload) > header.payload:
        raise FormatError(f"{len(payload) - header.payload} bytes follow the {header.count} tokens.")
    truncated = len(payload) < header.payload
    damaged = not truncated and header.checksum is not None and zlib.crc32(payload) != header.checksum
    if damaged and not allow_damaged:
        raise FormatError("the checksum of the tokens does not match; allow_damaged=True gives them all the same.")
    if header.tables is None:
        row = packing.unpack(payload, header.bits, header.count)
    else:
        row = range_coder.decode([payload], header.count, _matching(tables, header), truncated)[0]
    return TokenFile(
        torch.from_numpy(row), header.family, header.model_id, header.count,
        "packed" if header.tables is None else "range", header.size, header.seed, header.steps, header.guidance,
        truncated, damaged,
    )  # fmt: skip


def check_model(file: TokenFile, tokenizer: Tokenizer) -> None:
    """Whether a tokenizer is the one whose tokens a file holds.

    Raises:
        IncompatibleError: Another family, or other weights.
        FormatError: Ids that the tokenizer does not have.
    """
    if file.family != tokenizer.name:
        raise IncompatibleError(f"the tokens are of {file.family!r}, but the tokenizer is {tokenizer.name!r}.")
    expected = tokenizer.model_id or tokenizer.identify()
    if file.model_id != expected:
        raise IncompatibleError(
            f"the tokens were made by other weights or another config (model id {file.model_id}) "
            f"than this {tokenizer.name} has ({expected}); load those that encoded them."
        )
    if file.ids.numel() and int(file.ids.max()) >= tokenizer.codebook_size:
        raise FormatError(f"id {int(file.ids.max())} is not below the codebook size {tokenizer.codebook_size}.")


def header_size(tokenizer: Tokenizer, *, size: bool = True, checksum: bool = True) -> int:
    """Bytes of a file beside its packed tokens, with no hints."""
    return 14 + len(_family_field(tokenizer.name)) - 1 + 4 * size + 4 * checksum + 2


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file in one step; nobody sees half of it, and a kill leaves the older one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        # mkstemp makes files for their owner only; those of a data set are to be read as others are.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _checked_row(ids: Tensor, tokenizer: Tokenizer) -> np.ndarray:
    if not tokenizer.discrete:
        raise ParameterError(f"a .vtok file holds ids, but the tokens of this {tokenizer.name} are vectors.")
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ParameterError(f"ids must be the integers (k,) of one image, got {got}.")
    most = min(tokenizer.length, _MOST_TOKENS)
    if not 1 <= len(ids) <= most:
        raise ParameterError(f"ids must have 1 to {most} tokens, got {len(ids)}.")
    row = ids.detach().cpu().numpy()
    if not (row.min() >= 0 and row.max() < tokenizer.codebook_size):
        raise ParameterError(f"ids must be in [0, {tokenizer.codebook_size}), got {row.min()} to {row.max()}.")
    return row


def _coded(row: np.ndarray, tokenizer: Tokenizer, tables: range_coder.Tables) -> bytes:
    if tables.radices != range_coder.radices_of(tokenizer):
        raise ParameterError(
            f"tables must be for digits {range_coder.radices_of(tokenizer)}, got some for {tables.radices}."
        )
    payload = range_coder.encode(row[None], tables)[0]
    if len(payload) > 0xFFFF:
        raise ParameterError(f"tables must give at most 65535 bytes, got {len(payload)}; store without tables.")
    return payload


def _matching(tables: range_coder.Tables | None, header: _Header) -> range_coder.Tables:
    if tables is None:
        raise ParameterError(f"tables must be given: the tokens are coded with tables {header.tables}.")
    if tables.identifier != header.tables:
        raise ParameterError(
            f"tables must be {header.tables}, with which the tokens are coded, not {tables.identifier}."
        )
    if header.count > tables.length:
        raise FormatError(f"{header.count} tokens are stored, but the tables have {tables.length} places.")
    return tables


def _family_field(name: str) -> bytes:
    code = _CODES.get(name, 0)
    raw = name.encode("ascii", "replace")
    if not code and not (name.isascii() and 0 < len(raw) <= _LONGEST_NAME):
        raise ParameterError(f"the tokenizer's name must be 1 to {_LONGEST_NAME} ASCII characters, got {name!r}.")
    return bytes([code]) if code else bytes([0, len(raw)]) + raw


def _crc(data: bytes) -> int:
    return binascii.crc_hqx(data, 0xFFFF)


class _Reader:
    """Takes fields off the front, and never more than there is."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(layout)
        if self.at + size > len(self.data):
            raise FormatError(f"the header is cut off after {len(self.data)} bytes.")
        self.at += size
        return struct.unpack_from(layout, self.data, self.at - size)


def _parse(data: bytes) -> _Header:
    reader = _Reader(data)
    if data[:4] != _MAGIC[: len(data)] or not data:
        raise FormatError("not a .vtok file: it does not begin with 'VTOK'.")
    _, version, flags, bits = reader.take("<4sBBB")
    if version != _VERSION:
        raise FormatError(f"version {version} of .vtok is not known, only {_VERSION}; a newer visiontok may read it.")
    (code,) = reader.take("<B")
    name = _FAMILIES.get(code)
    if code == 0:
        (length,) = reader.take("<B")
        # Names that are too long are refused below, after the checksum has said whether the byte can be trusted.
        name = reader.take(f"<{length}s")[0].decode("ascii", "replace")
    model, count = reader.take("<4sH")
    optional: dict[int, tuple[Any, ...]] = {
        flag: reader.take(layout) if flags & flag else ()
        for flag, layout in ((_SIZE, "<HH"), (_SEED, "<I"), (_STEPS, "<H"), (_GUIDANCE, "<f"),
                             (_TABLES, "<4sH"), (_CHECKSUM, "<I"))
    }  # fmt: skip
    end = reader.at
    if reader.take("<H")[0] != _crc(data[:end]):
        raise FormatError("the header is damaged: its checksum does not match.")
    known = _SIZE | _SEED | _STEPS | _GUIDANCE | _TABLES | _CHECKSUM
    plain = name is not None and name.isascii() and 0 < len(name) <= _LONGEST_NAME
    if not plain or count < 1 or not 1 <= bits <= packing.MAX_BITS or flags & ~known:
        raise FormatError(f"the header says {count} tokens of {bits} bits, family {code}, flags {flags}; not possible.")
    tables = optional[_TABLES]
    return _Header(
        bits, str(name), model.hex(), count,
        (optional[_SIZE][0], optional[_SIZE][1]) if optional[_SIZE] else None,
        optional[_SEED][0] if optional[_SEED] else None,
        optional[_STEPS][0] if optional[_STEPS] else None,
        optional[_GUIDANCE][0] if optional[_GUIDANCE] else None,
        tables[0].hex() if tables else None,
        tables[1] if tables else packing.packed_size(count, bits),
        optional[_CHECKSUM][0] if optional[_CHECKSUM] else None,
        reader.at,
    )  # fmt: skip
