"""Models with an image and a text encoder: the embedded one, open_clip's, and Hugging Face directories."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from visiontok.bench import models
from visiontok.bench.data import Transform
from visiontok.errors import (
    FormatError,
    MissingDependencyError,
    ParameterError,
    UnknownNameError,
    VisionTokError,
    did_you_mean,
)
from visiontok.models.tiny_clip import NAME as DEFAULT_CLIP

HF_PREFIX = "hf:"
_SCHEMES = ("hf-hub:", "local-dir:")

Tokens = Mapping[str, Tensor]


@dataclass(frozen=True)
class ClipModel(ABC):
    """A model with both encoders, and how its inputs are made.

    Attributes:
        model: The whole model, in eval mode; what `visiontok.patch` is given.
        transform: PIL image -> `(C, H, W)`.
        input_size: `(C, H, W)` of an image.
        random: Whether no weights were loaded.
    """

    model: nn.Module
    transform: Transform
    input_size: tuple[int, int, int]
    random: bool

    def around(self, model: nn.Module) -> ClipModel:
        """The same with another model of this kind, such as a patched copy."""
        return replace(self, model=model)

    @abstractmethod
    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Inputs of `encode_tokens`, of fixed length."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, D)`, not normalized."""

    @abstractmethod
    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """What `tokens` returns, on the model's device -> `(B, D)`, not normalized."""


@dataclass(frozen=True)
class OpenClip(ClipModel):
    """A model of open_clip, or one with the same methods.

    Attributes:
        tokenizer: texts -> `(B, L)` int64.
    """

    tokenizer: Any

    def tokens(self, texts: Sequence[str]) -> Tokens:
        return {"text": self.tokenizer(list(texts))}

    def encode_images(self, images: Tensor) -> Tensor:
        model: Any = self.model
        return model.encode_image(images)

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        model: Any = self.model
        return model.encode_text(**tokens)


@dataclass(frozen=True)
class HuggingFace(ClipModel):
    """A model of transformers with `get_image_features` and `get_text_features`.

    Attributes:
        processor: its tokenizer and image processor.
        length: tokens per text.
    """

    processor: Any
    length: int

    def tokens(self, texts: Sequence[str]) -> Tokens:
        # To the full length, as SigLIP was trained; CLIP masks what is padded.
        options = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        return dict(self.processor.tokenizer(list(texts), **options))

    def encode_images(self, images: Tensor) -> Tensor:
        model: Any = self.model
        return model.get_image_features(pixel_values=images).pooler_output

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        model: Any = self.model
        return model.get_text_features(**tokens).pooler_output


