"""timm's CaiT: talking heads in the trunk, where there is no class token, then class attention over what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.backbones.timm_blocks import PatchedMeanHead, mix
from visiontok.backbones.timm_relpos import TimmRelPos, _made
from visiontok.core.backbone import Swap
from visiontok.core.blocks import Ran, bias_dtype, run_block
from visiontok.core.joints import Joint
from visiontok.core.runtime import Stage, attach_state, state_of
from visiontok.core.signals import ATTENTION, Offers, Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError
from visiontok.ops.attention import Votes

__all__ = ["TimmCait"]

_HOME = "timm.models.cait"
_HAVE = (frozenset({Signal.HIDDEN, Signal.GRID}) | ATTENTION) - {Signal.ATTN_PREFIX}
_CLASS_BLOCK = f"{_HOME}.LayerScaleBlockClassAttn"
_CLASS_ATTENTION = f"{_HOME}.ClassAttn"


class _Taken:
    """Takes q, k, v and the softmax of the mixed logits out of an attention module."""

    q: Tensor
    k: Tensor
    v: Tensor
    map: Tensor


class PatchedTalkingHeads:
    """Talking-heads attention that, when given a tap, leaves its q, k, v and map there."""

    def forward(self: Any, x: Tensor, *, tap: _Taken | None = None, bias: Tensor | None = None) -> Tensor:
        if tap is None:
            return super().forward(x)  # type: ignore[misc]
        self._visiontok_fill(tap, x, bias)
        mixed = self.proj_w(tap.map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.attn_drop(mixed) @ tap.v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def _visiontok_fill(self: Any, tap: _Taken, x: Tensor, bias: Tensor | None) -> None:
        tap.q, tap.k, tap.v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (tap.q * self.scale) @ tap.k.transpose(-2, -1)
        logits = self.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        # Right before the softmax: mixed over heads, log sizes would be scaled.
        tap.map = (logits if bias is None else logits + bias).softmax(dim=-1)


class PatchedTrunkBlock:
    """A block of the trunk with a reduction point between attention and MLP."""

    _visiontok: Stage

    def forward(self: Any, x: Tensor) -> Tensor:
        host = super().forward  # type: ignore[misc]
        return run_block(self._visiontok, x, lambda x, _: host(x), self._visiontok_ahead, self._visiontok_run)

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        made: list[_Taken] = []

        def read() -> _Taken:
            if not made:
                made.append(_Taken())
                self.attn._visiontok_fill(made[0], self.norm1(x), state.key_bias(x.dtype))
            return made[0]

        return _offers(read)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        tap = _Taken()
        y = self.attn(self.norm1(x), tap=tap, bias=state.key_bias(bias_dtype(x, fused=False)))
        offered = _offers(lambda: tap)
        joint = Joint(lambda y: self.drop_path(self.gamma_1 * y), self.norm2, self.gamma_1, not self.training)
        x, normed, after = self._visiontok.between(x, y, joint, state, offered)
        x = x + self.drop_path(self.gamma_2 * self.mlp(normed))
        return x, after, offered


def _offers(read: Callable[[], _Taken]) -> Offers:
    # A head of the map is a mixture of all heads of q and k, so neither votes nor map follow from one pair of them.
    return {
        "QUERY": lambda: read().q,
        "KEY": lambda: read().k,
        "VALUE": lambda: read().v,
        "ATTN_VOTE": lambda: Votes.of(read().map),
        "ATTN": lambda: Votes.of(read().map).map,
    }


class PatchedClassAttention:
    """Attention of the class token alone, with a bias over keys."""

    def forward(self: Any, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return super().forward(x)  # type: ignore[misc]
        q, k, v = (
            part(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part, y in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        return self.proj_drop(self.proj(mix(self, q, k, v, bias).transpose(1, 2).flatten(2)))


class PatchedClassBlock:
    """A class-attention block: it attends to a merged token as to its members."""

    def forward(self: Any, x: Tensor, x_cls: Tensor) -> Tensor:
        state = state_of(x)
        if state is None or state.size is None:
            return super().forward(x, x_cls)  # type: ignore[misc]
        # Not as in the trunk, where the reducer decides: this reads the tokens out, as a pool does.
        dtype = bias_dtype(x, self.attn.fused_attn)
        bias: Any = state.changed(proportional=True, mute=False).key_bias(dtype)
        y = self.attn(self.norm1(torch.cat((x_cls, x), dim=1)), bias=F.pad(bias, (x_cls.shape[1], 0)))
        x_cls = x_cls + self.drop_path(self.gamma_1 * y)
        return x_cls + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x_cls)))


class PatchedCait(PatchedMeanHead):
    """The model: class attention sees sizes, and the features that leave are restored if asked."""

    def forward_cls(self: Any, x: Tensor) -> Tensor:
        state = state_of(x)
        if state is None:
            return super().forward_cls(x)  # type: ignore[misc]
        x, state = state.whole(x, None)
        y = super().forward_cls(attach_state(x, state))  # type: ignore[misc]
        lead = y.shape[1] - x.shape[1]
        x, state = state.whole(x, self._visiontok.restore_fill)
        # With the class token before them these are other tokens, whose history is that of no sequence.
        size = None if state.size is None else F.pad(state.size, (0, 0, lead, 0), value=1.0)
        y = torch.cat((y[:, :lead], x), dim=1)
        return attach_state(y, TokenState.initial(y, lead).changed(size=size, padded=state.padded, memo=state.memo))

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: Any = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        call = super().forward_intermediates  # type: ignore[misc]
        fill = self._visiontok.restore_fill or ("nearest" if output_fmt == "NCHW" else None)
        if output_fmt not in ("NCHW", "NLC"):
            return call(x, indices, norm, stop_early, output_fmt, intermediates_only)
        found = call(x, indices, norm, stop_early, "NLC", intermediates_only)
        final, taken = (None, found) if intermediates_only else found
        states = [state_of(y) for y in taken]
        # A view, so that what leaves carries no state.
        features = [y.view_as(y) if fill is None or s is None else s.restore(y, fill) for y, s in zip(taken, states)]
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            features = [y.transpose(1, 2).unflatten(2, (height, width)).contiguous() for y in features]
        return features if final is None else (final.view_as(final), features)


class TimmCait(TimmRelPos):
    """timm Cait with LayerScaleBlock and TalkingHeadAttn, then LayerScaleBlockClassAttn and ClassAttn."""

    name = "timm_cait"
    hosts = (f"{_HOME}.Cait",)
    positional = False
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {Site.MID: _HAVE, Site.PRE: _HAVE, Site.AROUND: _HAVE}
    parts: ClassVar[dict[str, type]] = {
        f"{_HOME}.LayerScaleBlock.forward": PatchedTrunkBlock,
        f"{_HOME}.TalkingHeadAttn.forward": PatchedTalkingHeads,
        f"{_CLASS_BLOCK}.forward": PatchedClassBlock,
        f"{_CLASS_ATTENTION}.forward": PatchedClassAttention,
    }

    def aid(self, model: Any, index: int) -> Any:
        return None

    def prefix(self, model: Any) -> int:
        return 0

    def length(self, model: Any) -> int:
        return model.patch_embed.num_patches

    def class_token(self, model: Any) -> Tensor | None:
        # It joins after the trunk.
        return None

    def signals(self, model: Any, site: Site) -> frozenset[Signal]:
        return self.provides[site]

    def check(self, model: Any, site: Site) -> None:
        super().check(model, site)
        if not hasattr(model, "forward_cls"):
            raise IncompatibleError("this timm's Cait has no forward_cls, where tokens are read out; upgrade timm.")
        for index, block in enumerate(model.blocks_token_only or ()):
            path = f"blocks_token_only.{index}"
            for where, part in ((path, block), (f"{path}.attn", block.attn)):
                if self._part(part) is None:
                    raise IncompatibleError(f"{where} is a {type(part).__name__}, which visiontok does not know.")

    def swaps(self, model: Any) -> list[Swap]:
        swaps = super().swaps(model)
        swaps[0] = Swap("", model, PatchedCait)
        for index, block in enumerate(model.blocks_token_only or ()):
            path = f"blocks_token_only.{index}"
            swaps += [
                Swap(path, block, PatchedClassBlock),
                Swap(f"{path} attention", block.attn, PatchedClassAttention),
            ]
        return swaps

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from timm.models.cait import Cait

        return _made(Cait, {"class": {}, "average": {"global_pool": "avg"}})
