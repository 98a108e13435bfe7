"""timm's VisionTransformerRelPos: relative position biases, per block or shared, that follow merged tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visiontok.backbones.timm_blocks import PatchedMaps, PatchedNorm, mix
from visiontok.backbones.timm_vit import TimmViT
from visiontok.core.backbone import Swap, own_class
from visiontok.core.blocks import Ran, Tap, bias_dtype, offers_ahead, run_block
from visiontok.core.joints import Joint
from visiontok.core.runtime import Stage, hint_grid
from visiontok.core.signals import ATTENTION, Offers, Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError

__all__ = ["TimmRelPos"]

_HOME = "timm.models.vision_transformer_relpos"


class PatchedBiasAttention:
    """Attention with a bias between tokens that, when given a tap, adds the one given and leaves its q, k, v there."""

    def forward(self: Any, x: Tensor, *args: Any, tap: Tap | None = None, bias: Tensor | None = None, **kw: Any) -> Any:
        if tap is None:
            return super().forward(x, *args, **kw)  # type: ignore[misc]
        tap.q, tap.k, tap.v = q, k, v = self._visiontok_qkv(x)
        return self.proj_drop(self.proj(mix(self, q, k, v, bias).transpose(1, 2).flatten(2)))

    def _visiontok_qkv(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def _visiontok_table(self: Any, shared: Tensor | None) -> Tensor | None:
        # A table of its own replaces the shared one.
        return shared if self.rel_pos is None else self.rel_pos.get_bias()


class PatchedBiasBlock:
    """A block with a reduction point, whose attention adds a bias between tokens; `_visiontok_run` is its anatomy."""

    _visiontok: Stage

    def _visiontok_forward(self: Any, x: Tensor, shared: Tensor | None) -> Tensor:
        host, stage = super().forward, self._visiontok  # type: ignore[misc]
        if stage.layer == 0:
            # Not the grid of the plan: set_input_size may have changed it.
            x = hint_grid(x, stage.aid.grid_size)

        def untouched(x: Tensor, state: TokenState) -> Tensor:
            # The host's table is over the original tokens.
            return self._visiontok_run(x, state, shared)[0] if state.trail else host(x, shared)

        return run_block(
            stage,
            x,
            untouched,
            lambda x, state: self._visiontok_ahead(x, state, shared),
            lambda x, state: self._visiontok_run(x, state, shared),
        )

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState, shared: Tensor | None) -> Offers:
        return _ahead(self.attn, lambda: self.norm1(x), state, shared)


class _RelPosBlock(PatchedBiasBlock):
    def forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return self._visiontok_forward(x, shared_rel_pos)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState, shared: Tensor | None) -> Ran:
        y, offered = _attend(self.attn, self.norm1(x), state, shared)
        joint = Joint(lambda y: self.drop_path1(self.ls1(y)), self.norm2, self.ls1, not self.training)
        x, normed, after = self._visiontok.between(x, y, joint, state, offered)
        x = x + self.drop_path2(self.ls2(self.mlp(normed)))
        return x, after, offered


class _ResPostRelPosBlock(_RelPosBlock):
    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState, shared: Tensor | None) -> Offers:
        return _ahead(self.attn, lambda: x, state, shared)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState, shared: Tensor | None) -> Ran:
        y, offered = _attend(self.attn, x, state, shared)
        x = x + self.drop_path1(self.norm1(y))
        x, after = self._visiontok.mid(x, state, offered)
        x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return x, after, offered


def _bias(attn: Any, state: TokenState, shared: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    table = attn._visiontok_table(shared)
    if table is not None and state.trail:
        table = _followed(table, state)
    sizes = state.key_bias(dtype)
    return sizes if table is None else table if sizes is None else table + sizes


def _followed(table: Tensor, state: TokenState) -> Tensor:
    positions: Any = state.positions
    return positions.bias(table, state.origin)


def _attend(attn: Any, x: Tensor, state: TokenState, shared: Tensor | None) -> tuple[Tensor, Offers]:
    bias, tap = _bias(attn, state, shared, bias_dtype(x, attn.fused_attn, attends=True)), Tap()
    return attn(x, tap=tap, bias=bias), tap.offers(attn.scale, bias, state.prefix)


def _ahead(attn: Any, normed: Callable[[], Tensor], state: TokenState, shared: Tensor | None) -> Offers:
    made: list[Offers] = []

    def read(name: str) -> Any:
        # Only now: a table that is not read costs nothing.
        if not made:
            bias = _bias(attn, state, shared, torch.float32)
            made.append(offers_ahead(lambda: attn._visiontok_qkv(normed()), attn.scale, bias, state.prefix))
        return made[0][name]()

    return {str(signal): lambda name=str(signal): read(name) for signal in ATTENTION}


class TimmRelPos(TimmViT):
    """timm VisionTransformerRelPos with RelPosBlock or ResPostRelPosBlock."""

    name = "timm_relpos"
    hosts = (f"{_HOME}.VisionTransformerRelPos",)
    positional = True
    # What runs each block and each attention, by the forward that it replaces.
    parts: ClassVar[dict[str, type]] = {
        f"{_HOME}.RelPosBlock.forward": _RelPosBlock,
        f"{_HOME}.ResPostRelPosBlock.forward": _ResPostRelPosBlock,
        f"{_HOME}.RelPosAttention.forward": PatchedBiasAttention,
    }

    def aid(self, model: Any, index: int) -> Any:
        return model.patch_embed if index == 0 else None

    def signals(self, model: Any, site: Site) -> frozenset[Signal]:
        have = self.provides[site]
        return have if model.num_prefix_tokens else have - {Signal.ATTN_PREFIX}

    def check(self, model: Any, site: Site) -> None:
        for path, block in self.blocks(model):
            for where, part in ((path, block), (f"{path}.attn", getattr(block, "attn", None))):
                if self._part(part) is None:
                    known = ", ".join(sorted({forward.split(".")[-2] for forward in self.parts}))
                    raise IncompatibleError(
                        f"{where} is a {type(part).__name__}, whose forward is none that visiontok knows: {known}."
                    )

    def swaps(self, model: Any) -> list[Swap]:
        swaps = [Swap("", model, PatchedMaps)]
        for path, block in self.blocks(model):
            host: Any = block
            for where, module in ((path, host), (f"{path} attention", host.attn)):
                mixin = self._part(module)
                if mixin is not None:
                    swaps.append(Swap(where, module, mixin))
        return swaps if isinstance(model.norm, nn.Identity) else [*swaps, Swap("norm", model.norm, PatchedNorm)]

    def example(self) -> tuple[nn.Module, Tensor]:
        return next(iter(self.examples().values()))

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from timm.models import vision_transformer_relpos as host

        variants: dict[str, dict[str, Any]] = {
            "mlp": {},
            "table_cls": {"class_token": True, "rel_pos_type": "bias", "global_pool": "token"},
            "shared": {"shared_rel_pos": True, "block_fn": host.ResPostRelPosBlock, "fc_norm": True},
        }
        return _made(host.VisionTransformerRelPos, variants)

    def _part(self, module: Any) -> type | None:
        # A subclass with a forward of its own may do anything there; running ours instead would be silently wrong.
        own = own_class(module).forward if isinstance(module, nn.Module) else None
        return None if own is None else self.parts.get(f"{own.__module__}.{own.__qualname__}")


def _made(cls: Any, variants: dict[str, dict[str, Any]]) -> dict[str, tuple[nn.Module, Tensor]]:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
    made: dict[str, tuple[nn.Module, Tensor]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.randn(2, 3, 32, 32)
        for key, options in variants.items():
            model = cls(**{**small, "init_values": 0.1, **options}).eval()
            for name, parameter in model.named_parameters():
                if "relative_position_bias_table" in name:
                    # timm starts some of them at zero, where a wrong bias would not show.
                    nn.init.normal_(parameter)
            made[key] = (model, image)
    return made