@dataclass(frozen=True)
class ProcessorTransform:
    """The image processor of a Hugging Face directory as a transform; picklable for loader processes."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        """`(C, H, W)` of a PIL image."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def load(
    name: str,
    *,
    pretrained: bool | str = False,
    checkpoint: str | Path | None = None,
    input_size: Sequence[int] | None = None,
    seed: int = 42,
) -> ClipModel:
    """Builds a model in eval mode.

    Args:
        name: `tiny_clip` (embedded and trained), a name of open_clip (`ViT-B-32`), its `hf-hub:OWNER/NAME` or
            `local-dir:PATH`, or `hf:PATH`, a directory that transformers saved, of CLIP or SigLIP.
        pretrained: open_clip's tag for a plain name (`laion2b_s34b_b79k`), fetched from the network or its cache.
            Without it, and without `checkpoint`, a plain name has random weights.
        checkpoint: weights to load instead, `.safetensors`, or a `.pt` that is read as tensors only.
        input_size: `(C, H, W)`, None for the model's own.
        seed: seed of weights that are not loaded.

    Raises:
        UnknownNameError: no such model, or it has no weights of that tag.
        ParameterError: an option that this kind of model does not take.
        FormatError: the weights do not fit.
        MissingDependencyError: the library is not installed.
        VisionTokError: something cannot be fetched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == DEFAULT_CLIP:
            found = _tiny(input_size)
        elif name.startswith(HF_PREFIX):
            found = _hugging_face(name, pretrained, input_size)
        else:
            found = _open_clip(name, pretrained, checkpoint, input_size)
    if checkpoint is not None:
        _load_checkpoint(found, checkpoint)
        found = replace(found, random=False)
    found.model.eval()
    return found


def _tiny(size: Sequence[int] | None) -> ClipModel:
    from visiontok.models.tiny_clip import INPUT_SIZE, SceneTransform, tiny_clip, tiny_tokenizer

    if size is not None and tuple(size) != INPUT_SIZE:
        raise ParameterError(f"{DEFAULT_CLIP} takes {INPUT_SIZE} images only, got {tuple(size)}; leave out --img-size")
    return OpenClip(tiny_clip(), SceneTransform(), INPUT_SIZE, False, tiny_tokenizer())


def _open_clip(
    name: str, pretrained: bool | str, checkpoint: str | Path | None, size: Sequence[int] | None
) -> ClipModel:
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(f"model '{name}' needs open_clip: pip install 'visiontok[clip]'") from error
    named = name.startswith(_SCHEMES)
    tag = None if named or checkpoint is not None else _tag(open_clip, name, pretrained)
    if not named and name not in open_clip.list_models():
        close = did_you_mean(name, [DEFAULT_CLIP, *open_clip.list_models()])
        raise UnknownNameError(
            f"unknown model '{name}'.{close} Known: {DEFAULT_CLIP}, open_clip.list_models(), hf-hub:OWNER/NAME, "
            f"local-dir:PATH, {HF_PREFIX}PATH"
        )
    fetch = checkpoint is None and (named or tag is not None)
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name,
            pretrained=tag,
            load_weights=fetch,
            pretrained_text=False,
            force_image_size=None if size is None else (int(size[1]), int(size[2])),
        )
        tokenizer = open_clip.get_tokenizer(name)
    except ImportError as error:
        raise MissingDependencyError(f"model '{name}' needs more than open_clip: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise VisionTokError(
            f"open_clip cannot load '{name}' (weights: {tag or 'its own' if fetch else 'none'}): "
            f"{next(iter(str(error).splitlines()), type(error).__name__)}. Without a network, use local-dir:PATH, or a "
            "plain name with --checkpoint FILE"
        ) from error
    visual: Any = model.visual
    preprocess: Any = transform
    height, width = _pair(visual.image_size)
    return OpenClip(model, preprocess, (3, height, width), not fetch, tokenizer)


def _tag(open_clip: Any, name: str, pretrained: bool | str) -> str | None:
    if pretrained is False:
        return None
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is True or pretrained not in tags:
        said = "--pretrained needs a tag" if pretrained is True else f"no weights '{pretrained}'"
        raise UnknownNameError(f"{name}: {said}; open_clip has: {', '.join(tags) or 'none'}")
    return pretrained


def _hugging_face(name: str, pretrained: bool | str, size: Sequence[int] | None) -> ClipModel:
    path = Path(name.removeprefix(HF_PREFIX)).expanduser()
    if not path.is_dir():
        raise ParameterError(
            f"'{path}' is no directory; {HF_PREFIX}PATH names one that transformers saved, nothing is downloaded "
            "(fetch it with `hf download`)"
        )
    if size is not None or isinstance(pretrained, str):
        flag = "--img-size" if size is not None else "a tag of --pretrained"
        raise ParameterError(f"{name} has its own size and weights; leave out {flag}")
    try:
        from transformers import AutoModel, AutoProcessor
    except ImportError as error:
        raise MissingDependencyError(f"model '{name}' needs transformers: pip install 'visiontok[mllm]'") from error
    try:
        model: Any = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise FormatError(f"transformers cannot load '{path}': {' '.join(str(error).split())[:400]}") from error
    kind = type(model).__name__
    if not hasattr(model, "get_text_features") or not hasattr(processor, "tokenizer"):
        raise ParameterError(f"'{path}' holds {kind}, which has no image and text encoder; CLIP and SigLIP have")
    vision = model.config.vision_config
    if not hasattr(vision, "image_size"):
        raise ParameterError(f"'{path}' holds {kind}, whose images have no fixed size; that kind is not supported")
    height, width = _pair(vision.image_size)
    length = model.config.text_config.max_position_embeddings
    transform = ProcessorTransform(processor.image_processor)
    return HuggingFace(model, transform, (3, height, width), False, processor, length)


def _load_checkpoint(found: ClipModel, path: str | Path) -> None:
    if not isinstance(found, OpenClip):
        return models.load_checkpoint(found.model, path)
    from open_clip.model import convert_to_custom_text_state_dict

    from visiontok.core.learned import CHILD
    from visiontok.models.checkpoints import read_checkpoint

    state = {key: value for key, value in read_checkpoint(path).items() if CHILD not in key.split(".")}
    if "positional_embedding" in state and not hasattr(found.model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    try:
        found.model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise FormatError(f"checkpoint '{path}' does not fit {type(found.model).__name__}: {error}") from error


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
