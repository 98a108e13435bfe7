"""Two small trained ViTs and their data set, so that everything runs offline with a real accuracy.

`tiny_vit` has DeiT's anatomy (12 blocks, a class token, head dimension 32) at 64 patch tokens and 0.5 M parameters;
`tiny_vit_small_dense` is the same model with 6 blocks: the baseline every reduction has to beat. Both were trained by
`benchmarks/train_tiny.py` on scikit-learn's handwritten digits (UCI optdigits, CC BY 4.0), plainly: nothing in the
training knows of token reduction. How, and with which result, is in the weights file: `tiny_weights_info`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontok.errors import FormatError, MissingDependencyError, ParameterError, UnknownNameError, VisionTokError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from PIL import Image
    from torch import Tensor, nn

WEIGHTS_DIR = Path(__file__).parent / "weights"
CLASS_NAMES = tuple("0123456789")
INPUT_SIZE = (3, 32, 32)
MEAN = STD = (0.5, 0.5, 0.5)

# One key with JSON in it: safetensors writes several keys in an order that changes from run to run.
METADATA_KEY = "visiontok"

_DEPTHS = {"tiny_vit": 12, "tiny_vit_small_dense": 6}
_TEST_PER_CLASS = 50
_SPLIT_SEED = 0


class MissingWeightsError(VisionTokError, FileNotFoundError):
    """A weights file that the package ships is not there."""


def tiny_vit(pretrained: bool = True) -> nn.Module:
    """The shipped model: a timm `VisionTransformer` of 12 blocks and 64 patch tokens + CLS, classifying digits.

    Args:
        pretrained: Load the shipped weights; otherwise timm's random initialization.

    Returns:
        The model in eval mode and fp32. It maps images `(B, 3, 32, 32)` as `tiny_transform` makes them to logits
        `(B, 10)` and carries `pretrained_cfg`, from which timm's own tools derive the same transform.
    """
    return _build("tiny_vit", pretrained)


def tiny_vit_small_dense(pretrained: bool = True) -> nn.Module:
    """The smaller dense model: `tiny_vit` with 6 blocks, half the compute, trained alike. Same interface."""
    return _build("tiny_vit_small_dense", pretrained)


TINY_MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "tiny_vit": tiny_vit,
    "tiny_vit_small_dense": tiny_vit_small_dense,
}


def tiny_weights_path(name: str) -> Path:
    """Where the weights of a name in `TINY_MODELS` are shipped."""
    if name not in _DEPTHS:
        raise UnknownNameError(f"unknown tiny model {name!r}; choose one of {', '.join(_DEPTHS)}")
    return WEIGHTS_DIR / f"{name}_digits.safetensors"


def tiny_weights_info(name: str) -> dict[str, str]:
    """How shipped weights came to be: training command, seed, test accuracy, library versions, data source."""
    from safetensors import safe_open

    with safe_open(_existing_weights(name), framework="pt") as file:
        return json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))


@dataclass(frozen=True)
class TinyTransform:
    """Turns a PIL image of any mode into the tensor the tiny models expect.

    The models were trained on bright strokes over a dark ground, so transparency is laid over black; invert dark ink
    on white paper first. The whole image is squeezed to 32x32: a crop would cut off a digit drawn to the edge.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert, resize and normalize one image.

        Returns:
            `(3, 32, 32)` float32 in [-1, 1]: `(value / 255 - 0.5) / 0.5`.
        """
        import numpy as np
        import torch
        from PIL import Image

        resized = _to_rgb(image).resize((INPUT_SIZE[2], INPUT_SIZE[1]), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255  # (3, 32, 32)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (pixels - mean) / std


def tiny_transform() -> TinyTransform:
    """The preprocessing of both tiny models; picklable, so it can go to DataLoader workers."""
    return TinyTransform()


@dataclass(frozen=True, eq=False)
class DigitsSplit:
    """The handwritten digits in a fixed stratified split: 1297 to train, 500 (50 of each class) to test.

    The images are tensors after `tiny_transform`: `(n, 3, 32, 32)` float32 in [-1, 1], ready for the model. The
    indices are rows of `sklearn.datasets.load_digits()`. That set names no writers, so a writer may be on both sides:
    the accuracy is that of new scans, not of new writers.
    """

    train_images: Tensor
    train_labels: Tensor
    train_indices: Tensor
    test_images: Tensor
    test_labels: Tensor
    test_indices: Tensor
    scans: np.ndarray
    class_names: tuple[str, ...] = CLASS_NAMES

    def image(self, i: int, part: str = "test") -> Image.Image:
        """The scan behind `test_images[i]` (or `train_images[i]`): 8x8, mode L, before `tiny_transform`."""
        indices = {"test": self.test_indices, "train": self.train_indices}.get(part)
        if indices is None:
            raise ParameterError(f"part must be 'test' or 'train', got {part!r}")
        return _scan_image(self.scans, int(indices[i]))


def digits_split() -> DigitsSplit:
    """Load scikit-learn's bundled digits (no download) and split them; the same split for every seed and version."""
    import numpy as np
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn", "the handwritten digits come with it") from error

    digits: Any = load_digits()
    scans = digits.images.astype(np.uint8)  # (1797, 8, 8), 0 to 16
    labels = torch.from_numpy(digits.target).long()
    # NumPy guarantees RandomState's stream for all versions; train_test_split and default_rng guarantee nothing.
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(scans))
    held_out = [order[digits.target[order] == label][:_TEST_PER_CLASS] for label in range(len(CLASS_NAMES))]
    test = np.sort(np.concatenate(held_out))
    train = np.setdiff1d(np.arange(len(scans)), test)

    transform = tiny_transform()
    images = torch.stack([transform(_scan_image(scans, i)) for i in range(len(scans))])
    return DigitsSplit(
        train_images=images[train],
        train_labels=labels[train],
        train_indices=torch.from_numpy(train),
        test_images=images[test],
        test_labels=labels[test],
        test_indices=torch.from_numpy(test),
        scans=scans,
    )


