"""Objectives of tokenizers: what one batch costs, by stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.errors import MissingDependencyError, ParameterError
from visiontok.training.adversarial import Adversary, Perceptual
from visiontok.training.tokenizer_config import TokenizerRecipe
from visiontok.training.tokenizer_noise import keep_lengths, noise_levels, noised, tail_token_drop

__all__ = ["FlowObjective", "Repa", "VqObjective", "make_objective"]

Codes = Callable[[Tensor], Tensor]


class VqObjective(nn.Module):
    """Stages "joint", "proxy" and "decoder" of TiTok and One-D-Piece.

    Attributes:
        used: `(V,)`, how often each code was chosen since unused ones were last placed anew.
    """

    used: Tensor

    def __init__(self, recipe: TokenizerRecipe, model: Any, codes: Codes | None) -> None:
        super().__init__()
        if (recipe.stage == "proxy") != (codes is not None):
            raise ParameterError("codes, a teacher's `codes(images) -> (B, P)`, goes with the stage 'proxy' only.")
        if recipe.stage == "proxy" and model.config["pixel"] is None:
            raise ParameterError("the stage 'proxy' needs a model with a pixel codebook; use 'joint'.")
        self.recipe, self.codes = recipe, codes
        self.perceptual = Perceptual(recipe.perceptual) if recipe.perceptual else None
        self.adversary = None
        if recipe.adversarial_weight:
            self.adversary = Adversary(
                recipe.adversarial_start, recipe.lecam_weight, recipe.betas, recipe.weight_decay, recipe.clip_grad
            )
        self.register_buffer("used", torch.zeros(model.codebook_size, dtype=torch.long))

    def trained(self, model: Any) -> list[nn.Parameter]:
        """The parameters of the stage."""
        if self.recipe.stage != "decoder":
            return list(model.parameters())
        parts = (model.decoder, *(getattr(model, n) for n in ("pixel_quantize", "pixel_decoder") if hasattr(model, n)))
        return [p for part in parts for p in part.parameters()]

    def forward(self, model: Any, images: Tensor, rng: np.random.RandomState) -> dict[str, Tensor]:
        frozen = self.recipe.stage == "decoder"
        with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
            z = model.latents(images)
            codes, losses, ids = model.quantize_latents(z)
        self.used += torch.bincount(ids.flatten(), minlength=len(self.used))
        self._z = z.detach()
        if self.recipe.drop == "tail":
            codes = codes[..., : tail_token_drop(model.length, rng)]
        logits = model.logits(codes.to(z.dtype))
        if self.codes is not None:
            parts = {"cross_entropy": F.cross_entropy(logits.flatten(2).float(), self.codes(images))}
        else:
            parts = self._looks(model.pixels(logits).float(), images)
        if not frozen:
            parts["quantizer"] = losses["total"]
        recipe = self.recipe
        weights = {
            "quantizer": recipe.quantizer_weight,
            "perceptual": recipe.perceptual_weight,
            "adversarial": recipe.adversarial_weight,
        }
        total = sum(weights.get(name, 1.0) * value for name, value in parts.items())
        return {"loss": torch.as_tensor(total), **parts}

    def _looks(self, made: Tensor, images: Tensor) -> dict[str, Tensor]:
        self._pair = images, made.detach()
        with torch.autocast(made.device.type, enabled=False):
            parts = {"l2": F.mse_loss(made, images)}
            if self.perceptual is not None:
                parts["perceptual"] = self.perceptual(made, images)
            if self.adversary is not None and self.adversary.acts:
                parts["adversarial"] = self.adversary.loss(made)
        return parts

    def after(self, model: Any, update: int, rate: float) -> None:
        """Trains the discriminator, and places codes that nobody used on latents of the last batch."""
        if self.adversary is not None:
            self.adversary.step(*self._pair, rate)
        every = self.recipe.restart_every
        if every and not update % every:
            self._restart(model)

    @torch.no_grad()
    def _restart(self, model: Any) -> None:
        unused = (self.used == 0).nonzero()[:, 0]
        rows = self._z[:, :, 0].transpose(1, 2).reshape(-1, self._z.shape[1]).to(model.codebook.dtype)
        model.codebook[unused] = rows[torch.randint(len(rows), (len(unused),), device=rows.device)]
        self.used.zero_()


class Repa(nn.Module):
    """A head on a decoder layer that predicts a frozen model's features (REPA, arXiv:2410.06940).

    Args:
        name: timm model; its patch tokens are the features.
        width: Of the decoder layer.
        grid: Patches of the decoder per side.
        pretrained: Load timm's weights.

    Raises:
        MissingDependencyError: timm is not installed.
    """

    def __init__(self, name: str, width: int, grid: int, pretrained: bool = True) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise MissingDependencyError("REPA needs timm: pip install 'visiontok[timm]'") from error
        teacher: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True).eval()
        self._teacher = [teacher.requires_grad_(False)]
        self.grid = grid
        hidden = max(width, teacher.num_features)
        self.head = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, teacher.num_features),
        )  # fmt: skip

    def forward(self, patches: Tensor, images: Tensor) -> Tensor:
        """One minus the mean cosine of head(patches) and the teacher's features of images in [0, 1]."""
        teacher = self._teacher[0].to(images.device)
        with torch.no_grad():
            mean, std = (
                torch.tensor(teacher.pretrained_cfg[key], device=images.device).view(1, 3, 1, 1)
                for key in ("mean", "std")
            )
            size = self.grid * teacher.patch_embed.patch_size[0]
            scaled = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
            features = teacher.forward_features((scaled - mean) / std)[:, teacher.num_prefix_tokens :]
        return 1 - F.cosine_similarity(self.head(patches).float(), features.float(), dim=-1).mean()


