"""FlexTok (arXiv:2502.13967): 1 to 256 ordered FSQ tokens, decoded by a rectified flow.

The same numbers as the official code, without its packing: dropped registers are all one vector and stay so in every
layer, so they are one token whose attention logit has log(count) added; so are the null registers of guidance.
Only the wanted registers are encoded, and what depends on time alone is computed once per time grid.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontok.errors import FormatError, MissingDependencyError, ParameterError
from visiontok.models.checkpoints import load_exactly
from visiontok.ops import fsq
from visiontok.tokenizers.base import Tokenizer
from visiontok.tokenizers.checkpoint import read_weights
from visiontok.tokenizers.flextok_config import from_official, variant_config
from visiontok.tokenizers.flextok_modules import Decoder, Encoder, Holder
from visiontok.tokenizers.flow import Guidance, Weight, sample, time_grid

__all__ = ["FlexTok"]

_NOTICE = (
    "The released FlexTok weights are under the 'Apple ML Research Model' licence: research only, no use in products, "
    "and the notice goes with every copy."
)
# Parts of the training that released files may carry: heads for REPA.
_TRAINING_KEYS = ("decoder.module_dict.dec_repa_", "encoder.module_dict.enc_repa_")


class FlexTok(Tokenizer):
    """FlexTok of any size.

    Args:
        config: Plain values as `flextok_config.variant_config` gives them. `vae` None is pixel space: latents are
            the image itself, scaled to [-1, 1].

    Raises:
        MissingDependencyError: There is a VAE, and diffusers is not installed.
    """

    name: ClassVar[str] = "flextok"
    licence: ClassVar[str] = _NOTICE
    shortest: int = 0

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.length = config["length"]
        self.levels = tuple(config["levels"])
        self.codebook_size = fsq.codebook_size(self.levels)
        self.image_size = config["image_size"]
        if config["vae"] is not None:
            self.vae = Holder(vae=_autoencoder(config["vae"]))
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_checkpoint(
        cls, source: str | Path | Mapping[str, Any], *, variant: str | None = None,
        config: Mapping[str, Any] | None = None, filename: str | None = None, revision: str | None = None,
    ) -> FlexTok:  # fmt: skip
        """A FlexTok with official or own weights, loaded strictly.

        Args:
            source: As in `checkpoint.read_weights`; hub ids are `EPFL-VILAB/flextok_d12_d12_in1k` and its like.
            variant: A released size, for files that bring no config.
            config: Our config, or an official one as data, in place of the file's.
            filename: The file in a directory or repository.
            revision: Of the repository.

        Raises:
            ParameterError: Neither the file nor an argument tells the config.
            FormatError: The config is not supported, or weights do not fit; all misfits are named.
        """
        state, header = read_weights(source, filename, revision)
        known = config or header
        own = known.get("config", known)
        if "encoder" in own and "module_dict" not in own["encoder"]:
            settings = own
        elif "encoder" in own:
            settings = from_official(own, known.get("vae_config"))
        elif variant is not None:
            settings = variant_config(variant)
        else:
            raise ParameterError("the file brings no config; pass variant='d12_d12', 'd18_d18' or 'd18_d28'.")
        model = cls(settings)
        load_exactly(model, state, drop=_TRAINING_KEYS)
        if header.get("family") != cls.name:
            warnings.warn(cls.licence, stacklevel=3)
        model.identify()
        return model.eval()

    # ---- parts

    def to_latents(self, images: Tensor, posterior: str = "mode", noise: Tensor | None = None) -> Tensor:
        """Latents `(B, C, h, w)` of images in [0, 1]; always fp32 in the VAE.

        Args:
            images: `(B, 3, H, W)`.
            posterior: "mode", or "sample" (the official default).
            noise: Of "sample", like the latents; default from the global generator.

        Raises:
            ParameterError: Another posterior.
        """
        if posterior not in ("mode", "sample"):
            raise ParameterError(f"posterior must be 'mode' or 'sample', got {posterior!r}.")
        signed = images * 2 - 1
        if self.config["vae"] is None:
            return signed
        with torch.autocast(images.device.type, enabled=False):
            found = self._vae.encode(signed.to(self._vae.dtype)).latent_dist
            latents = found.mean
            if posterior == "sample":
                noise = torch.randn_like(latents) if noise is None else noise.to(latents)
                latents = latents + found.std * noise
        return latents * self.config["scaling_factor"]

    def from_latents(self, latents: Tensor) -> Tensor:
        """Images, [0, 1] but not cut off, of latents."""
        if self.config["vae"] is None:
            return (latents + 1) / 2
        with torch.autocast(latents.device.type, enabled=False):
            scaled = (latents / self.config["scaling_factor"]).to(self._vae.dtype)
            return (self._vae.decode(scaled).sample + 1) / 2

    def registers(self, latents: Tensor, tokens: int | None = None) -> Tensor:
        """What the quantiser gets, `(B, tokens, d)`, of latents; of all registers by default."""
        count = self.length if tokens is None else tokens
        return self.encoder.extend(self.encoder.patch_keys(latents), 0, count)[0]

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `(B, k, d)`, gradient straight through, and ids `(B, k)`."""
        codes = fsq.quantize(z, self.levels)
        return codes, fsq.to_ids(codes.detach(), self.levels)

    def code_vectors(self, ids: Tensor) -> Tensor:
        """FSQ codes `(B, k, d)` of ids `(B, k)`."""
        return fsq.to_codes(ids, self.levels, self._dtype)

    def velocity(
        self, x: Tensor, t: Tensor, codes: Tensor, keep: Tensor | None = None, drop: Tensor | None = None,
        hidden: int | None = None,
    ) -> Any:  # fmt: skip
        """The network as it is trained: every register a token, one time per row.

        Args:
            x: `(B, C, h, w)`, t * noise + (1 - t) * latents.
            t: `(B,)` in (0, 1].
            codes: `(B, N, d)`.
            keep: `(B,)`, leading registers that are not dropped; default all.
            drop: `(B,)` bool, rows without condition.
            hidden: Also return the patches `(B, P, D)` after that block.

        Returns:
            v `(B, C, h, w)`, with `hidden` a pair.
        """
        r = self.decoder.registers(codes)
        if keep is not None:
            dropped = torch.arange(r.shape[1], device=r.device) >= keep[:, None]
            r = torch.where(dropped[..., None], self.decoder.mask_token.to(r.dtype), r)
        if drop is not None:
            r = torch.where(drop[:, None, None], self.decoder.null.to(r.dtype), r)
        states: list[Tensor] = []
        v = self.decoder(x, r, None, *self.decoder.modulation(t), hidden=None if hidden is None else states)
        return v if hidden is None else (v, states[hidden])

    def conditions(self, ids: Tensor, lengths: Sequence[int], bucket: bool = False) -> tuple[Tensor, Tensor | None]:
        """Merged registers and what is added to their logits.

        Args:
            ids: `(B, k)`, padded.
            lengths: Of the rows, at most k.
            bucket: Pad k to a power of two, so that compiled decoders see few shapes.

        Returns:
            Registers `(B, n, D)`, n = k + 1 or k, and a bias `(B, n)`: 0, log(dropped) for the last one, and minus
            infinity where there is nothing. None if nothing needs one.
        """
        width = min(_power_of_two(ids.shape[1]), self.length) if bucket else ids.shape[1]
        if width > ids.shape[1]:
            ids = torch.nn.functional.pad(ids, (0, width - ids.shape[1]))
        r = self.decoder.registers(self.code_vectors(ids))
        if min(lengths) == self.length:
            return r, None
        r = torch.cat([r, self.decoder.mask_token.expand(len(r), 1, -1).to(r.dtype)], 1)
        counts = torch.tensor(list(lengths), device=r.device)
        bias = torch.zeros(len(r), width + 1, device=r.device)
        bias[:, :width].masked_fill_(torch.arange(width, device=r.device) >= counts[:, None], -math.inf)
        # log(0) is what a row with all of its registers needs: no such token.
        bias[:, width] = (self.length - counts).log()
        return r, bias

    def time_table(self, times: Sequence[float]) -> tuple[Tensor, Tensor]:
        """`Decoder.modulation` of a time grid, kept until the weights change."""
        weights = [p for name, p in self.decoder.named_parameters() if "adaLN" in name or "time_embedder" in name]
        key = (tuple(times), *((p.data_ptr(), p._version) for p in weights[:1] + weights[-1:]), weights[0].dtype)
        if key not in self._tables:
            self._tables = {key: self.decoder.modulation(torch.tensor(list(times), device=self.device))}
        return self._tables[key]

    # ---- what the base class asks for

    def _takes(self, shape: tuple[int, ...]) -> bool:
        unit = self.config["patch_size"] * self.image_size // self.config["latent_size"]
        sides = shape[2:]
        return len(shape) == 4 and shape[1] == 3 and all(0 < s <= self.image_size and s % unit == 0 for s in sides)

    def _encode(self, images: Tensor, tokens: int, *, posterior: str = "mode", noise: Tensor | None = None) -> Tensor:
        latents = self.to_latents(images.float(), posterior, noise).to(self._dtype)
        return self.quantize(self.registers(latents, tokens))[1]

    def _progressive(self, images: Tensor) -> Callable[[int], Tensor]:
        keys = self.encoder.patch_keys(self.to_latents(images.float()).to(self._dtype))
        done = torch.empty(len(images), 0, dtype=torch.long, device=images.device)

        def prefix(tokens: int) -> Tensor:
            nonlocal keys, done
            if tokens > done.shape[1]:
                z, keys = self.encoder.extend(keys, done.shape[1], tokens)
                done = torch.cat([done, self.quantize(z)[1]], 1)
            return done[:, :tokens]

        return prefix

    def _decode(
        self, ids: Tensor, lengths: Sequence[int], *, steps: int = 25, guidance: Weight = 7.5,
        norm_guidance: bool = True, interval: tuple[float, float] = (0.0, 1.0), solver: str = "euler",
        shift: float = 1.0, seed: int | Sequence[int] = 0, noise: Tensor | None = None,
        preview: Callable[[int, Tensor], object] | None = None, bucket: bool = False,
    ) -> Tensor:  # fmt: skip
        times = time_grid(steps, shift)
        noise = self._noise(len(ids), seed) if noise is None else noise.to(self.device, torch.float32)
        show = None if preview is None else (lambda step, x: preview(step, self.from_latents(x)))
        network = self._network(ids, lengths, times, noise, bucket)
        latents = sample(network, noise, times, Guidance(guidance, norm_guidance, interval), solver, show)
        return self.from_latents(latents)

    # ---- sampling

    def _network(
        self, ids: Tensor, lengths: Sequence[int], times: Sequence[float], noise: Tensor, bucket: bool
    ) -> Callable[[Tensor, float, bool], Tensor]:
        """The velocity with everything ready that does not depend on x."""
        patches = noise.shape[2] * noise.shape[3] // self.config["patch_size"] ** 2
        r, bias = self.conditions(ids, lengths, bucket)
        null = self.decoder.null.expand(len(r), 1, -1).to(r.dtype)
        full = torch.full((1, 1), math.log(self.length), device=r.device)
        given = {True: (r, _mask(bias, patches, r.dtype)), False: (null, _mask(full, patches, r.dtype))}
        blocks, heads = self.time_table(times[:-1])
        number = {t: i for i, t in enumerate(times)}

        def velocity(x: Tensor, t: float, conditional: bool) -> Tensor:
            registers, mask = given[conditional]
            i = number[t]
            return self.decoder(x.to(r.dtype), registers, mask, blocks[i : i + 1], heads[i : i + 1]).to(x.dtype)

        return velocity

    def _noise(self, rows: int, seed: int | Sequence[int]) -> Tensor:
        """One generator per image, so that its noise does not depend on the others."""
        seeds = [seed] * rows if isinstance(seed, int) else list(seed)
        if len(seeds) != rows:
            raise ParameterError(f"seed must be one number, or one for each of {rows} images, got {len(seeds)}.")
        side = self.config["latent_size"]
        shape = (self.config["latent_channels"], side, side)
        each = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
        return torch.stack(each).to(self.device)

    @property
    def _vae(self) -> Any:
        return self.vae.vae

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoder.null.dtype


def _mask(bias: Tensor | None, patches: int, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    return torch.nn.functional.pad(bias, (patches, 0)).to(dtype)[:, None, None]


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _autoencoder(config: Mapping[str, Any]) -> Any:
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise MissingDependencyError(
            "FlexTok with a VAE needs diffusers: pip install 'visiontok[diffusion]'"
        ) from error
    try:
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
        return AutoencoderKL(**values)
    except (TypeError, ValueError) as error:
        raise FormatError(f"the VAE of this FlexTok cannot be built: {error}") from error
