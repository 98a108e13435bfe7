"""Training batches that are a function of (seed, step): a resumed run sees what an uninterrupted one would have seen.

Every item seeds its own augmentation from (seed, epoch, index), so neither the number of loader processes nor where a
run was killed changes an image.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from visiontok.bench import data as images
from visiontok.bench import models
from visiontok.errors import ParameterError
from visiontok.training.config import TrainConfig

__all__ = ["TrainData", "load_data", "mix", "preserved_rng", "seed_all"]

DIGITS = "digits"
_MASK = (1 << 63) - 1


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, well spread (splitmix64)."""
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = (value ^ number) + 0x9E3779B97F4A7C15 & (1 << 64) - 1
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
        value ^= value >> 31
    return value & _MASK


def seed_all(*numbers: int) -> None:
    """Seeds torch, NumPy and Python from several numbers."""
    seed = mix(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Gives all global generators their state back afterwards."""
    devices = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class TrainData:
    """A dataset in an order that depends on seed and epoch only.

    Args:
        dataset: Items `(image, target)` or `Failure`.
        batch_size: Images per batch; the incomplete last batch of an epoch is left out.
        seed: Of order and augmentation.
        augment: On-the-fly augmentation of a batch of tensors, or None.
        workers: Loader processes.

    Raises:
        ParameterError: There are fewer images than one batch takes.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, seed: int, augment: Any = None, workers: int = 0
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.augment, self.workers = (
            dataset, batch_size, seed, augment, workers,
        )  # fmt: skip
        self.size: int = len(dataset)  # type: ignore[arg-type]
        self.batches = self.size // batch_size
        if not self.batches:
            raise ParameterError(f"{self.size} training image(s) are less than one batch of {batch_size}.")

    def epoch(self, epoch: int, start: int = 0) -> Iterator[images.Batch]:
        """The batches of an epoch from batch `start` on."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(self.size, generator=generator)[: self.batches * self.batch_size]
        chosen = order[start * self.batch_size :].tolist()
        items = _Seeded(self.dataset, chosen, mix(self.seed, epoch, 1))
        # A generator of its own: the loader would otherwise draw from the global one.
        yield from DataLoader(
            items, self.batch_size, shuffle=False, num_workers=self.workers, collate_fn=images.collate,
            generator=torch.Generator(),
        )  # fmt: skip


class _Seeded(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any], indices: list[int], seed: int) -> None:
        self._dataset, self._indices, self._seed = dataset, indices, seed

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Any:
        index = self._indices[position]
        if not isinstance(self._dataset, images.ArrayDataset):
            seed_all(self._seed, index)
        return self._dataset[index]


def load_data(config: TrainConfig, model: nn.Module) -> tuple[TrainData, Dataset[Any] | None]:
    """Training and validation data of a config; validation is None where the folder has no such split.

    Args:
        config: The run.
        model: Decides classes, input size and normalisation.

    Raises:
        ParameterError: The data does not exist or does not go with the model.
    """
    if config.data == DIGITS:
        return _digits(config, model)
    size = config.input_size or models.input_size(model)
    folder = images.split_folder(config.data, config.split)
    names = images.class_names(folder, int(getattr(model, "num_classes", 0)), config.class_map)
    plain = models.transform(model, config.model, size)
    transform = _train_transform(model, size) if config.augment and config.model not in models.EMBEDDED else plain
    train = images.FolderDataset(folder, transform, names, config.max_images)
    data = TrainData(
        train, config.batch_size, config.seed, workers=config.workers,
        augment=jitter if config.augment and config.model in models.EMBEDDED else None,
    )  # fmt: skip
    held_out = images.split_folder(config.data, config.val_split)
    # Without the sub-folder the root itself comes back, and that holds what is trained on.
    validation = None if held_out == folder or str(held_out) == config.data else images.FolderDataset(
        held_out, plain, names
    )  # fmt: skip
    return data, validation


def _digits(config: TrainConfig, model: nn.Module) -> tuple[TrainData, Dataset[Any]]:
    from visiontok.models.tiny import INPUT_SIZE, digits_split

    size, classes = models.input_size(model), getattr(model, "num_classes", None)
    if size != INPUT_SIZE or classes != 10:
        raise ParameterError(
            f"the embedded digits are {INPUT_SIZE} images of 10 classes; this model takes {size} and has {classes} "
            "outputs. Pass a folder with --data-dir."
        )
    split = digits_split()
    train = images.ArrayDataset(split.train_images, split.train_labels, config.max_images)
    augment = jitter if config.augment else None
    data = TrainData(train, config.batch_size, config.seed, augment, config.workers)
    return data, images.ArrayDataset(split.test_images, split.test_labels)


def jitter(x: Tensor) -> Tensor:
    """Small random rotations (12 degrees), scales, shears and shifts of images `(B, 3, H, W)` in [-1, 1]."""
    batch = len(x)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(batch) * 2 - 1) * limit

    angle, shear, scale = uniform(math.radians(12)), uniform(0.15), 1 + uniform(0.15)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [cos, shear - sin, uniform(0.16), sin, cos, uniform(0.16)]
    grid = F.affine_grid(torch.stack(rows, 1).view(batch, 2, 3), list(x.shape), align_corners=False)
    # +1 makes the dark ground 0, which is what grid_sample pads with.
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def _train_transform(model: nn.Module, size: tuple[int, int, int]) -> Any:
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_data_config({"input_size": tuple(size)}, model=model)
    return create_transform(
        input_size=config["input_size"], is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25,
        interpolation="random", mean=config["mean"], std=config["std"],
    )  # fmt: skip
