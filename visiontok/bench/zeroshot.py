"""Zero-shot classification: class embeddings from prompts, images by their nearest class (CLIP, arXiv:2103.00020)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visiontok.errors import FormatError, MissingDependencyError, ParameterError

Template = Callable[[str], str]
EncodeText = Callable[[Sequence[str]], Tensor]

BUILT_IN = ("openai", "simple")
_SYNSET = re.compile(r"n\d{8}")
_FIELD = re.compile(r"\{c?\}")
_MAX_BYTES = 4 << 20


@torch.inference_mode()
def class_embeddings(
    encode_text: EncodeText, names: Sequence[str], templates: Sequence[Template], batch_size: int = 256
) -> Tensor:
    """One embedding per class: the mean of its normalized prompts, normalized again.

    Args:
        encode_text: texts -> `(n, D)` embeddings of any length and dtype.
        names: class names.
        templates: class name -> prompt.
        batch_size: prompts per call of `encode_text`.

    Returns:
        `(classes, D)` float32 of length 1.
    """
    prompts = [template(name) for name in names for template in templates]
    parts = [unit(encode_text(prompts[start : start + batch_size])) for start in range(0, len(prompts), batch_size)]
    return unit(torch.cat(parts).view(len(names), len(templates), -1).mean(dim=1))


def scores(encode_image: Callable[[Tensor], Tensor], classes: Tensor) -> Callable[[Tensor], Tensor]:
    """A classifier for `accuracy.predict`: images `(B, C, H, W)` -> cosines `(B, classes)`, float32."""

    def classify(images: Tensor) -> Tensor:
        return unit(encode_image(images)) @ classes.T

    return classify


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings `(n, D)` in float32 and of length 1.

    Raises:
        ParameterError: one is not finite; compared with anything it would count as neither better nor worse.
    """
    embeddings = embeddings.float()
    if not bool(torch.isfinite(embeddings).all()):
        raise ParameterError("the model returned embeddings that are not finite; try --model-dtype float32")
    return F.normalize(embeddings, dim=-1)


def load_templates(source: str) -> list[Template]:
    """Prompt templates.

    Args:
        source: `openai` (80) or `simple` (7), as open_clip has them; or a file with one template per line, in which
            `{}` or `{c}` stands for the class name.

    Raises:
        ParameterError: no such file.
        FormatError: it has no template, or a line without exactly one place for the name.
    """
    if source in BUILT_IN:
        metadata = _open_clip("templates")
        return list(getattr(metadata, f"{source.upper()}_IMAGENET_TEMPLATES"))
    lines = _lines(source, "--templates", f"; built in: {', '.join(BUILT_IN)}")
    for number, line in enumerate(lines, 1):
        if len(_FIELD.findall(line)) != 1:
            raise FormatError(f"templates '{source}', template {number}: {line!r} needs the class name once, as {{}}")
    if not lines:
        raise FormatError(f"templates '{source}' are empty; write one per line, such as: a photo of a {{}}.")
    return [from_text(line) for line in lines]


def from_text(text: str) -> Template:
    """A template from a text with `{}` or `{c}`; nothing else in it is interpreted."""
    before, after = _FIELD.split(text, maxsplit=1)
    return lambda name: f"{before}{name}{after}"


def class_names(folders: Sequence[str], source: str | None = None) -> list[str]:
    """What classes are called in prompts.

    Args:
        folders: sorted names of the class folders.
        source: file with one name per line, or a JSON list, in the order of the folders. None takes the folder names
            with spaces for underscores, or open_clip's 1000 ImageNet names where the folders are its synsets.

    Raises:
        ParameterError: no such file, or folders whose names are no words.
        FormatError: the file does not name each folder once.
    """
    if source is None:
        return _names_of(folders)
    lines = _lines(source, "--class-names")
    text = "\n".join(lines)
    names: Any = lines
    if text.startswith(("[", "{")):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise FormatError(f"class names '{source}' are no JSON list: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise FormatError(f"class names '{source}' must be lines of text or a JSON list of texts")
    if len(names) != len(folders):
        raise FormatError(
            f"'{source}' has {len(names)} class names for {len(folders)} class folders; "
            "give one per folder, in the sorted order of the folders"
        )
    return [name.strip() for name in names]


def _names_of(folders: Sequence[str]) -> list[str]:
    if not all(_SYNSET.fullmatch(folder) for folder in folders):
        return [folder.replace("_", " ") for folder in folders]
    if len(folders) != 1000:
        raise ParameterError(
            f"{len(folders)} class folders are named by synset ({folders[0]}, ...), which no text encoder knows; "
            "give their names with --class-names"
        )
    return list(_open_clip("ImageNet class names").IMAGENET_CLASSNAMES)


def _open_clip(what: str) -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(f"the {what} come with open_clip: pip install 'visiontok[clip]'") from error
    return open_clip


def _lines(source: str, flag: str, more: str = "") -> list[str]:
    path = Path(source)
    if not path.is_file():
        raise ParameterError(f"{flag} '{source}' is no file{more}")
    if path.stat().st_size > _MAX_BYTES:
        raise FormatError(f"{flag} '{source}' is larger than {_MAX_BYTES >> 20} MB")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{flag} '{source}' is not UTF-8 text: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
