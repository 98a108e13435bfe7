"""open_clip's text towers: TextTransformer, CoCa's, and the text half of CLIP, with their causal masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
from visiontok.core.backbone import Backbone, Block, Swap, class_paths
from visiontok.core.runtime import Stage, state_of
from visiontok.core.signals import ATTENTION, Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError
from visiontok.ops import merging
from visiontok.ops.constants import wide_dtype

__all__ = ["OpenClipText"]

_CLIP = "open_clip.model.CLIP"
_TEXT = f"{MODULE}.TextTransformer"
_HAVE = frozenset({Signal.HIDDEN}) | ATTENTION
_FILLS: dict[Any, Any] = {None: "nearest", "gather": "nearest", "zero": "zero"}

# What travels in the memo: (B,) the pooled token; whether masks are causal; (B, N0) where each token of the text went;
# (B, N0, 3) what `_reach` says of each token, in the new order.
_END, _CAUSAL, _SLOT, _REACH = "text_end", "text_causal", "text_slot", "text_reach"


class _Pass:
    """The order of events in a block: the tokens are put in order just before the first reduction."""

    def _visiontok_pass(self: Any, x: Tensor, host: Any, mask: Tensor | None, given: str | None) -> Tensor:
        if given:
            raise IncompatibleError(f"block {self._visiontok.layer}: {given} was given, but it attends to itself only.")
        stage: Stage = self._visiontok
        state = stage.enter(x)
        if stage.layer == 0:
            state = state.changed(memo=hint_of(x) or {})
        if _SLOT not in state.memo and stage.acts(state):
            x, state = _ordered(x, state, mask)
        if stage.opens:
            x, state = stage.before(x, state, self._visiontok_ahead(x, state))
        if stage.idle(state) and (mask is None or _SLOT not in state.memo):
            return stage.leave(host(x), state, {})
        y, after, offered = self._visiontok_run(x, state)
        # Signals of a block name the tokens that it saw.
        return stage.leave(y, after, offered if after is state else {})

    def _visiontok_bias(self: Any, state: TokenState, dtype: torch.dtype) -> Tensor | None:
        keys, reach = state.key_bias(dtype), state.memo.get(_REACH)
        if reach is None:
            return keys
        mask = _group_mask(merging.segment_max(reach, state.origin.long(), state.n), state.n0, dtype)
        return mask if keys is None else mask + keys


def _ordered(x: Tensor, state: TokenState, mask: Tensor | None) -> tuple[Tensor, TokenState]:
    """Puts the pooled token first and turns the host's mask into sizes and reaches."""
    if _END not in state.memo:
        raise IncompatibleError(
            "it is not known which token of the text is pooled, because the tokens did not come from the tower's own "
            "forward or encode_text (CLIP.forward_intermediates embeds the text itself); call one of these."
        )
    batch, length = state.batch, state.n
    end = state.memo[_END].unsqueeze(1)
    place = torch.arange(length, device=x.device)
    kept = torch.where(place == 0, end, place - (place <= end).long())
    memo = {**state.memo, _SLOT: torch.where(place == end, 0, place + (place < end).long())}
    if mask is None:
        return merging.select(x, kept), state.changed(memo=memo)
    # What the pooled token cannot see now it never will: those tokens are padding, or come after it.
    rows = mask if mask.dim() == 2 else mask.view(batch, -1, length, length)[:, 0]
    row = rows[end.squeeze(1)] if mask.dim() == 2 else rows.gather(1, end.unsqueeze(2).expand(-1, -1, length))[:, 0]
    seen = row == 0
    live = seen | (place == end)
    memo[_REACH] = merging.select(_reach(place.expand_as(seen), seen, live, state.memo[_CAUSAL]), kept)
    size = merging.select(live.unsqueeze(-1).to(wide_dtype(x.dtype)), kept)
    return merging.select(x, kept), state.changed(memo=memo, size=size, padded=True)


def _reach(place: Tensor, seen: Tensor, live: Tensor, causal: bool) -> Tensor:
    """(B, N, 3): a and b, so that a query sees a key iff a of the key + b of the query > N, and 1.

    A maximum over the members of a group says the same of groups: the earliest key and the latest query count. 0 is
    never seen, or never asks.
    """
    length = place.shape[1]
    early = length - place if causal else torch.full_like(place, length)
    late = place + 1 if causal else torch.ones_like(place)
    return torch.stack((early * seen, late * live, torch.ones_like(place)), dim=2)


def _group_mask(reach: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, K, K) 0 or -inf from the maxima over each group."""
    early, late, held = reach.unbind(2)
    # Groups of padding ask everyone, so that no row is empty; tokens that are not of the text see all and are seen.
    late = torch.where(late == 0, length, late)
    early = torch.where(held == 0, length, early)
    hidden = (early.unsqueeze(1) + late.unsqueeze(2) <= length).unsqueeze(1)
    return torch.zeros(hidden.shape, dtype=dtype, device=reach.device).masked_fill(hidden, -torch.inf)


class PatchedResidualBlock(_Pass, ResidualBlock):
    """A block with torch's attention."""


class PatchedCustomBlock(_Pass, CustomBlock):
    """A block with open_clip's attention."""


