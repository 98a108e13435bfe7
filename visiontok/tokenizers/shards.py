"""Where tokens go and come from: folders of `.vtok` files, Parquet shards, tar shards. A file is whole or absent."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.errors import FormatError, ParameterError
from visiontok.tokenizers import file_format
from visiontok.tokenizers.base import Tokenizer
from visiontok.tokenizers.file_format import TokenFile
from visiontok.tokenizers.sources import parquet, safe_key

__all__ = ["FORMATS", "Row", "open_output", "read", "write_job"]

FORMATS = ("vtok", "parquet", "webdataset")
_MANIFEST = "visiontok.json"
_ENDINGS = {"parquet": ".parquet", "webdataset": ".tar"}


class Row(NamedTuple):
    """The tokens of one picture and its size, or the reason why there are none."""

    key: str
    ids: Tensor | None
    size: tuple[int, int] | None = None
    error: str = ""


def open_output(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Makes the folder, or continues one that was made with the same settings.

    Raises:
        ParameterError: The folder holds something and `resume` is off, or it was made with other settings.
    """
    manifest = folder / _MANIFEST
    if folder.exists() and not folder.is_dir():
        raise ParameterError(f"output must be a folder, got the file {folder}.")
    there = folder.is_dir() and any(folder.iterdir())
    if there and not (resume and manifest.is_file()):
        remedy = "resume=True (--resume) continues it" if manifest.is_file() else "name a new or empty folder"
        raise ParameterError(f"output {folder} is not empty; {remedy}.")
    if there:
        before = json.loads(manifest.read_text())
        changed = sorted(key for key in settings if before.get(key) != settings[key])
        if changed:
            was = {key: before.get(key) for key in changed}
            raise ParameterError(f"output {folder} was begun with other settings: {was}; repeat them to resume.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    file_format.write_atomically(manifest, (json.dumps(settings, indent=1) + "\n").encode())


def shard_path(folder: Path, to: str, number: int) -> Path:
    """The file of one job."""
    return folder / f"tokens-{number:05d}{_ENDINGS[to]}"


def write_job(folder: Path, to: str, number: int, rows: Sequence[Row], tokenizer: Tokenizer, **hints: Any) -> int:
    """Writes the rows of one job.

    Args:
        folder: As `open_output` left it.
        to: One of `FORMATS`.
        number: Of the job; it names the shard.
        rows: Those that failed are rows of a Parquet shard, `.error` members of a tar shard, and not among the files
            of a folder.
        tokenizer: That made the tokens.
        **hints: Options of `file_format.dumps`; a Parquet shard has none of them.

    Returns:
        Bytes written.
    """
    if to == "parquet":
        return _write_parquet(shard_path(folder, to, number), rows, tokenizer)
    if to == "webdataset":
        return _write_tar(shard_path(folder, to, number), rows, tokenizer, hints)
    total = 0
    for row in rows:
        if row.ids is not None:
            path = folder / f"{row.key}.vtok"
            path.parent.mkdir(parents=True, exist_ok=True)
            total += file_format.save(path, row.ids, tokenizer, size=row.size, **hints)
    return total


def read(source: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, TokenFile | str]]:
    """Tokens that were stored: name, and what was stored or why it cannot be read.

    Args:
        source: A `.vtok` file, a `.parquet` or `.tar` shard, or a folder of them.

    Raises:
        ParameterError: There is nothing there.
    """
    for part in [source] if isinstance(source, (str, Path)) else source:
        path = Path(part)
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS) if path.is_dir() else [path]
        if not files or not all(file.is_file() and file.suffix in _READERS for file in files):
            raise ParameterError(f"source must hold {', '.join(_READERS)} files, got {part}.")
        for file in files:
            name = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
            yield from _READERS[file.suffix](file, name)


def _write_parquet(path: Path, rows: Sequence[Row], tokenizer: Tokenizer) -> int:
    import pyarrow as pa

    small = tokenizer.codebook_size <= 1 << 16
    columns = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "ids": pa.array(
            [None if row.ids is None else row.ids.tolist() for row in rows],
            pa.list_(pa.uint16() if small else pa.int32()),
        ),
        "length": pa.array([0 if row.ids is None else len(row.ids) for row in rows], pa.int32()),
        "width": pa.array([row.size[0] if row.size else None for row in rows], pa.int32()),
        "height": pa.array([row.size[1] if row.size else None for row in rows], pa.int32()),
        "family": pa.array([tokenizer.name] * len(rows), pa.string()),
        "model_id": pa.array([tokenizer.model_id] * len(rows), pa.string()),
        "error": pa.array([row.error or None for row in rows], pa.string()),
    }
    buffer = io.BytesIO()
    parquet().write_table(pa.table(columns), buffer, compression="zstd")
    file_format.write_atomically(path, buffer.getvalue())
    return len(buffer.getvalue())


def _write_tar(path: Path, rows: Sequence[Row], tokenizer: Tokenizer, hints: dict[str, Any]) -> int:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in rows:
            data, ending = row.error.encode(), "error"
            if row.ids is not None:
                data, ending = file_format.dumps(row.ids, tokenizer, size=row.size, **hints), "vtok"
            # A dot within a name would end webdataset's key.
            info = tarfile.TarInfo(f"{row.key.replace('.', '_')}.{ending}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    file_format.write_atomically(path, buffer.getvalue())
    return len(buffer.getvalue())


def _attempt(parse: Callable[[], TokenFile]) -> TokenFile | str:
    try:
        return parse()
    except (FormatError, ParameterError) as error:
        return str(error)


def _read_file(path: Path, name: str) -> Iterator[tuple[str, TokenFile | str]]:
    yield name, _attempt(lambda: file_format.open(path))


def _read_tar(path: Path, name: str) -> Iterator[tuple[str, TokenFile | str]]:
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                key = PurePosixPath(member.name)
                if file is None or key.suffix not in (".vtok", ".error"):
                    continue
                data = file.read(1 << 20)
                label = key.with_suffix("").as_posix()
                if not safe_key(label):
                    yield name, f"the name {member.name!r} leaves the folder"
                elif key.suffix == ".error":
                    yield label, f"not encoded: {data.decode('utf-8', 'replace')}"
                else:
                    yield label, _attempt(lambda data=data: file_format.loads(data))
    except (tarfile.TarError, OSError, EOFError) as error:
        yield name, f"{path} cannot be read: {error}"


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, TokenFile | str]]:
    module = parquet()
    try:
        for batch in module.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield str(row["key"]), _attempt(lambda row=row: _stored(row))
    except (OSError, ValueError, KeyError) as error:
        yield name, f"{path} cannot be read: {error!r}"


def _stored(row: dict[str, Any]) -> TokenFile:
    if row["ids"] is None:
        raise FormatError(f"not encoded: {row.get('error')}")
    if not safe_key(str(row["key"])):
        raise FormatError(f"the name {row['key']!r} leaves the folder")
    size = (row["width"], row["height"]) if row.get("width") and row.get("height") else None
    ids = torch.tensor(row["ids"], dtype=torch.int64)
    return TokenFile(
        ids, row["family"], row["model_id"], len(ids), "packed", size, None, None, None, truncated=False, damaged=False
    )


_READERS = {".vtok": _read_file, ".tar": _read_tar, ".parquet": _read_parquet}
