"""Images for evaluation: a folder of class folders, or the embedded digits.

An image that cannot be read is never replaced by another one: it is counted and reported with its path, because a
silently substituted neighbour biases the accuracy.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from visiontok.errors import FormatError, ParameterError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 80_000_000
MAX_BYTES = 256 << 20
_SPLITS = {"validation": ("validation", "val"), "val": ("val", "validation"), "test": ("test",), "train": ("train",)}

Transform = Callable[[Image.Image], torch.Tensor]


class Failure(NamedTuple):
    """An image that could not be read, and why."""

    path: str
    reason: str


class Batch(NamedTuple):
    """Images `(B, C, H, W)`, targets `(B,)` int64, and the images of this batch that could not be read."""

    images: torch.Tensor
    targets: torch.Tensor
    failures: tuple[Failure, ...] = ()


class UnreadableImageError(FormatError):
    """A file is not an image that can be decoded whole and within the limits."""


def open_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Decodes an image completely, upright (EXIF) and as RGB.

    Args:
        path: the file; its content decides the format, not its name.
        max_pixels: refuse larger images before decoding them.
        max_bytes: refuse larger files.

    Raises:
        UnreadableImageError: not an image, truncated, or beyond the limits.
    """
    try:
        # Opening a pipe or a device would block; a broken link fails here too.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImageError("not a regular file")
        if not 0 < status.st_size <= max_bytes:
            raise UnreadableImageError("empty file" if status.st_size == 0 else f"{status.st_size} bytes is too large")
        return _decode(path, max_pixels)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{os.fspath(path)}: {error}") from None
    except Exception as error:
        # Pillow's decoders raise whatever they like on damaged files (OSError, SyntaxError, struct.error, ...).
        raise UnreadableImageError(f"{os.fspath(path)}: {type(error).__name__}: {error}") from error


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """`open_image` for bytes; `name` is what the error calls them.

    Raises:
        UnreadableImageError: as `open_image`.
    """
    try:
        if not 0 < len(data) <= max_bytes:
            raise UnreadableImageError("empty file" if not data else f"{len(data)} bytes is too large")
        return _decode(io.BytesIO(data), max_pixels)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{name}: {error}") from None
    except Exception as error:
        raise UnreadableImageError(f"{name}: {type(error).__name__}: {error}") from error


def _decode(source: Any, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableImageError(f"{image.width}x{image.height} exceeds {max_pixels} pixels")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB: 16-bit grey is scaled, alpha is dropped as timm drops it."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = image.convert("I")
        brightest: Any = values.getextrema()[1]
        deep = image.mode != "I" or brightest > 255
        image = values.point(lambda value: value * (1 / 256) + 0).convert("L") if deep else values.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class FolderDataset(Dataset[Any]):
    """Images in class folders, named and ordered as torchvision's `ImageFolder` does.

    Args:
        root: folder that holds one folder per class.
        transform: from a PIL image to a `(C, H, W)` tensor.
        classes: class folder names in the order of the model's outputs; None means sorted.
        max_images: keep only n images, evenly spaced over the sorted list so that every class is seen.

    Raises:
        ParameterError: no folder, no class folder or no image.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Transform,
        classes: Sequence[str] | None = None,
        max_images: int | None = None,
    ) -> None:
        self.root, self.transform = Path(root), transform
        folders = find_classes(self.root)
        self.classes = list(classes) if classes is not None else folders
        unknown = sorted(set(folders) - set(self.classes))
        if unknown:
            raise ParameterError(f"{self.root}: class folder(s) {', '.join(unknown[:5])} are not in the class map")
        index = {name: number for number, name in enumerate(self.classes)}
        self.items = [(path, index[name]) for name in folders for path in images_below(self.root / name)]
        if not self.items:
            raise ParameterError(f"{self.root}: no image ({', '.join(EXTENSIONS)}) in {len(folders)} class folder(s)")
        self.items = [self.items[number] for number in evenly(len(self.items), max_images)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | Failure:
        path, target = self.items[index]
        try:
            return self.transform(open_image(path)), target
        except UnreadableImageError as error:
            return Failure(str(path), str(error).removeprefix(f"{path}: "))


class ArrayDataset(Dataset[Any]):
    """Images that are in memory already: `(N, C, H, W)` floats and `(N,)` targets."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor, max_images: int | None = None) -> None:
        chosen = evenly(len(targets), max_images)
        self.images, self.targets = images[chosen], targets[chosen]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.targets[index])


def batches(dataset: Dataset[Any], batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Yields the whole dataset in order.

    Args:
        dataset: `FolderDataset` or `ArrayDataset`.
        batch_size: images per batch; failures make a batch smaller.
        workers: loader processes.
    """
    yield from DataLoader(dataset, batch_size, shuffle=False, num_workers=workers, collate_fn=collate)


def find_classes(root: Path) -> list[str]:
    """Sorted names of the class folders.

    Raises:
        ParameterError: `root` is not a folder or holds none.
    """
    if not root.is_dir():
        raise ParameterError(f"data folder '{root}' does not exist; pass a folder of class folders with --data-dir")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not names:
        raise ParameterError(f"'{root}' has no class folder; expected {root}/<class>/<image>")
    return names


def split_folder(root: str | os.PathLike[str], split: str) -> Path:
    """`root/<split>` where it exists ('validation' also finds 'val'), else `root` itself."""
    base = Path(root)
    return next((base / name for name in _SPLITS.get(split, (split,)) if (base / name).is_dir()), base)


def class_names(folder: Path, num_classes: int, class_map: str | os.PathLike[str] | None = None) -> list[str]:
    """The class folder name of each of the model's outputs.

    Args:
        folder: folder of class folders.
        num_classes: outputs of the model.
        class_map: text file with one folder name per line; None takes the sorted folder names, or ImageNet's synset
            list where the folders are synsets and the model has 1000 outputs.

    Raises:
        ParameterError: the number of names is not the number of outputs, so targets would be wrong.
    """
    if class_map is not None:
        names = [line.strip() for line in Path(class_map).read_text(encoding="utf-8").splitlines() if line.strip()]
        source = f"class map '{class_map}'"
    else:
        names, source = find_classes(folder), f"'{folder}'"
        if num_classes == 1000 and all(name.startswith("n") and name[1:].isdigit() for name in names):
            from timm.data.imagenet_info import ImageNetInfo

            names, source = ImageNetInfo("imagenet-1k").label_names(), "ImageNet's synset list"
    if len(names) != num_classes:
        raise ParameterError(
            f"{source} names {len(names)} classes but the model has {num_classes} outputs; "
            "pass the folder names in the order of the outputs with --class-map"
        )
    return names


def evenly(count: int, wanted: int | None) -> list[int]:
    """`wanted` evenly spaced numbers below `count`; all of them where `wanted` is None or too many."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [number * count // wanted for number in range(wanted)]


def images_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        # A link back to a parent would be walked for ever.
        if (real := os.path.realpath(current)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(current, name) for name in sorted(files) if name.lower().endswith(EXTENSIONS)]
    return found


def collate(items: Sequence[Any]) -> Batch:
    good = [item for item in items if not isinstance(item, Failure)]
    failures = tuple(item for item in items if isinstance(item, Failure))
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return Batch(images, torch.tensor([target for _, target in good], dtype=torch.int64), failures)
