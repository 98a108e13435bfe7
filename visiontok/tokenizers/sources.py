"""Where pictures come from: files, folders, tar shards of webdataset, Parquet; cut into jobs that can be repeated."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from visiontok.bench.data import EXTENSIONS, decode_image, images_below, open_image
from visiontok.errors import MissingDependencyError, ParameterError

__all__ = ["Entry", "Job", "entries", "jobs", "load", "parquet", "safe_key"]

_COLUMNS = ("image", "img", "jpg", "png", "bytes")
_NAMES = ("key", "__key__", "path", "filename", "id")
_LARGEST_MEMBER = 256 << 20


class Entry(NamedTuple):
    """A picture that was not decoded yet: its name and its path or bytes, or why there are none."""

    key: str
    content: Path | bytes | None
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """A part of a source that is done as a whole; the same source always gives the same jobs.

    Attributes:
        kind: "files", "tar" or "parquet".
        paths: Image files, or the one shard.
        keys: Names of the image files.
    """

    kind: str
    paths: tuple[str, ...]
    keys: tuple[str, ...] = ()


def jobs(source: str | Path | Sequence[str | Path], size: int) -> list[Job]:
    """Cuts sources into jobs.

    Args:
        source: One or more of: an image file, a folder of images (at any depth), a `.tar` shard, a `.parquet` file,
            a folder of shards. Names of images are paths within the folder without their endings; those of shards
            begin with the shard's name.
        size: Image files per job; a shard is one job.

    Raises:
        ParameterError: Nothing there, no image, or two pictures with one name.
    """
    found: list[tuple[str, Path]] = []
    shards: list[Job] = []
    for part in [source] if isinstance(source, (str, Path)) else source:
        path = Path(part)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in (".tar", ".parquet"))
            shards += [Job(file.suffix[1:], (str(file),)) for file in inside]
            if not inside:
                found += [(file.relative_to(path).with_suffix("").as_posix(), file) for file in images_below(path)]
        elif path.suffix in (".tar", ".parquet") and path.is_file():
            shards.append(Job(path.suffix[1:], (str(path),)))
        elif path.is_file():
            found.append((path.stem, path))
        else:
            raise ParameterError(f"source must be an image, folder, .tar or .parquet that exists, got {part}.")
    _refuse_twins([key for key, _ in found], "images")
    _refuse_twins([Path(job.paths[0]).stem for job in shards], "shards")
    parts = [found[start : start + size] for start in range(0, len(found), size)]
    files = [Job("files", tuple(str(path) for _, path in part), tuple(key for key, _ in part)) for part in parts]
    if not files and not shards:
        raise ParameterError(f"source holds no image ({', '.join(EXTENSIONS)}), got {source}.")
    return files + shards


def entries(job: Job) -> Iterator[Entry]:
    """The pictures of a job, in order. A shard that is damaged ends with an entry that says so."""
    if job.kind == "files":
        yield from (Entry(key, Path(path)) for key, path in zip(job.keys, job.paths))
        return
    path = Path(job.paths[0])
    seen: set[str] = set()
    try:
        for key, data in (_members if job.kind == "tar" else _rows)(path):
            full = f"{path.stem}/{key}"
            reason = "" if safe_key(full) else "its name leaves the folder"
            if full in seen:
                reason = "a second picture of this name"
            seen.add(full)
            yield Entry(full, None if reason else data, reason or ("no bytes" if data is None else ""))
    except MissingDependencyError:
        raise
    except Exception as error:
        # tarfile, zlib and Arrow raise what they like on damaged files; what was read before is kept.
        yield Entry(f"{path.stem}/~rest", None, f"the shard cannot be read on: {type(error).__name__}: {error}")


def load(entry: Entry) -> Image.Image:
    """Decodes a picture, upright and as RGB.

    Raises:
        UnreadableImageError: It cannot be read.
    """
    if isinstance(entry.content, Path):
        return open_image(entry.content)
    return decode_image(entry.content or b"", entry.key)


def safe_key(key: str) -> bool:
    """Whether a name stays inside of the folder that it is written to."""
    path = PurePosixPath(key)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in key and "\0" not in key


def parquet() -> Any:
    """pyarrow.parquet.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import pyarrow.parquet as module
    except ImportError as error:
        raise MissingDependencyError("Parquet needs pyarrow: pip install 'visiontok[dist]'") from error
    return module


def _members(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Images of a tar file; webdataset's key is the name up to the first dot of its last part."""
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if not member.isfile() or name.suffix.lower() not in EXTENSIONS:
                continue
            key = (name.parent / name.name.split(".")[0]).as_posix()
            file = tar.extractfile(member) if member.size <= _LARGEST_MEMBER else None
            yield key, None if file is None else file.read()


def _rows(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Images of a Parquet file: a column of bytes, or Hugging Face's struct of bytes and path."""
    file = parquet().ParquetFile(path)
    names = file.schema_arrow.names
    column = next((name for name in _COLUMNS if name in names), None)
    if column is None:
        raise ParameterError(f"no image column; one of {', '.join(_COLUMNS)} is needed, there are {', '.join(names)}")
    label = next((name for name in _NAMES if name in names), None)
    number = 0
    for batch in file.iter_batches(batch_size=64, columns=[column] + ([label] if label else [])):
        for row in batch.to_pylist():
            value = row[column]
            data = value.get("bytes") if isinstance(value, dict) else value
            key = str(PurePosixPath(str(row[label])).with_suffix("")) if label and row[label] else f"{number:08d}"
            yield key, data if isinstance(data, bytes) else None
            number += 1


def _refuse_twins(names: Sequence[str], what: str) -> None:
    twins = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twins:
        raise ParameterError(f"source must give {what} different names, but {len(twins)} occur twice: {twins[:3]}.")
