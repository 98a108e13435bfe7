"""Accuracy with its uncertainty: Wilson intervals, and paired comparison with the unreduced model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from visiontok.bench.data import Batch, Failure
from visiontok.errors import ParameterError

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Predictions:
    """What a model answered, image by image.

    Attributes:
        ranked: `(n, k)` int64, the k best classes, best first.
        targets: `(n,)` int64, the true classes.
        failures: images that could not be read; they are in neither array.
    """

    ranked: np.ndarray
    targets: np.ndarray
    failures: tuple[Failure, ...] = ()

    @property
    def best(self) -> np.ndarray:
        """`(n,)` top-1 classes."""
        return self.ranked[:, 0]

    def correct(self, k: int = 1) -> np.ndarray:
        """`(n,)` bool: the true class is among the k best."""
        return (self.ranked[:, :k] == self.targets[:, None]).any(axis=1)


class Accuracy(NamedTuple):
    """A share of images in percent with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int


class Paired(NamedTuple):
    """A model against a reference on the same images.

    `delta` in points of top-1, `p_value` of the exact McNemar test, `lost` and `won` images that only the reference
    and only the model got right, `agreement` percent of images with the same answer.
    """

    delta: float
    p_value: float
    lost: int
    won: int
    agreement: float


@torch.inference_mode()
def predict(
    model: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[Batch],
    move: Callable[[torch.Tensor], torch.Tensor],
    k: int = 5,
    on_batch: Callable[[int], object] | None = None,
) -> Predictions:
    """Runs a classifier over batches.

    Args:
        model: `(B, C, H, W)` -> logits `(B, classes)`, in eval mode.
        batches: images, targets and failures, as `data.batches` yields them.
        move: brings images to the model's device, dtype and memory format.
        k: best classes to keep.
        on_batch: called with the number of images done, for a progress bar.

    Raises:
        ParameterError: no image could be read, or the model's output is no `(B, classes)` tensor.
    """
    ranked: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    failures: list[Failure] = []
    for batch in batches:
        failures += batch.failures
        if len(batch.targets):
            logits = model(move(batch.images))
            ranked.append(_best(logits, k))
            targets.append(batch.targets.numpy())
        if on_batch is not None:
            on_batch(len(batch.targets) + len(batch.failures))
    if not targets:
        shown = "; ".join(f"{failure.path}: {failure.reason}" for failure in failures[:3])
        raise ParameterError(f"no image could be read ({len(failures)} failed{': ' + shown if shown else ''})")
    return Predictions(np.concatenate(ranked), np.concatenate(targets), tuple(failures))


def top_k(predictions: Predictions, k: int = 1) -> Accuracy:
    """Top-k accuracy with its 95 % Wilson interval, in percent."""
    hits, n = int(predictions.correct(k).sum()), len(predictions.targets)
    low, high = wilson(hits, n)
    return Accuracy(100 * hits / n, 100 * low, 100 * high, n)


def compare(predictions: Predictions, reference: Predictions) -> Paired:
    """Compares a model with a reference, image by image.

    Raises:
        ParameterError: the two did not see the same images.
    """
    if not np.array_equal(predictions.targets, reference.targets):
        raise ParameterError(
            f"a paired comparison needs the same images: {len(predictions.targets)} here, "
            f"{len(reference.targets)} in the reference (or other targets)"
        )
    mine, other = predictions.correct(), reference.correct()
    won, lost = int((mine & ~other).sum()), int((other & ~mine).sum())
    return Paired(
        delta=100 * (won - lost) / len(mine),
        p_value=mcnemar(won, lost),
        lost=lost,
        won=won,
        agreement=100 * float((predictions.best == reference.best).mean()),
    )


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, within [0, 1].

    Raises:
        ParameterError: not `0 <= hits <= n` with `n >= 1`.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ParameterError(f"an interval needs 0 <= hits <= n and n >= 1, got hits={hits}, n={n}")
    share, z2 = hits / n, _Z95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if hits == 0 else center - half), (1.0 if hits == n else center + half)


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided McNemar p-value from the images that only one of two models got right."""
    n = won + lost
    term, tail = 1, 1
    for k in range(min(won, lost)):
        term = term * (n - k) // (k + 1)
        tail += term
    # Integers up to the division: 2**n overflows a float long before a validation set ends.
    return min(1.0, float((2 * tail * 10**18) // 2**n) / 1e18)


def _best(logits: torch.Tensor, k: int) -> np.ndarray:
    if logits.ndim != 2:
        raise ParameterError(
            f"a classifier returns (batch, classes), this model returned {tuple(logits.shape)}; "
            "choose a model with a classification head"
        )
    return logits.float().topk(min(k, logits.shape[1]), dim=1).indices.cpu().numpy()
