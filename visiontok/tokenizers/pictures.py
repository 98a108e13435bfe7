"""The one way in which pictures become the input of a tokenizer, so that qualities can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from visiontok.errors import ParameterError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FITS", "fitted", "to_picture"]

FITS = ("crop", "stretch")


def fitted(image: Image, size: int, fit: str = "crop") -> Tensor:
    """A picture as `(3, size, size)` float32 in [0, 1].

    Args:
        image: Of any mode; transparency is laid over black. An EXIF orientation must have been applied.
        size: Pixels.
        fit: "crop": the shorter side becomes `size` (bicubic, antialiased), the middle is cut out.
            "stretch": both sides become `size`.

    Raises:
        ParameterError: Another `fit`.
    """
    from PIL import Image as pil

    from visiontok.bench.data import to_rgb

    if fit not in FITS:
        raise ParameterError(f"fit must be one of {', '.join(FITS)}, got {fit!r}.")
    rgb = to_rgb(image)
    width, height = rgb.size
    box = None
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), pil.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255


def to_picture(image: Tensor) -> Image:
    """`(3, H, W)` in [0, 1], rounded and not cut off, as an 8-bit RGB picture."""
    from PIL import Image as pil

    values = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pil.fromarray(values.permute(1, 2, 0).cpu().numpy())
