"""Image-text retrieval: recall@k in both directions, paired with the unreduced model.

The rank of a candidate is the number of candidates that are strictly more similar, plus the equally similar ones that
come earlier in the data: a model that maps everything to one point gets the recall of the order, not 100 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from visiontok.bench.accuracy import Accuracy, mcnemar, wilson
from visiontok.bench.data import Batch, Failure
from visiontok.bench.zeroshot import unit
from visiontok.errors import ParameterError

KS = (1, 5, 10)
_CHUNK = 1 << 24  # similarities at a time


@dataclass(frozen=True)
class Ranks:
    """Where the right answer came in, 0 for the first place.

    Attributes:
        image_to_text: `(images,)` rank of the best of the image's own captions among all captions.
        text_to_image: `(captions,)` rank of the caption's image among all images.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray


class Embedded(NamedTuple):
    """Embeddings `(n, D)` of length 1 in float32 on the CPU, which images they are, and those that are unreadable."""

    embeddings: Tensor
    kept: Tensor
    failures: tuple[Failure, ...]


class Change(NamedTuple):
    """A recall against the reference's on the same queries: points, exact McNemar p-value, queries lost and won."""

    delta: float
    p_value: float
    lost: int
    won: int


@torch.inference_mode()
def embed_images(
    encode_image: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    move: Callable[[Tensor], Tensor],
    on_batch: Callable[[int], object] | None = None,
) -> Embedded:
    """Encodes images.

    Args:
        encode_image: `(B, C, H, W)` -> `(B, D)`.
        batches: as `data.batches` yields them; the targets are the numbers of the images.
        move: brings images to the model's device and dtype.
        on_batch: called with the number of images done.

    Raises:
        ParameterError: no image could be read, or an embedding is not finite.
    """
    parts, kept, failures = [], [], []
    for batch in batches:
        failures += batch.failures
        if len(batch.targets):
            parts.append(unit(encode_image(move(batch.images))).cpu())
            kept.append(batch.targets)
        if on_batch is not None:
            on_batch(len(batch.targets) + len(batch.failures))
    if not parts:
        raise ParameterError(f"no image could be read ({len(failures)} failed)")
    return Embedded(torch.cat(parts), torch.cat(kept), tuple(failures))


def ranks(images: Tensor, texts: Tensor, owner: Tensor) -> Ranks:
    """Ranks of the right answers.

    Args:
        images: `(n, D)` embeddings.
        texts: `(m, D)` embeddings of captions.
        owner: `(m,)` int64, the image of each caption; every image has at least one.

    Raises:
        ParameterError: shapes that do not fit, an embedding that is not finite, or an image without a caption.
    """
    _check(images, texts, owner)
    images, texts = images.float(), texts.float()
    by_image = [
        _image_ranks(chunk @ texts.T, owner, start) for start, chunk in _chunks(images, max(1, _CHUNK // len(texts)))
    ]
    by_text = [
        _text_ranks(chunk @ images.T, owner[start : start + len(chunk)])
        for start, chunk in _chunks(texts, max(1, _CHUNK // len(images)))
    ]
    return Ranks(torch.cat(by_image).numpy(), torch.cat(by_text).numpy())


def recall(found: np.ndarray, k: int) -> Accuracy:
    """Share of queries `(n,)` whose answer is among the first k, in percent with its 95 % Wilson interval.

    The interval takes queries as independent; several captions of one image are not quite.
    """
    hits, n = int((found < k).sum()), len(found)
    low, high = wilson(hits, n)
    return Accuracy(100 * hits / n, 100 * low, 100 * high, n)


def change(found: np.ndarray, reference: np.ndarray, k: int) -> Change:
    """Compares recall@k with a reference's, query by query.

    Raises:
        ParameterError: the two did not answer the same queries.
    """
    if len(found) != len(reference):
        raise ParameterError(f"a paired comparison needs the same queries: {len(found)} here, {len(reference)} there")
    mine, other = found < k, reference < k
    won, lost = int((mine & ~other).sum()), int((other & ~mine).sum())
    return Change(100 * (won - lost) / len(found), mcnemar(won, lost), lost, won)


def summary(result: Ranks, reference: Ranks) -> dict[str, Any]:
    """Both directions as plain values: `{"image_to_text": {"1": {value, low, high, n, delta, ...}, ...}, ...}`."""
    return {
        name: {
            str(k): recall(getattr(result, name), k)._asdict()
            | change(getattr(result, name), getattr(reference, name), k)._asdict()
            for k in KS
        }
        for name in ("image_to_text", "text_to_image")
    }


def _image_ranks(similarity: Tensor, owner: Tensor, start: int) -> Tensor:
    rows = torch.arange(start, start + len(similarity)).unsqueeze(1)
    own = owner.unsqueeze(0) == rows  # (chunk, captions)
    best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    tied = similarity == best
    places = torch.arange(len(owner))
    first = places.expand_as(own).masked_fill(~(own & tied), len(owner)).amin(dim=1, keepdim=True)
    return (similarity > best).sum(dim=1) + (tied & (places < first)).sum(dim=1)


def _text_ranks(similarity: Tensor, owner: Tensor) -> Tensor:
    own = similarity.gather(1, owner.unsqueeze(1))
    earlier = torch.arange(similarity.shape[1]) < owner.unsqueeze(1)
    return (similarity > own).sum(dim=1) + ((similarity == own) & earlier).sum(dim=1)


def _chunks(values: Tensor, size: int) -> Iterable[tuple[int, Tensor]]:
    return ((start, values[start : start + size]) for start in range(0, len(values), size))


def _check(images: Tensor, texts: Tensor, owner: Tensor) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or len(owner) != len(texts):
        raise ParameterError(
            f"retrieval needs images (n, D), texts (m, D) and owner (m,), got {tuple(images.shape)}, "
            f"{tuple(texts.shape)} and {tuple(owner.shape)}"
        )
    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        raise ParameterError("an embedding is not finite, so it has no rank")
    if not torch.equal(torch.unique(owner), torch.arange(len(images))):
        raise ParameterError("owner must name an image for each caption, and every image at least once")
