"""Modules of FlexTok (arXiv:2502.13967) under the names of its released weights.

Written without the official packing: images are rows of a batch, patches and registers two tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.errors import ParameterError

__all__ = ["Block", "Decoder", "Encoder", "Holder", "frequencies", "patchify", "position_table", "sincos", "unpatchify"]

# Queries and keys are normalised, so the scale does not follow the width: 8 / head_dim (muP).
_SCALE = 8.0
_TEMPERATURE = 10_000.0
_EPS = 1e-5


def norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters, in at least fp32, in the dtype of x."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.layer_norm(wide, x.shape[-1:], eps=_EPS).to(x.dtype)


def patchify(x: Tensor, size: int) -> Tensor:
    """`(B, C, h, w)` to `(B, h/p * w/p, p * p * C)`: rows, columns, channels within a patch."""
    batch, channels, height, width = x.shape
    cells = x.reshape(batch, channels, height // size, size, width // size, size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


def unpatchify(x: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """The reverse of `patchify` for a grid of patches."""
    cells = x.reshape(x.shape[0], *grid, size, size, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, grid[0] * size, grid[1] * size)


def sincos(dim: int, height: int, width: int) -> Tensor:
    """The 2D table of the released weights, `(1, dim, height, width)`.

    For height != width its rows and columns are mixed, as they are in the official code.
    """
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="ij")
    omega = _TEMPERATURE ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    along_w, along_h = (cells.flatten()[:, None] * omega for cells in (columns, rows))
    table = torch.cat([along_w.sin(), along_w.cos(), along_h.sin(), along_h.cos()], 1).float()
    return table.reshape(height, width, dim).permute(2, 0, 1)[None]


def position_table(table: Tensor, sizes: Sequence[int], kind: str = "sincos", scaling: str = "absolute") -> Tensor:
    """Position embeddings of a grid, `(1, D, *sizes)`.

    Args:
        table: `(1, D, *max_sizes)` for "sincos"; `(axes, 1, D, longest)` for the learned kinds.
        sizes: Of the grid, one per axis.
        kind: "sincos", "learnable_sum" or "learnable_prod" (of one embedding per axis).
        scaling: "absolute" cuts the table at the top left; "interpolate" stretches it.

    Raises:
        ParameterError: Another kind or scaling, or a grid larger than the table.
    """
    if kind not in ("sincos", "learnable_sum", "learnable_prod") or scaling not in ("absolute", "interpolate"):
        raise ParameterError(f"unknown position embedding: posemb_type {kind!r}, posemb_scaling {scaling!r}.")
    if kind == "sincos":
        return _stretched(table, sizes) if scaling == "interpolate" else _cut(table, sizes)
    axes = []
    for axis, size in enumerate(sizes):
        row = _stretched(table[axis], [size]) if scaling == "interpolate" else _cut(table[axis], [size])
        axes.append(row.reshape(*row.shape[:2], *(size if other == axis else 1 for other in range(len(sizes)))))
    total = axes[0]
    for row in axes[1:]:
        total = total + row if kind == "learnable_sum" else total * row
    return total


def _cut(table: Tensor, sizes: Sequence[int]) -> Tensor:
    if any(size > most for size, most in zip(sizes, table.shape[2:])):
        raise ParameterError(f"a grid of {tuple(sizes)} is larger than the position table, {tuple(table.shape[2:])}.")
    return table[(slice(None), slice(None), *(slice(size) for size in sizes))]


def _stretched(table: Tensor, sizes: Sequence[int]) -> Tensor:
    mode = "linear" if len(sizes) == 1 else "bilinear"
    return F.interpolate(table, tuple(sizes), mode=mode, align_corners=True)


def frequencies(t: Tensor, width: int, max_timestep: float = 1000.0, max_period: float = 256.0) -> Tensor:
    """Sinusoids of times, `(T,)` to `(T, width)` fp32: cosines, then sines; an odd width ends in a zero."""
    half = width // 2
    falling = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * (1000.0 / max_timestep) * falling
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, width % 2))


class Attention(nn.Module):
    """Attention with normalised queries and keys and no biases."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, H, n, d)` of tokens."""
        return norm(self.heads(self.wk(x))), self.heads(self.wv(x))

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        query = norm(self.heads(self.wq(x)))
        y = F.scaled_dot_product_attention(query, *keys, attn_mask=mask, scale=_SCALE / self.head_dim)
        return self.proj(y.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """fc2(silu(fc1 x) * fc3 x)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 * int(dim * ratio) / 3)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))
        # The widest tensors of a block: new memory for each costs more time than the arithmetic.
        return self.fc2(F.silu(self.fc1(x), inplace=True).mul_(self.fc3(x)))


class Block(nn.Module):
    """A pre-norm block; with `groups` its norms are modulated by time, one set per group of tokens (adaLN)."""

    def __init__(self, dim: int, head_dim: int, mlp_ratio: float = 4.0, groups: int = 0) -> None:
        super().__init__()
        self.attn = Attention(dim, head_dim)
        self.mlp = GatedMlp(dim, mlp_ratio)
        if groups:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, groups * 6 * dim))

    def advance(self, x: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """Tokens x after the block, looking at given keys."""
        x = x + self.attn(norm(x), keys, mask)
        return x + self.mlp(norm(x))

    def modulated(self, x: Tensor, m: Tensor, rows: int, mask: Tensor | None, last: bool = False) -> Tensor:
        """Tokens after the block under modulation.

        Args:
            x: `(B, n, D)`, the first `rows` are patches (group 0), the others registers (group 1).
            m: `(B or 1, 2, 6, D)`: gates, shifts and scales as `gate_attn, gate_mlp, shift_attn, scale_attn,
                shift_mlp, scale_mlp`.
            rows: Number of patches.
            mask: Added to the attention's logits.
            last: Only the patches are wanted.

        Returns:
            `(B, n, D)`, with `last` `(B, rows, D)`.
        """
        gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = (part[:, :, None] for part in m.unbind(2))
        z = _modulate(norm(x), rows, scale_a, shift_a)
        keys = self.attn.keys(z)
        if last:
            x, z = x[:, :rows], z[:, :rows]
        x = _add_gated(x, self.attn(z, keys, mask), rows, gate_a)
        return _add_gated(x, self.mlp(_modulate(norm(x), rows, scale_m, shift_m)), rows, gate_m)


def _modulate(x: Tensor, rows: int, scale: Tensor, shift: Tensor) -> Tensor:
    parts = (x[:, :rows], x[:, rows:])
    return torch.cat([torch.addcmul(shift[:, i], part, 1 + scale[:, i]) for i, part in enumerate(parts)], 1)


def _add_gated(x: Tensor, y: Tensor, rows: int, gate: Tensor) -> Tensor:
    parts = ((x[:, :rows], y[:, :rows]), (x[:, rows:], y[:, rows:]))
    return torch.cat([torch.addcmul(a, b, gate[:, i]) for i, (a, b) in enumerate(parts)], 1)


class Holder(nn.Module):
    """A module with one named parameter or child, for the sake of the names in the state dict."""

    def __init__(self, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def _fixed(table: Tensor) -> nn.Parameter:
    return nn.Parameter(table, requires_grad=False)


def _random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.02)


class Encoder(nn.Module):
    """Latents to registers: patches see one another, register i sees all patches and registers up to i."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        part = config["encoder"]
        dim, size = part["dim"], config["patch_size"]
        self.size = size
        self.grid = config["latent_size"] // size
        self.positions: str = config["posemb_scaling"]
        blocks = [Block(dim, part["head_dim"], part["mlp_ratio"]) for _ in range(part["depth"])]
        self.module_dict = nn.ModuleDict(
            {
                "enc_patch_emb": Holder(patch_proj=nn.Linear(size * size * config["latent_channels"], dim)),
                "enc_posemb_module": Holder(posembs=_fixed(sincos(dim, self.grid, self.grid))),
                "enc_register_module": Holder(registers=_random(config["length"], dim)),
                "enc_transformer": Holder(blocks=nn.ModuleList(blocks)),
                "enc_to_latents": Holder(proj=nn.Linear(dim, len(config["levels"]))),
            }
        )

    @property
    def blocks(self) -> Any:
        return self.module_dict["enc_transformer"].blocks

    def embed(self, latents: Tensor) -> Tensor:
        """Patch tokens `(B, P, D)` of latents `(B, C, h, w)`."""
        parts: Any = self.module_dict
        sizes = [side // self.size for side in latents.shape[2:]]
        table = position_table(parts["enc_posemb_module"].posembs, sizes, scaling=self.positions)
        return parts["enc_patch_emb"].patch_proj(patchify(latents, self.size)) + table.flatten(2).transpose(1, 2)

    def patch_keys(self, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the patches in every block: all that registers see of the image."""
        x, found = self.embed(latents), []
        for number, block in enumerate(self.blocks):
            keys = block.attn.keys(norm(x))
            found.append(keys)
            if number + 1 < len(self.blocks):
                x = block.advance(x, keys)
        return found

    def extend(
        self, keys: list[tuple[Tensor, Tensor]], start: int, stop: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Registers `start` to `stop` after those that the keys hold already.

        Args:
            keys: Of the patches and the first `start` registers, per block.
            start: Registers done.
            stop: Registers wanted.

        Returns:
            What the quantiser gets, `(B, stop - start, d)`, and the keys with the new registers.
        """
        parts: Any = self.module_dict
        batch, before = keys[0][0].shape[0], keys[0][0].shape[2]
        r = parts["enc_register_module"].registers[start:stop].expand(batch, -1, -1)
        count = stop - start
        mask = torch.ones(count, before + count, dtype=torch.bool, device=r.device).tril(before)
        longer = []
        for block, (k, v) in zip(self.blocks, keys):
            new_k, new_v = block.attn.keys(norm(r))
            both = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
            longer.append(both)
            r = block.advance(r, both, mask)
        return parts["enc_to_latents"].proj(norm(r)), longer


class Decoder(nn.Module):
    """Noised latents and registers to a velocity: full attention, modulated by time."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        part = config["decoder"]
        dim, size, channels = part["dim"], config["patch_size"], config["latent_channels"]
        grid = config["latent_size"] // size
        self.size, self.length = size, config["length"]
        self.positions: str = config["posemb_scaling"]
        self.register_positions: str = config["register_posemb"]
        self.time = {key: part[key] for key in ("max_timestep", "max_period")}
        self.frequency_size: int = part["frequency_size"]
        blocks = [Block(dim, part["head_dim"], part["mlp_ratio"], groups=2) for _ in range(part["depth"])]
        mlp = nn.Sequential(nn.Linear(self.frequency_size, dim), nn.SiLU(), nn.Linear(dim, dim))
        head = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.module_dict = nn.ModuleDict(
            {
                "dec_from_latents": Holder(proj=nn.Linear(len(config["levels"]), dim)),
                "dec_registers_posemb_module": Holder(posembs=_random(1, 1, dim, self.length)),
                "dec_nested_dropout": Holder(dropout_mask_token=_random(dim)),
                "dec_latent_dropout": Holder(nullcond=_random(dim)),
                "dec_noise_patch_emb": Holder(patch_proj=nn.Linear(size * size * channels, dim)),
                "dec_patches_posemb_module": Holder(posembs=_fixed(sincos(dim, grid, grid))),
                "dec_time_embedder": Holder(mlp=mlp),
                "dec_transformer": Holder(blocks=nn.ModuleList(blocks)),
                "dec_to_patches": Holder(adaLN_modulation=head, proj=nn.Linear(dim, size * size * channels)),
            }
        )
        # A new decoder starts as the identity and predicts nothing, as the official initialisation has it.
        linears: list[Any] = [*(block.adaLN_modulation[1] for block in blocks), head[1]]
        for linear in linears:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @property
    def blocks(self) -> Any:
        return self.module_dict["dec_transformer"].blocks

    def registers(self, codes: Tensor) -> Tensor:
        """Register tokens `(B, k, D)` of codes `(B, k, d)`, with their positions."""
        parts: Any = self.module_dict
        table = parts["dec_registers_posemb_module"].posembs
        places = position_table(table, [codes.shape[1]], self.register_positions)
        return parts["dec_from_latents"].proj(codes) + places.transpose(1, 2)

    @property
    def mask_token(self) -> Tensor:
        """What stands where a register was dropped."""
        parts: Any = self.module_dict
        return parts["dec_nested_dropout"].dropout_mask_token

    @property
    def null(self) -> Tensor:
        """What every register is without condition."""
        parts: Any = self.module_dict
        return parts["dec_latent_dropout"].nullcond

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """What time does: `(T, depth, 2, 6, D)` for the blocks and `(T, 2, D)` (shift, scale) for the head."""
        parts: Any = self.module_dict
        mlp = parts["dec_time_embedder"].mlp
        waves = frequencies(t, self.frequency_size, **self.time)
        embedded = mlp(waves.to(mlp[0].weight.dtype))
        each = [block.adaLN_modulation(embedded).unflatten(-1, (2, 6, -1)) for block in self.blocks]
        return torch.stack(each, 1), parts["dec_to_patches"].adaLN_modulation(embedded).unflatten(-1, (2, -1))

    def forward(
        self, x: Tensor, registers: Tensor, mask: Tensor | None, modulation: Tensor, head: Tensor,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The velocity.

        Args:
            x: `(B, C, h, w)`.
            registers: `(B, n, D)`.
            mask: `(B or 1, 1, 1, P + n)`, added to the attention's logits.
            modulation: `(B or 1, depth, 2, 6, D)`, see `modulation`.
            head: `(B or 1, 2, D)`.
            hidden: A list that gets the patches `(B, P, D)` after every block.

        Returns:
            `(B, C, h, w)`.
        """
        parts: Any = self.module_dict
        grid = (x.shape[2] // self.size, x.shape[3] // self.size)
        table = position_table(parts["dec_patches_posemb_module"].posembs, grid, scaling=self.positions)
        patches = parts["dec_noise_patch_emb"].patch_proj(patchify(x, self.size)) + table.flatten(2).transpose(1, 2)
        rows = patches.shape[1]
        y = torch.cat([patches, registers], 1)
        for number, block in enumerate(self.blocks):
            last = number + 1 == len(self.blocks)
            y = block.modulated(y, modulation[:, number], rows, mask, last)
            if hidden is not None:
                hidden.append(y[:, :rows])
        shift, scale = head.unbind(1)
        y = norm(y) * (1 + scale[:, None]) + shift[:, None]
        return unpatchify(parts["dec_to_patches"].proj(y), self.size, grid)
