"""Arithmetic of images that are cut into crops on a padded canvas (LLaVA-NeXT's any-resolution scheme)."""

from __future__ import annotations

__all__ = ["valid_area"]


def valid_area(image_size: tuple[int, int], canvas: tuple[int, int], exact: bool = True) -> tuple[int, int, int, int]:
    """The part of a canvas that an image covers which was scaled to fit and centred.

    Args:
        image_size: (H, W) of the image in pixels.
        canvas: (h, w) of the canvas in tokens.
        exact: Whether a length that only rounding errors keep below a whole number counts as that number, as in
            transformers; LLaVA's own code cuts it off.

    Returns:
        Top, bottom, left, right in tokens, ends excluded.
    """
    (height, width), (rows, columns) = image_size, canvas
    digits = 7 if exact else 17
    if width / height > columns / rows:
        left = (rows - int(round(height * (columns / width), digits))) // 2
        return left, rows - left, 0, columns
    left = (columns - int(round(width * (rows / height), digits))) // 2
    return 0, rows, left, columns - left
