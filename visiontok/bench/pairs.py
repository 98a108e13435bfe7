"""Image-text pairs: a CSV beside its images, or webdataset tars, read in place and never unpacked."""

from __future__ import annotations

import csv
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.utils.data import Dataset

from visiontok.bench.data import (
    MAX_BYTES,
    Failure,
    Transform,
    UnreadableImageError,
    decode_image,
    evenly,
    open_image,
)
from visiontok.errors import FormatError, ParameterError

IMAGE_KEYS = ("image", "filepath", "image_path", "file_name", "filename", "path", "file")
CAPTION_KEYS = ("caption", "text", "title", "captions", "sentence")
KINDS = "a .csv or .tsv file, a .tar or a folder of .tar"
TAR_IMAGES = ("jpg", "jpeg", "png", "webp")
_MAX_TEXT = 1 << 20


@dataclass(frozen=True)
class TarMember:
    """A file inside an uncompressed tar."""

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def read(self) -> bytes:
        """Its bytes; of a file beyond the limit of images only so many that the decoder refuses it."""
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(min(self.size, MAX_BYTES + 1))


@dataclass(frozen=True)
class Pair:
    """An image and its captions."""

    image: Path | TarMember
    captions: tuple[str, ...]


class PairDataset(Dataset[Any]):
    """Images of pairs; the target of an image is its number.

    Args:
        pairs: images with captions.
        transform: from a PIL image to a `(C, H, W)` tensor.
        max_images: keep only n images, evenly spaced, with all their captions.
    """

    def __init__(self, pairs: Sequence[Pair], transform: Transform, max_images: int | None = None) -> None:
        self.pairs = [pairs[number] for number in evenly(len(pairs), max_images)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | Failure:
        source = self.pairs[index].image
        try:
            image = decode_image(source.read(), str(source)) if isinstance(source, TarMember) else open_image(source)
            return self.transform(image), index
        except UnreadableImageError as error:
            return Failure(str(source), str(error).removeprefix(f"{source}: "))


def read_pairs(
    source: str | os.PathLike[str], image_key: str | None = None, caption_key: str | None = None
) -> list[Pair]:
    """Finds the pairs of a CSV file, a `.tar`, or a folder of `.tar` files.

    Args:
        source: the file or folder.
        image_key: column of the image paths of a CSV, None to find one of `IMAGE_KEYS`.
        caption_key: column of the captions, None to find one of `CAPTION_KEYS`.

    Raises:
        ParameterError: there is nothing of these kinds.
        FormatError: the file is damaged, or does not hold pairs.
    """
    path = Path(source)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if not tars:
            raise ParameterError(f"'{path}' holds no .tar; retrieval reads {KINDS}")
        return [pair for tar in tars for pair in read_tar(tar)]
    if not path.is_file():
        raise ParameterError(f"'{path}' does not exist; retrieval reads {KINDS}")
    return read_tar(path) if path.suffix == ".tar" else read_csv(path, image_key, caption_key)


def read_csv(path: Path, image_key: str | None = None, caption_key: str | None = None) -> list[Pair]:
    """Pairs of a CSV (or tab-separated) file with a header.

    Paths are relative to the file. Lines with the same path are captions of one image.

    Raises:
        FormatError: a column is missing, a line is incomplete, or it is no UTF-8 CSV.
    """
    found: dict[Path, list[str]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            rows = csv.DictReader(file, delimiter="\t" if "\t" in header else ",", strict=True)
            columns = list(rows.fieldnames or ())
            image = _column(path, columns, image_key, IMAGE_KEYS, "--csv-img-key")
            text = _column(path, columns, caption_key, CAPTION_KEYS, "--csv-caption-key")
            for row in rows:
                name, caption = (row.get(image) or "").strip(), (row.get(text) or "").strip()
                if not name or not caption:
                    raise FormatError(f"'{path}', line {rows.line_num}: no {'image' if not name else 'caption'}")
                found.setdefault(path.parent / name, []).append(caption)
    except (csv.Error, UnicodeDecodeError) as error:
        raise FormatError(f"'{path}' cannot be read as CSV: {error}") from None
    if not found:
        raise FormatError(f"'{path}' has a header but no pair")
    return [Pair(image, tuple(captions)) for image, captions in found.items()]


def read_tar(path: Path) -> list[Pair]:
    """Pairs of a webdataset tar: files of one name, `.jpg`, `.jpeg`, `.png` or `.webp` and `.txt`.

    Each line of a `.txt` is a caption. Files of other kinds are passed over.

    Raises:
        FormatError: damaged or compressed, a link, a name that leaves the archive, or a sample without image or text.
    """
    samples: dict[str, dict[str, TarMember]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                _check_member(path, member)
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                kind = "image" if kind.lower() in TAR_IMAGES else kind.lower()
                if kind in ("image", "txt"):
                    place = TarMember(path, member.name, member.offset_data, member.size)
                    samples.setdefault(f"{folder}/{stem}", {})[kind] = place
    except (tarfile.TarError, EOFError) as error:
        raise FormatError(f"'{path}' cannot be read as an uncompressed tar: {error}") from None
    pairs = [_tar_pair(path, key, parts) for key, parts in samples.items()]
    if not pairs:
        raise FormatError(f"'{path}' holds no pair of an image ({', '.join(TAR_IMAGES)}) and a txt")
    return pairs


def _tar_pair(path: Path, key: str, parts: dict[str, TarMember]) -> Pair:
    if len(parts) != 2:
        missing = "txt" if "image" in parts else f"image ({', '.join(TAR_IMAGES)})"
        raise FormatError(f"'{path}': sample '{key.lstrip('/')}' has no {missing}")
    if parts["txt"].size > _MAX_TEXT:
        raise FormatError(f"'{path}': '{parts['txt'].name}' is larger than {_MAX_TEXT >> 20} MB")
    try:
        lines = parts["txt"].read().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"'{path}': '{parts['txt'].name}' is not UTF-8 text: {error}") from None
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise FormatError(f"'{path}': '{parts['txt'].name}' is empty")
    return Pair(parts["image"], captions)


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise FormatError(f"'{path}': the name '{member.name}' leaves the archive")
    if not member.isreg() or member.issparse():
        raise FormatError(f"'{path}': '{member.name}' is a link or a special file; only plain files are read")


def _column(path: Path, columns: list[str], wanted: str | None, known: Sequence[str], flag: str) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise FormatError(f"'{path}' has no column '{wanted}' ({flag}); it has: {', '.join(columns)}")
        return wanted
    by_name = {column.strip().lower(): column for column in columns}
    for name in known:
        if name in by_name:
            return by_name[name]
    raise FormatError(f"'{path}' has none of the columns {', '.join(known)}; it has: {', '.join(columns)}; give {flag}")
