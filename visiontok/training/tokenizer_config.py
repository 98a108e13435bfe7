"""Recipes for training tokenizers: plain values, shipped as YAML in `visiontok/training/recipes/`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from visiontok.errors import FormatError, ParameterError, UnknownNameError, did_you_mean

__all__ = ["RECIPES", "TokenizerRecipe", "load_tokenizer_recipe"]

RECIPES = Path(__file__).parent / "recipes"
STAGES = {"titok": ("joint", "proxy", "decoder"), "one_d_piece": ("joint", "proxy", "decoder"), "flextok": ("flow",)}


@dataclass(frozen=True)
class TokenizerRecipe:
    """How one tokenizer is trained.

    Attributes:
        family: "one_d_piece", "titok" or "flextok".
        model: The family's config.
        stage: "joint" trains all on squared error and the quantiser's loss; "proxy" on the cross-entropy against a
            teacher's pixel codes (One-D-Piece's first stage); "decoder" the decoder alone on squared error (its
            second); "flow" is FlexTok's rectified flow.
        updates: Steps of the optimizer.
        batch_size: Images per step.
        lr, min_lr: Highest and last learning rate: linear warm-up, then a cosine.
        warmup: Steps of warm-up.
        betas, weight_decay: Of AdamW; vectors, embeddings and tokens are not decayed.
        clip_grad: Longest gradient, or None.
        ema: Decay of the averaged weights, which are those that are saved; 0 for none.
        amp: bfloat16 autocast.
        seed: Of everything random.
        drop: Tokens kept in training: "tail" (one number per batch) or FlexTok's "uniform", "pow2", "uniform_pow2"
            (one per image), or "none".
        null_dropout: Share of images without condition (flow).
        noise: Distribution of noise levels (flow), see `tokenizer_noise.noise_levels`.
        mode_scale: Of the noise "mode".
        quantizer_weight: Of the quantiser's loss.
        restart_every: Steps after which codes that were never used are placed anew; 0 for never.
        repa: timm model whose features a decoder layer learns to predict (arXiv:2410.06940), or None (flow).
        repa_layer, repa_weight: Which layer, and the weight of that loss.
        perceptual: timm classifier whose logits are to be those of the image, or None ("joint", "decoder").
        perceptual_weight: Weight of that loss.
        adversarial_weight: Of a discriminator's hinge loss, 0 for none ("joint", "decoder").
        adversarial_start: Updates before it acts.
        lecam_weight: Of the discriminator's LeCam term.
        augment: Small random shifts, scales and rotations; for digits.
        log_every, checkpoint_every: In steps.
    """

    family: str
    model: dict[str, Any]
    stage: str = "joint"
    updates: int = 1_000_000
    batch_size: int = 128
    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup: int = 10_000
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip_grad: float | None = 1.0
    ema: float = 0.999
    amp: bool = False
    seed: int = 0
    drop: str = "tail"
    null_dropout: float = 0.1
    noise: str = "mode"
    mode_scale: float = 0.25
    quantizer_weight: float = 1.0
    restart_every: int = 0
    repa: str | None = None
    repa_layer: int = 1
    repa_weight: float = 0.5
    perceptual: str | None = None
    perceptual_weight: float = 0.1
    adversarial_weight: float = 0.0
    adversarial_start: int = 20_000
    lecam_weight: float = 0.001
    augment: bool = False
    log_every: int = 100
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        if self.family not in STAGES:
            raise UnknownNameError(
                f"unknown family {self.family!r}.{did_you_mean(self.family, STAGES)} Known: {', '.join(STAGES)}."
            )
        if self.stage not in STAGES[self.family]:
            known = ", ".join(STAGES[self.family])
            raise ParameterError(f"stage of {self.family} must be one of {known}, got {self.stage!r}.")
        kinds = ("uniform", "pow2", "uniform_pow2", "none") if self.stage == "flow" else ("tail", "none")
        if self.drop not in kinds:
            raise ParameterError(f"drop in stage {self.stage} must be one of {', '.join(kinds)}, got {self.drop!r}.")
        if self.stage in ("proxy", "flow") and (self.perceptual or self.adversarial_weight):
            raise ParameterError(
                f"perceptual and adversarial_weight need decoded images, which stage {self.stage!r} does not make."
            )
        for name in ("updates", "batch_size", "log_every", "checkpoint_every"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ParameterError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in ("null_dropout", "ema"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ParameterError(f"{name} must be in [0, 1), got {value!r}.")
        if not self.lr > 0 or self.min_lr > self.lr:
            raise ParameterError(f"lr must be positive and not below min_lr, got {self.lr!r} and {self.min_lr!r}.")

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}


def load_tokenizer_recipe(name: str | Path, **changes: Any) -> TokenizerRecipe:
    """A recipe by the name of a shipped one or from a YAML file, with some values changed.

    Raises:
        UnknownNameError: Neither a file nor a shipped recipe, or an unknown setting.
        FormatError: The file is no mapping.
        ParameterError: A value is out of range.
    """
    path = Path(name)
    shipped = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if not path.is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise UnknownNameError(
            f"no recipe {str(name)!r}.{did_you_mean(str(name), shipped)} Shipped: {', '.join(shipped)}."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{path.name} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path.name} must be a mapping of settings, got {type(values).__name__}.")
    values |= changes
    known = [f.name for f in dataclasses.fields(TokenizerRecipe)]
    for key in values:
        if key not in known:
            raise UnknownNameError(f"unknown setting {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}.")
    if isinstance(values.get("betas"), list):
        values["betas"] = tuple(values["betas"])
    try:
        return TokenizerRecipe(**values)
    except TypeError as error:
        raise FormatError(f"{path.name}: {error}") from None
