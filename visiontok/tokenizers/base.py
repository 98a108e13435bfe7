"""What every 1D tokenizer offers: `encode`, `decode`, `reconstruct` and `progressive`, and the checks before them."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from visiontok.errors import ParameterError, UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Ids", "Lengths", "Progressive", "Tokenizer"]

Ids = Tensor | Sequence[Tensor]
"""`(B, k)` int64, or B rows `(k_i,)` of different lengths. Continuous tokenizers have a channel axis more."""
Lengths = int | Sequence[int] | None

_SAMPLED = 64


class Tokenizer(nn.Module):
    """An image tokenizer whose tokens are an ordered list: any first k of them are an image.

    A subclass sets the class attribute `name` and, in its constructor, the attributes below; it implements `_encode`
    and `_decode`, and `_progressive` if a longer prefix can continue a shorter one.

    Attributes:
        name: Name of the family in the registry.
        licence: Notice that goes with the weights, or an empty string.
        config: Plain values from which the modules were built.
        length: Most tokens per image, N.
        shortest: Fewest tokens that `decode` takes.
        codebook_size: Number of different ids; 0 if the tokens are continuous.
        image_size: Height and width of the images, in pixels.
        model_id: Four bytes, as eight hexadecimal digits, that tell models apart; set by `identify`.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    licence: ClassVar[str] = ""
    shortest: int = 1

    config: dict[str, Any]
    length: int
    codebook_size: int
    image_size: int
    model_id: str = ""

    # ---- for subclasses

    def _encode(self, images: Tensor, tokens: int) -> Tensor:
        """Ids `(B, tokens)` of checked images."""
        raise NotImplementedError

    def _decode(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Images of checked ids `(B, max(lengths))`; what lies behind a row's length is 0 and must not matter."""
        raise NotImplementedError

    def code_vectors(self, ids: Tensor) -> Tensor:
        """The vectors `(B, k, d)` that checked ids `(B, k)` stand for."""
        raise NotImplementedError

    def _progressive(self, images: Tensor) -> Callable[[int], Tensor]:
        """A function of k that gives the first k ids and may keep what it computed."""
        ids = self._encode(images, self.length)
        return lambda tokens: ids[:, :tokens]

    # ---- for users

    @property
    def discrete(self) -> bool:
        """Whether tokens are ids; otherwise they are vectors and cannot be stored in a `.vtok` file."""
        return self.codebook_size > 0

    @torch.no_grad()
    def encode(self, images: Tensor, tokens: Lengths = None, **options: Any) -> Tensor | list[Tensor]:
        """Images to tokens.

        Args:
            images: `(B, 3, H, W)` or `(3, H, W)` float in [0, 1]; H = W = `image_size` (see `preprocess`).
            tokens: How many, 1 to `length`: one number for all, or one per image. Default `length`.
            **options: Those of the family; `option_names` lists them.

        Returns:
            `(B, tokens)` int64, or with one number per image a list of `(tokens_i,)`. For a given image they do not
            depend on the rest of the batch, and shorter ones are prefixes of longer ones.

        Raises:
            ParameterError: Images of another shape, type or range, or a number of tokens out of range.
            UnknownNameError: No such option.
        """
        images = self._checked_images(images)
        lengths = self._checked_lengths(tokens, len(images))
        self._check_options(self._encode, options)
        ids = self._encode(images, max(lengths, default=self.length), **options)
        if tokens is None or isinstance(tokens, int):
            return ids
        return [row[:length] for row, length in zip(ids, lengths)]

    @torch.no_grad()
    def decode(self, ids: Ids, *, clamp: bool = True, **options: Any) -> Tensor:
        """Tokens to images.

        Args:
            ids: `(B, k)` or `(k,)` integers in [0, `codebook_size`), or a list of rows of different lengths.
            clamp: Cut the values off to [0, 1]; the networks themselves may leave it.
            **options: Those of the family; `option_names` lists them.

        Returns:
            `(B, 3, image_size, image_size)` float.

        Raises:
            ParameterError: Ids of another type or shape, or out of range.
            UnknownNameError: No such option.
        """
        self._check_options(self._decode, options)
        padded, lengths = self._checked_ids(ids)
        images = self._decode(padded, lengths, **options)
        return images.clamp(0, 1) if clamp else images

    def reconstruct(self, images: Tensor, tokens: Lengths = None, **options: Any) -> Tensor:
        """`decode(encode(images, tokens), **options)`; arguments, result and errors as there."""
        return self.decode(self.encode(images, tokens), **options)

    @torch.no_grad()
    def progressive(self, images: Tensor) -> Progressive:
        """Encodes images piece by piece: `extend(8)` now, `extend(32)` later.

        Args:
            images: As in `encode`.

        Raises:
            ParameterError: As in `encode`.
        """
        return Progressive(self, self._progressive(self._checked_images(images)))

    def preprocess(self, image: Image, fit: str = "crop") -> Tensor:
        """One picture as the tokenizer wants it.

        Args:
            image: Of any mode; transparency is laid over black.
            fit: "crop" scales the shorter side to `image_size` (bicubic, antialiased) and cuts out the middle;
                "stretch" keeps all of the picture and gives up its proportions.

        Returns:
            `(3, image_size, image_size)` float32 in [0, 1].

        Raises:
            ParameterError: Another `fit`.
        """
        from visiontok.tokenizers.pictures import fitted

        return fitted(image, self.image_size, fit)

    def option_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the options that `encode` and `decode` of this family take."""
        return {"encode": _options(self._encode), "decode": _options(self._decode)}

    def identify(self) -> str:
        """Computes `model_id` from the config and a sample of every weight; loaders call it before any cast."""
        digest = hashlib.sha256(json.dumps([self.name, self.config], sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            flat = value.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float().cpu()
            digest.update(f"{key}{tuple(value.shape)}".encode() + some.numpy().tobytes())
        self.model_id = digest.hexdigest()[:8]
        return self.model_id

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    # ---- checks

    def _checked_images(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = f"{images.dtype} tensor" if isinstance(images, Tensor) else type(images).__name__
            raise ParameterError(f"images must be a float tensor in [0, 1], got {got}; see Tokenizer.preprocess.")
        images = images[None] if images.dim() == 3 else images
        if not self._takes(tuple(images.shape)):
            size = self.image_size
            raise ParameterError(
                f"images must be (B, 3, {size}, {size}), got {tuple(images.shape)}; Tokenizer.preprocess makes them."
            )
        # One look at the values, once per call: a mistaken [-1, 1] or [0, 255] gives plausible but wrong tokens.
        low, high = (float(x) for x in torch.stack([images.amin(), images.amax()])) if images.numel() else (0.0, 1.0)
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ParameterError(f"images must be in [0, 1], got values from {low:.4g} to {high:.4g}.")
        return images.to(self.device)

    def _takes(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 4 and shape[1:] == (3, self.image_size, self.image_size)

    def _checked_lengths(self, tokens: Lengths, rows: int) -> list[int]:
        given = self.length if tokens is None else tokens
        lengths = [given] * rows if isinstance(given, int) else [int(k) for k in given]
        wrong = [k for k in lengths if not self.shortest <= k <= self.length]
        if isinstance(given, int) and not self.shortest <= given <= self.length:
            wrong = [given]
        if isinstance(given, bool) or wrong:
            bad = wrong[0] if wrong else given
            raise ParameterError(f"tokens must be {self.shortest} to {self.length} for this tokenizer, got {bad!r}.")
        if len(lengths) != rows:
            raise ParameterError(f"tokens must be one number, or one for each of {rows} images, got {len(lengths)}.")
        return lengths

    def _checked_ids(self, ids: Ids) -> tuple[Tensor, list[int]]:
        rows = self._rows(ids)
        lengths = [len(row) for row in rows]
        for row in rows:
            self._check_row(row)
        self._checked_lengths(lengths, len(rows))
        padded = nn.utils.rnn.pad_sequence([row.to(self.device) for row in rows], batch_first=True)
        return padded, lengths

    def _rows(self, ids: Ids) -> list[Tensor]:
        single = 1 if self.discrete else 2
        if isinstance(ids, Tensor):
            if ids.dim() not in (single, single + 1):
                raise ParameterError(f"ids must be (B, k) or (k,), got a tensor of shape {tuple(ids.shape)}.")
            ids = ids[None] if ids.dim() == single else ids
        rows = list(ids)
        if not rows:
            raise ParameterError("ids must hold at least one row of tokens, got none.")
        wrong = [row for row in rows if not isinstance(row, Tensor) or row.dim() != single]
        if wrong:
            got = tuple(wrong[0].shape) if isinstance(wrong[0], Tensor) else type(wrong[0]).__name__
            raise ParameterError(f"each row of ids must be a tensor (k,), got {got}.")
        return rows

    def _check_row(self, row: Tensor) -> None:
        if not self.discrete:
            return
        if row.is_floating_point() or row.dtype == torch.bool:
            raise ParameterError(f"ids must be integers, got {row.dtype}.")
        if row.numel() and not (int(row.min()) >= 0 and int(row.max()) < self.codebook_size):
            raise ParameterError(
                f"ids must be in [0, {self.codebook_size}), got {int(row.min())} to {int(row.max())}; "
                "are they of another tokenizer?"
            )

    def _check_options(self, method: Callable[..., Any], options: dict[str, Any]) -> None:
        known = _options(method)
        for name in options:
            if name not in known:
                raise UnknownNameError(
                    f"unknown option {name!r} of {self.name}.{did_you_mean(name, known)} "
                    f"Known: {', '.join(known) or 'none'}."
                )


class Progressive:
    """Images that are being encoded; made by `Tokenizer.progressive`.

    Attributes:
        ids: `(B, k)`, what has been encoded so far.
    """

    def __init__(self, tokenizer: Tokenizer, prefix: Callable[[int], Tensor]) -> None:
        self._tokenizer = tokenizer
        self._prefix = prefix
        self.ids: Tensor | None = None

    @torch.no_grad()
    def extend(self, tokens: int) -> Tensor:
        """The first `tokens` ids of every image, `(B, tokens)`; equal to those of `encode`.

        Raises:
            ParameterError: Out of range.
        """
        self._tokenizer._checked_lengths(tokens, 0)
        if self.ids is None or tokens > self.ids.shape[1]:
            self.ids = self._prefix(tokens)
        return self.ids[:, :tokens]


def _options(method: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(method).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