class PatchedTransformer(PatchedStack):
    """The stack, whose output has the length and order of the text again."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self._visiontok_whole(self._visiontok_stack(x, attn_mask, take=False)[0])

    def forward_intermediates(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, indices: Any = None, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        y, taken = self._visiontok_stack(x, attn_mask, indices, stop_early)
        return self._visiontok_whole(y), [self._visiontok_whole(one) for one in taken]

    def _visiontok_whole(self: Any, y: Tensor) -> Tensor:
        state = state_of(y)
        if state is None:
            return y
        # A view: where nothing was reduced y goes out as it is, and the state must not leave the model.
        y = y.view_as(y)
        full, state = state.whole(y, _FILLS[self.resblocks[0]._visiontok.chain.restore])
        slot = state.memo.get(_SLOT)
        return full if slot is None else merging.select(full, slot)


def _pooling(model: Any) -> str:
    # CoCa's class token is put at the end, and pooled whatever else is said; without a pool the last token sees all.
    kind = getattr(model, "pool_type", None) or getattr(model, "text_pool_type", "argmax")
    return "last" if getattr(model, "cls_emb", None) is not None or kind == "none" else kind


def _noted(x: Tensor, text: Tensor, model: Any) -> Tensor:
    """Tells block 0 which token is pooled and how the mask is meant."""
    kind = _pooling(model)
    if kind == "argmax":
        end = text.argmax(dim=-1)
    elif kind == "eos":
        eos = model.eos_id if hasattr(model, "eos_id") else model.text_eos_id
        end = (text == eos).int().argmax(dim=-1)
    else:
        end = torch.full(text.shape[:1], 0 if kind == "first" else x.shape[1] - 1, device=text.device)
    return hint(x, {_END: end, _CAUSAL: model.attn_mask is not None})


class PatchedText:
    """The tower, which tells its blocks which token is pooled."""

    def _embeds(self: Any, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)  # type: ignore[misc]
        return _noted(x, text, self), mask


class PatchedCLIP:
    """A CLIP that holds its text tower in parts: the same, with the word between embedding and transformer."""

    def encode_text(self: Any, text: Tensor, normalize: bool = False) -> Tensor:
        from open_clip.transformer import text_global_pool

        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding.to(dtype)
        x = self.ln_final(self.transformer(_noted(x, text, self), attn_mask=self.attn_mask))
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=getattr(self, "text_eos_id", None))
        to = self.text_projection
        if to is not None:
            x = to(x) if isinstance(to, nn.Linear) else x @ to
        return F.normalize(x, dim=-1) if normalize else x


class OpenClipText(Backbone):
    """open_clip TextTransformer (CustomTextCLIP.text, CoCa.text), and CLIP as far as it is a text tower.

    From the first reduction on the pooled token comes first, before the other tokens in their order: `prefix` is that
    token and the first one of the text, and origins in traces count in this order. Causality is kept among groups: one
    sees another iff the other's earliest member does not come after its own latest. What comes after the pooled token,
    and padding that the host masks, has size 0. The tower's output has its own length and order again.
    """

    name = "open_clip_text"
    library = "open_clip"
    tower = "text"
    hosts = (_TEXT, _CLIP)
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {Site.MID: _HAVE, Site.PRE: _HAVE, Site.AROUND: _HAVE}

    def blocks(self, model: Any) -> list[Block]:
        return blocks_of(model)

    def prefix(self, model: Any) -> int:
        return 1 if _pooling(model) == "first" else 2

    def length(self, model: Any) -> int:
        return model.positional_embedding.shape[0]

    def grid(self, model: Any) -> tuple[int, int] | None:
        return None

    def width(self, model: Any) -> int:
        return model.positional_embedding.shape[1]

    def heads(self, model: Any) -> int:
        return model.transformer.resblocks[0].attn.num_heads

    def input_size(self, model: Any) -> tuple[int, ...]:
        return (model.context_length,)

    def nominal(self, model: Any, size: tuple[int, ...], batch: int = 1) -> Any:
        text = torch.zeros(batch, *size, dtype=torch.int64, device="meta")
        return (None, text) if _CLIP in class_paths(model) else text

    def check(self, model: Any, site: Site) -> None:
        own = is_own(model, _TEXT, "_embeds") if _TEXT in class_paths(model) else is_own(model, _CLIP, "encode_text")
        if not own:
            raise IncompatibleError(
                f"{type(model).__name__} embeds or pools its text in its own way; visiontok runs open_clip's "
                "TextTransformer and CLIP."
            )
        check_stack(model)

    def swaps(self, model: Any) -> list[Swap]:
        outer = PatchedText if _TEXT in class_paths(model) else PatchedCLIP
        swaps = swaps_of(model, PatchedTransformer, PatchedResidualBlock, PatchedCustomBlock)
        return [Swap("", model, outer), *swaps]

    def example(self) -> tuple[nn.Module, Tensor]:
        return self.examples()["causal"]

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from open_clip.transformer import TextTransformer

        size = {"context_length": 16, "vocab_size": 64, "width": 48, "heads": 3, "layers": 4, "output_dim": 24}
        variants: dict[str, dict[str, Any]] = {
            "causal": {},
            "bidirectional": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
            "coca": {"embed_cls": True, "output_tokens": True, "pad_id": 0},
        }
        made: dict[str, tuple[nn.Module, Tensor]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            text = torch.cat((torch.randint(1, 62, (2, 15)), torch.full((2, 1), 63)), dim=1)
            for key, options in variants.items():
                model: Any = TextTransformer(**size, **options)
                # open_clip starts embeddings so small that every text gives nearly the same output.
                nn.init.normal_(model.token_embedding.weight, std=0.5)
                nn.init.normal_(model.positional_embedding, std=0.2)
                made[key] = (model.eval(), text)
        return made
