"""A small trained CLIP, so that zero-shot classification and retrieval run offline with real numbers.

`tiny_clip` is open_clip's own `CLIP` class: a ViT of 6 blocks on 64 patches and a class token, and a causal text
transformer over words. `benchmarks/train_tiny_clip.py` trained it on `visiontok.bench.scenes`; nothing in the training
knows of token reduction. The file holds the weights (fp16) and, as metadata, configuration, vocabulary and how it was
made: `tiny_clip_info`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visiontok.errors import FormatError, MissingDependencyError
from visiontok.models.tiny import METADATA_KEY, WEIGHTS_DIR, MissingWeightsError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image
    from torch import Tensor, nn

NAME = "tiny_clip"
INPUT_SIZE = (3, 64, 64)
MEAN = STD = (0.5, 0.5, 0.5)
CONTEXT_LENGTH = 16
_PAD, _START, _UNKNOWN, _FIRST_WORD = 0, 1, 2, 3


class WordTokenizer:
    """Whole words as tokens, called like open_clip's tokenizers.

    The end token has the largest id, so that open_clip's `argmax` pooling finds it; a text that is too long is cut
    before it. Case and punctuation are ignored.

    Args:
        words: The vocabulary.
        context_length: Tokens per text, start and end included.
    """

    def __init__(self, words: Sequence[str], context_length: int = CONTEXT_LENGTH) -> None:
        self.words = tuple(words)
        self.context_length = context_length
        self.end = _FIRST_WORD + len(self.words)
        self._ids = {word: number for number, word in enumerate(self.words, _FIRST_WORD)}

    @property
    def vocab_size(self) -> int:
        """Ids in use."""
        return self.end + 1

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """`(B, context_length)` int64 ids: start, words, end, zeros."""
        import torch

        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        ids = torch.full((len(texts), length), _PAD, dtype=torch.int64)
        for row, text in enumerate(texts):
            words = [self._ids.get(word, _UNKNOWN) for word in re.findall(r"[a-z0-9]+", text.lower())]
            line = [_START, *words[: length - 2], self.end]
            ids[row, : len(line)] = torch.tensor(line)
        return ids


@dataclass(frozen=True)
class SceneTransform:
    """Turns a PIL image of any mode into what `tiny_clip` expects: 64x64, squeezed rather than cropped, in [-1, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        """`(3, 64, 64)` float32: `(value / 255 - 0.5) / 0.5`."""
        import numpy as np
        import torch
        from PIL import Image

        size = (INPUT_SIZE[2], INPUT_SIZE[1])
        image = image.convert("RGB")
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def normalize(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape as float32 in [-1, 1]."""
    return (pixels.float() / 255 - MEAN[0]) / STD[0]


def tiny_clip(pretrained: bool = True) -> nn.Module:
    """The shipped model: open_clip's `CLIP` of 6 visual blocks (65 tokens) and 3 text blocks, both 64 wide.

    Args:
        pretrained: Load the shipped weights; otherwise open_clip's random initialization.

    Returns:
        The model in eval mode and fp32.

    Raises:
        MissingDependencyError: open_clip is not installed.
        FormatError, MissingWeightsError: The shipped file is broken or not there.
    """
    try:
        from open_clip.model import CLIP
    except ImportError as error:
        raise MissingDependencyError(
            "tiny_clip is built by open_clip, which is not installed: pip install 'visiontok[clip]'"
        ) from error

    model = CLIP(**configuration(tiny_tokenizer(pretrained)))
    if pretrained:
        _load(model)
    return model.eval()


def tiny_tokenizer(pretrained: bool = True) -> WordTokenizer:
    """The tokenizer of `tiny_clip`: with the vocabulary of the shipped file, or with today's words of the scenes."""
    if pretrained:
        info = tiny_clip_info()
        return WordTokenizer(info["vocabulary"], info["config"]["text_cfg"]["context_length"])
    from visiontok.bench.scenes import vocabulary

    return WordTokenizer(vocabulary())


def configuration(tokenizer: WordTokenizer) -> dict[str, Any]:
    """Arguments of open_clip's `CLIP`, in plain values."""
    return {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": INPUT_SIZE[1],
            "patch_size": 8,
            "width": 64,
            "layers": 6,
            "head_width": 32,
            "mlp_ratio": 3.0,
            "no_ln_pre": True,
        },
        "text_cfg": {
            "context_length": tokenizer.context_length,
            "vocab_size": tokenizer.vocab_size,
            "width": 64,
            "heads": 2,
            "layers": 3,
            "mlp_ratio": 3.0,
        },
    }


def tiny_clip_path() -> Path:
    """Where the weights are shipped."""
    return WEIGHTS_DIR / f"{NAME}_scenes.safetensors"


def tiny_clip_info() -> dict[str, Any]:
    """Configuration, vocabulary, training command, seed, measured accuracy and recall, versions, data source."""
    from safetensors import SafetensorError, safe_open

    path = tiny_clip_path()
    if not path.is_file():
        raise MissingWeightsError(
            f"the weights of {NAME} are not at {path}, where the package ships them. Reinstall visiontok or train "
            f"them with `python benchmarks/train_tiny_clip.py --out {path}`."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[METADATA_KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        raise FormatError(f"{path} does not hold the weights of {NAME}; reinstall visiontok. {error}") from error


def _load(model: nn.Module) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = tiny_clip_path()
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise FormatError(f"{path} does not hold the weights of {NAME}; reinstall visiontok. {error}") from error
