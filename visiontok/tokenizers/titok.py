"""TiTok (arXiv:2406.07550): a fixed number of tokens per image, two-stage (legacy), VQ-8k and VAE models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from visiontok.errors import ParameterError
from visiontok.models.checkpoints import load_exactly
from visiontok.ops import vq
from visiontok.tokenizers.base import Tokenizer
from visiontok.tokenizers.checkpoint import read_weights
from visiontok.tokenizers.pixel_decoder import PixelDecoder
from visiontok.tokenizers.titok_config import infer_config, official_config
from visiontok.tokenizers.titok_modules import Codebook, Decoder, Encoder

__all__ = ["TiTok"]

_DTYPES = {None: torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


class TiTok(Tokenizer):
    """TiTok of any size. Takes and gives its full number of tokens only: it was trained for no other.

    Args:
        config: Plain values as `titok_config.infer_config` gives them. `quantize` "vae" makes tokens continuous:
            `encode` gives `(B, K, C)` float.
    """

    name: ClassVar[str] = "titok"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.length = self.shortest = config["length"]
        self.codebook_size = config["codebook_size"]
        self.image_size = config["image_size"]
        width = config["token_size"]
        continuous = config["quantize"] == "vae"
        self.latent_tokens = torch.nn.Parameter(torch.randn(self.length, config["encoder"]["width"]) * 0.02)
        self.encoder = Encoder(config, 2 * width if continuous else width)
        self.decoder = Decoder(config)
        if not continuous:
            self.add_module("quantize", Codebook(self.codebook_size, width))
        if config["pixel"] is not None:
            self.pixel_quantize = Codebook(config["pixel"]["codes"], config["pixel"]["z_channels"])
            self.pixel_decoder = PixelDecoder(config["pixel"])

    @classmethod
    def from_checkpoint(
        cls, source: str | Path | Mapping[str, Any], *, config: Mapping[str, Any] | None = None,
        filename: str | None = None, revision: str | None = None,
    ) -> Self:  # fmt: skip
        """A model with official or own weights, loaded strictly.

        Args:
            source: As in `checkpoint.read_weights`; `pytorch_model.bin` and `.safetensors` alike.
            config: Ours or an official one, as data; by default what is in or beside the file, else the shapes tell.
            filename: The file in a directory or repository.
            revision: Of the repository.

        Raises:
            FormatError: The weights or the config are not supported or do not fit; all misfits are named.
        """
        state, header = read_weights(source, filename, revision)
        known = config or header
        own = known.get("config", known)
        if "encoder" in own:
            settings: Mapping[str, Any] = own
        elif "model" in own or "vq_model" in own:
            settings = official_config(own)
        else:
            settings = infer_config(state)
        model = cls(settings)
        load_exactly(model, state)
        model.identify()
        return model.eval()

    # ---- parts

    def latents(self, images: Tensor) -> Tensor:
        """What the quantiser gets, `(B, d, 1, K)` (a VAE: mean and log-variance, `(B, 2 C, 1, K)`)."""
        return self.encoder(images, self.latent_tokens)

    def quantize_latents(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Vector quantisation in fp32.

        Args:
            z: `(B, d, 1, k)`.

        Returns:
            Codes like z with the gradient straight through, the losses "codebook", "commitment" and "total" (weighted
            with `commitment_cost`), and ids `(B, k)`.
        """
        rows = z[:, :, 0].transpose(1, 2).float()
        ids = vq.nearest(rows.reshape(-1, rows.shape[-1]).detach(), self.codebook, self._l2).view(rows.shape[:2])
        codes = vq.lookup(ids, self.codebook.float(), self._l2)
        rows = vq.lengthless(rows, self._l2)
        losses = {
            "codebook": (codes - rows.detach()).square().mean(),
            "commitment": self.config["commitment_cost"] * (codes.detach() - rows).square().mean(),
        }
        losses["total"] = losses["codebook"] + losses["commitment"]
        straight = rows + (codes - rows).detach()
        return straight.transpose(1, 2)[:, :, None], losses, ids

    @property
    def codebook(self) -> Tensor:
        """`(V, d)`."""
        part: Any = self.get_submodule("quantize")
        return part.embedding.weight

    def code_vectors(self, ids: Tensor) -> Tensor:
        """Rows of the codebook `(B, k, d)` of ids `(B, k)`; a VAE's vectors are their own."""
        return vq.lookup(ids, self.codebook, self._l2) if self.discrete else ids.to(self._dtype)

    def codes(self, ids: Tensor) -> Tensor:
        """`code_vectors` as latents `(B, d, 1, k)`."""
        return self.code_vectors(ids).transpose(1, 2)[:, :, None]

    def logits(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits over the pixel codes, `(B, V, g, g)`; of models without these the images themselves."""
        return self.decoder(codes, mask)

    def pixels(self, logits: Tensor) -> Tensor:
        """Images, not cut off, of logits: the pixel codes' expectation through the pixel decoder."""
        if self.config["pixel"] is None:
            return logits
        share = logits.float().softmax(1)
        weight = self.pixel_quantize.embedding.weight
        expected = torch.einsum("bvhw,vz->bzhw", share.to(weight.dtype), weight)
        return self.pixel_decoder(expected)

    def reconstruct_latents(self, codes: Tensor) -> Tensor:
        """Images of latents, differentiable."""
        return self.pixels(self.logits(codes))

    # ---- what the base class asks for

    def _encode(self, images: Tensor, tokens: int, *, posterior: str = "mode", noise: Tensor | None = None) -> Tensor:
        if posterior not in ("mode", "sample"):
            raise ParameterError(f"posterior must be 'mode' or 'sample', got {posterior!r}.")
        z = self.latents(images.to(self._dtype))
        if self.discrete:
            rows = z[:, :, 0].transpose(1, 2)
            return vq.nearest(rows.reshape(-1, rows.shape[-1]), self.codebook, self._l2).view(rows.shape[:2])[
                :, :tokens
            ]
        mean, spread = z[:, :, 0].chunk(2, 1)
        if posterior == "sample":
            noise = torch.randn_like(mean) if noise is None else noise.to(mean).view_as(mean)
            mean = mean + (0.5 * spread.clamp(-30, 20)).exp() * noise
        return mean.transpose(1, 2)[:, :tokens]

    def _decode(
        self, ids: Tensor, lengths: Sequence[int], *, pixel_dtype: str | None = None, bucket: bool = False
    ) -> Tensor:
        if pixel_dtype not in _DTYPES:
            raise ParameterError(f"pixel_dtype must be None, 'float32' or 'bfloat16', got {pixel_dtype!r}.")
        codes = self.codes(ids)
        count = codes.shape[-1]
        width = min(1 << max(count - 1, 0).bit_length(), self.length) if bucket else count
        codes = torch.nn.functional.pad(codes, (0, width - count))
        mask = None
        if min(lengths) < width:
            live = torch.arange(width, device=codes.device) < torch.tensor(list(lengths), device=codes.device)[:, None]
            mask = torch.nn.functional.pad(live, (1 + self.decoder.grid**2, 0), value=True)[:, None, None]
        logits = self.logits(codes, mask)
        with torch.autocast(logits.device.type, dtype=torch.bfloat16, enabled=pixel_dtype == "bfloat16"):
            images = self.pixels(logits)
        return images.float().contiguous()

    @property
    def _l2(self) -> bool:
        return bool(self.config["use_l2_norm"])

    @property
    def _dtype(self) -> torch.dtype:
        return self.latent_tokens.dtype