class FlowObjective(nn.Module):
    """FlexTok's rectified flow: squared error of v = noise - latents, nested dropout, null condition, REPA."""

    def __init__(self, recipe: TokenizerRecipe, model: Any) -> None:
        super().__init__()
        self.recipe = recipe
        grid = model.config["latent_size"] // model.config["patch_size"]
        width = model.config["decoder"]["dim"]
        self.repa = None if recipe.repa is None else Repa(recipe.repa, width, grid)

    def trained(self, model: Any) -> list[nn.Parameter]:
        """All but the VAE and the fixed position tables."""
        frozen = {id(p) for p in model.vae.parameters()} if hasattr(model, "vae") else set()
        return [p for p in model.parameters() if p.requires_grad and id(p) not in frozen]

    def forward(self, model: Any, images: Tensor, rng: np.random.RandomState) -> dict[str, Tensor]:
        recipe, rows = self.recipe, len(images)
        with torch.no_grad():
            clean = model.to_latents(images)
        codes, _ = model.quantize(model.registers(clean))
        raw = torch.randn(rows) if recipe.noise == "logit_normal" else torch.rand(rows)
        level = noise_levels(recipe.noise, raw, recipe.mode_scale).to(images.device)
        noise = torch.randn(clean.shape).to(clean)
        keep = None if recipe.drop == "none" else keep_lengths(recipe.drop, rows, model.length, rng).to(images.device)
        drop = (torch.rand(rows) < recipe.null_dropout).to(images.device)
        layer = None if self.repa is None else recipe.repa_layer
        found = model.velocity(noised(clean, noise, level), level, codes, keep, drop, hidden=layer)
        v, patches = found if layer is not None else (found, None)
        parts = {"flow": F.mse_loss(v.float(), noise - clean)}
        if self.repa is not None:
            parts["repa"] = self.repa(patches, images)
        total = parts["flow"] + recipe.repa_weight * parts.get("repa", 0.0)
        return {"loss": total, **parts}

    def after(self, model: Any, update: int, rate: float) -> None:
        """Nothing is left to do after an update."""


def make_objective(recipe: TokenizerRecipe, model: Any, codes: Codes | None) -> Any:
    """The objective of a recipe's stage."""
    if recipe.stage != "flow":
        return VqObjective(recipe, model, codes)
    if codes is not None:
        raise ParameterError("codes goes with the stage 'proxy' only.")
    return FlowObjective(recipe, model)
