"""open_clip's own vision tower: CLIP, CoCa, SigLIP-style pools. Towers that open_clip takes from timm are timm's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visiontok.backbones.open_clip_blocks import (
    MODULE,
    CustomBlock,
    PatchedStack,
    ResidualBlock,
    blocks_of,
    check_stack,
    hint,
    hint_of,
    is_own,
    swaps_of,
)
from visiontok.core.backbone import Backbone, Block, Swap
from visiontok.core.blocks import bias_dtype, run_block, sized_mean
from visiontok.core.runtime import attach_state, carry_state, state_of
from visiontok.core.signals import ATTENTION, Signal, Site
from visiontok.errors import IncompatibleError

__all__ = ["OpenClip"]

_HAVE = frozenset({Signal.HIDDEN, Signal.GRID}) | ATTENTION
_POOLS = ("attn_pool", "attn_pool_contrastive")


class _Pass:
    def _visiontok_pass(self: Any, x: Tensor, host: Any, mask: Tensor | None, given: str | None) -> Tensor:
        given = given if mask is None else "attn_mask"
        run = self._visiontok_run
        return run_block(self._visiontok, x, lambda x, _: host(x), self._visiontok_ahead, run, given)


class PatchedResidualBlock(_Pass, ResidualBlock):
    """A block with torch's attention."""


class PatchedCustomBlock(_Pass, CustomBlock):
    """A block with open_clip's attention."""


class PatchedTransformer(PatchedStack):
    """The stack, which gives intermediate features the length that the tower asks for."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self._visiontok_stack(x, attn_mask, take=False)[0]

    def forward_intermediates(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, indices: Any = None, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        fill = hint_of(x)
        y, taken = self._visiontok_stack(x, attn_mask, indices, stop_early)
        pairs = [(one, state_of(one)) for one in taken]
        return y, [one if fill is None or state is None else state.restore(one, fill) for one, state in pairs]


class PatchedNorm:
    """The final norm, which lets the token state pass to the pools."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return carry_state(x, super().forward(x))  # type: ignore[misc]


class PatchedPooler:
    """Attentional pooling, to which a token counts as often as it has members."""

    def forward(self: Any, x: Tensor) -> Tensor:
        state = state_of(x)
        if state is None or state.size is None:
            return super().forward(x)  # type: ignore[misc]
        x = self.ln_k(x)
        bias: Any = state.changed(proportional=True, mute=False).key_bias(bias_dtype(x))
        query = self.ln_q(self.query).unsqueeze(0).expand(x.shape[0], -1, -1)
        return self.attn(query, x, x, key_padding_mask=bias.flatten(1), need_weights=False)[0]


class PatchedVision:
    """The tower: its pools see sizes, its feature maps are whole."""

    _visiontok: Any

    def _embeds(self: Any, x: Tensor) -> Tensor:
        return hint(super()._embeds(x), hint_of(x))  # type: ignore[misc]

    def _pool(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        state = state_of(x)
        x = x if state is None else attach_state(*state.whole(x, self._visiontok.restore_fill))
        return super()._pool(x)  # type: ignore[misc]

    def _global_pool(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # A view: what comes out may be x itself, and the state must not leave the model.
        pooled, tokens = super()._global_pool(x.view_as(x))  # type: ignore[misc]
        state = state_of(x)
        if self.pool_type == "avg" and state is not None and state.size is not None:
            pooled = sized_mean(x[:, state.prefix :], state.size[:, state.prefix :])
        return pooled, tokens

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: Any = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> Any:
        fill = self._visiontok.restore_fill or ("nearest" if output_fmt == "NCHW" else None)
        call = super().forward_intermediates  # type: ignore[misc]
        plain = (normalize_intermediates, intermediates_only, output_fmt, output_extra_tokens)
        return call(hint(x.view_as(x), fill), indices, stop_early, *plain)


class OpenClip(Backbone):
    """open_clip VisionTransformer, also inside CLIP, CustomTextCLIP and CoCa."""

    name = "open_clip"
    library = "open_clip"
    hosts = (f"{MODULE}.VisionTransformer",)
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {Site.MID: _HAVE, Site.PRE: _HAVE, Site.AROUND: _HAVE}

    def blocks(self, model: Any) -> list[Block]:
        return blocks_of(model)

    def prefix(self, model: Any) -> int:
        return 1

    def length(self, model: Any) -> int:
        return model.positional_embedding.shape[0]

    def grid(self, model: Any) -> tuple[int, int] | None:
        height, width = model.grid_size
        return int(height), int(width)

    def width(self, model: Any) -> int:
        return model.class_embedding.shape[0]

    def heads(self, model: Any) -> int:
        return model.transformer.resblocks[0].attn.num_heads

    def class_token(self, model: Any) -> Tensor | None:
        return model.class_embedding.view(1, 1, -1)

    def input_size(self, model: Any) -> tuple[int, ...]:
        height, width = model.image_size
        return 3, int(height), int(width)

    def check(self, model: Any, site: Site) -> None:
        if not hasattr(model, "_global_pool") or not hasattr(model, "_embeds"):
            raise IncompatibleError("this VisionTransformer is of an older open_clip; visiontok needs 3.0 or later.")
        if not is_own(model, self.hosts[0], "_embeds", "_pool", "_global_pool"):
            raise IncompatibleError(
                f"{type(model).__name__} embeds or pools its tokens in its own way; visiontok runs open_clip's "
                "VisionTransformer."
            )
        for name in _POOLS:
            pool = getattr(model, name, None)
            if pool is not None and not is_own(pool, f"{MODULE}.AttentionalPooler"):
                raise IncompatibleError(f"{name} is a {type(pool).__name__}, which cannot be told of token sizes.")
        check_stack(model)

    def swaps(self, model: Any) -> list[Swap]:
        swaps = [Swap("", model, PatchedVision)]
        if not isinstance(model.ln_post, nn.Identity):
            swaps.append(Swap("ln_post", model.ln_post, PatchedNorm))
        pools = [(name, getattr(model, name, None)) for name in _POOLS]
        swaps += [Swap(name, pool, PatchedPooler) for name, pool in pools if pool is not None]
        return swaps + swaps_of(model, PatchedTransformer, PatchedResidualBlock, PatchedCustomBlock)

    def example(self) -> tuple[nn.Module, Tensor]:
        return self.examples()["cls"]

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from open_clip.transformer import VisionTransformer

        size = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 4, "heads": 3, "mlp_ratio": 2.0}
        pooler = {"attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
        custom = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
        variants: dict[str, dict[str, Any]] = {
            "cls": {},
            "avg": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.1},
            "coca": {"attentional_pool": True, **pooler},
            "custom": {"pool_type": "avg", **custom},
        }
        made: dict[str, tuple[nn.Module, Tensor]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            image = torch.randn(2, 3, 32, 32)
            for key, options in variants.items():
                made[key] = (VisionTransformer(**size, output_dim=24, **options).eval(), image)
        return made