def _build(name: str, pretrained: bool) -> nn.Module:
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise _missing("timm", f"{name} is a timm VisionTransformer") from error

    model: Any = VisionTransformer(
        img_size=INPUT_SIZE[1:],
        patch_size=4,
        num_classes=len(CLASS_NAMES),
        embed_dim=64,
        depth=_DEPTHS[name],
        num_heads=2,
        mlp_ratio=3.0,
    )
    model.pretrained_cfg = model.default_cfg = {
        "architecture": name,
        "num_classes": len(CLASS_NAMES),
        "input_size": INPUT_SIZE,
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": MEAN,
        "std": STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "label_names": CLASS_NAMES,
    }
    if pretrained:
        _load(model, _existing_weights(name))
    return model.eval()


def _existing_weights(name: str) -> Path:
    path = tiny_weights_path(name)
    if not path.is_file():
        raise MissingWeightsError(
            f"the weights of {name} are not at {path}, where the package ships them. Reinstall visiontok or train "
            f"them with `python benchmarks/train_tiny.py --model {name} --out {path}`."
        )
    return path


def _load(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise FormatError(f"{path} does not hold the weights of this model; reinstall visiontok. {error}") from error


def _missing(package: str, why: str) -> MissingDependencyError:
    return MissingDependencyError(f'{package} is not installed ({why}): pip install "visiontok[timm,bench]"')


def _scan_image(scans: np.ndarray, index: int) -> Image.Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.rint(scans[index] * (255 / 16)).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert() would clip 16-bit gray at 255 to a white image; Pillow before 10.3 opens 16-bit PNG as mode I.
        gray = np.asarray(image).astype(np.int64)
        gray = gray >> 8 if image.mode != "I" or gray.max() > 255 else gray
        return Image.fromarray(gray.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return image.convert("L").convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")
