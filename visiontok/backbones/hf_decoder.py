"""Reductions inside transformers' decoders: hooks on the layers, and caches whose layers differ in length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.backbones import hf_attention, hf_cache
from visiontok.backbones.hf_attention import KEYWORD
from visiontok.core.compacting import Span, find_spans
from visiontok.core.decoding import Seen, Tokens, evict, reduce_layer, survivors, visible
from visiontok.core.multimodal import MultimodalReduction, VisualTrace
from visiontok.core.reducer import Reducer
from visiontok.core.signals import Site
from visiontok.errors import IncompatibleError, StateLostError

__all__ = ["ATTENTION", "Run", "check", "check_generation", "check_layer", "stack_of"]

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
_VISUAL = ("image", "video")


def stack_of(model: Any) -> Any:
    """The decoder: the module that holds the layers of the language model."""
    stack = getattr(model.base_model, "language_model", None)
    stack = getattr(stack, "model", stack)
    if stack is None or not hasattr(stack, "layers"):
        raise IncompatibleError(f"{type(model).__name__} has no decoder that visiontok knows.")
    return stack


def check(model: Any) -> None:
    """Raises IncompatibleError if nothing can happen inside the model's decoder."""
    stack = stack_of(model)
    kinds = set(getattr(stack.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise IncompatibleError(
            f"the decoder of {type(model).__name__} has layers of kinds {', '.join(sorted(kinds))}; reductions inside "
            "a decoder need full attention in every layer. Use a reducer of site POST or EMBED."
        )
    name = hf_attention.base_name(stack.config._attn_implementation or "eager")
    if name not in ATTENTION:
        raise IncompatibleError(
            f"the decoder's attention is {name!r}; reductions inside a decoder need one of {', '.join(ATTENTION)} "
            "(model.set_attn_implementation)."
        )


def check_layer(model: Any, reducer: Reducer, layer: int) -> None:
    """Raises IncompatibleError if tokens cannot go before that decoder layer."""
    indexes = getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ()
    if layer < len(indexes):
        raise IncompatibleError(
            f"{reducer.name} acts before decoder layer {layer}, but {type(model).__name__} adds visual features up to "
            f"layer {len(indexes) - 1} (DeepStack); act at layer {len(indexes)} or later."
        )


def check_generation(model: Any, given: Mapping[str, Any]) -> None:
    """Raises IncompatibleError for ways to generate that need the whole prompt in every layer."""
    config = given.get("generation_config") or model.generation_config
    chunk = given.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if chunk is not None:
        raise IncompatibleError(
            f"prefill_chunk_size={chunk}: a reducer inside the decoder decides on the whole prompt at once. Prefill in "
            "one piece, or use a reducer of site POST or EMBED."
        )
    kind = given.get("cache_implementation", getattr(config, "cache_implementation", None))
    if kind not in (None, "dynamic", "static"):
        raise IncompatibleError(
            f"cache_implementation={kind!r}: reducers inside the decoder know dynamic and static caches."
        )


# ---- one call of the model


class _Table(NamedTuple):
    """What replaces the host's positions and mask from a layer on."""

    tokens: Tokens
    rotary: Any
    places: Tensor | None
    mask: Any


class Run:
    """One forward of the whole model, and what its decoder layers need to know of it. Travels with the call."""

    def __init__(self, model: Any, reduction: MultimodalReduction, given: Mapping[str, Any]) -> None:
        self.model, self.reduction, self.given = model, reduction, given
        self.stack = stack_of(model)
        self.base = hf_attention.base_name(self.stack.config._attn_implementation or "eager")
        self.cache = hf_cache.cache_in(given)
        self.later = hf_cache.layers_of(self.cache) is not None or _filled(self.cache)
        self.table: _Table | None = None
        self.tokens: Tokens | None = None
        self.history: dict[int, Tokens] = {}
        self.seen: dict[int, Seen] = {}
        evicts = {layer for layer, stop in reduction.evictions.items() if stop.reducer.needs}
        self.revived = {layer for layer, stop in reduction.evictions.items() if stop.reducer.revives}
        self.wanted = evicts | {
            layer - 1 for layer, stop in reduction.stages.items() if stop.reducer.needs and stop.reducer.look != "ahead"
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def see(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> None:
        """Called with the inputs of every attention of the decoder."""
        layer = module.layer_idx
        if layer not in (self.revived if self.later else self.wanted):
            return
        length = query.shape[2]
        if self.later and self.cache is not None:
            held = self.cache.layers[layer]
            length = int(held.get_seq_length()) - getattr(held, "gone", 0)
        # A static cache hands over its whole buffer.
        self.seen[layer] = Seen(query, key[:, :, :length], value[:, :, :length], scale)

    def open(self, embeds: Tensor, mask: Any) -> None:
        """Finds the visual tokens of a prompt."""
        batch, length = embeds.shape[:2]
        live = _live(mask, batch, length, embeds.device)
        spans = self._spans(length)
        self.memo = tuple(self._carry(len(spans)))
        whole = torch.arange(length, device=embeds.device).expand(batch, -1)
        first = tuple(len(span.columns) for span in spans)
        self.tokens = Tokens(whole, live, tuple(spans), first, self.memo, True)
        self.reduction.started_decoder([len(span.columns) for span in spans])

    def follow(self, labels: Tensor) -> Tensor:
        """(B, L) labels at the columns that the last layer still had."""
        if self.tokens is None or self.tokens.whole.shape == labels.shape:
            return labels
        made = labels.gather(1, self.tokens.whole).masked_fill(~self.tokens.live, -100)
        # The first token follows nothing but padding.
        return made.scatter(1, self.tokens.live.long().argmax(dim=1, keepdim=True), -100)

    def _carry(self, count: int) -> Sequence[Mapping[str, Tensor]]:
        carried = self.given.get("mm_encoder_outputs") or {}
        own = [c for name in _VISUAL if name in carried for c in getattr(carried[name], "_visiontok_carry", [])]
        copies = count // len(own) if own else 0
        # Beams repeat every sample's pictures side by side.
        return [c for c in own for _ in range(copies)] if copies * len(own) == count and own else [{}] * count

    def _spans(self, length: int) -> list[Span]:
        ids = self.given.get("input_ids")
        if ids is None:
            raise IncompatibleError("reducers inside the decoder need input_ids to find the visual tokens, got none.")
        outputs, spans = self.given.get("mm_encoder_outputs") or {}, []
        for name in _VISUAL:
            token = getattr(self.model.config, f"{name}_token_id", None)
            if token is None:
                continue
            counts = _counts(outputs.get(name)) or _runs(ids == token)
            if counts:
                spans += find_spans(ids, token, counts, name)
        return spans

    def before(self, index: int, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What a layer gets instead of what the host hands it."""
        if self.later:
            hf_cache.substitute(self, index, x, kwargs)
            return x
        stop = self.reduction.stages.get(index)
        if stop is not None and self.tokens is not None and self.tokens.spans:
            x = self._reduce(index, stop, x, kwargs)
        if self.table is not None:
            kwargs["position_embeddings"], kwargs["attention_mask"] = self.table.rotary, self.table.mask
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = self.table.places
        if self.tokens is not None:
            self.history[index] = self.tokens
        return x

    def _reduce(self, index: int, stop: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        tokens: Any = self.tokens
        seen = None
        if stop.reducer.needs:
            seen = (
                (lambda: self._ahead(index, x, kwargs))
                if stop.reducer.look == "ahead"
                else lambda: self._saw(index - 1)
            )
        made = reduce_layer(stop, len(self.stack.layers), x, tokens, seen)
        if index - 1 not in self.reduction.evictions:
            self.seen.pop(index - 1, None)
        if made is None:
            return x
        before = [len(span.columns) for span in tokens.spans]
        x, self.tokens, stays = made
        self.reduction.noted(VisualTrace(Site.LLM, index, stays, before))
        self.table = self._tabled(x, kwargs, stop.reducer.positions == "compact")
        return x

    def _saw(self, layer: int) -> Seen:
        if layer not in self.seen:
            raise StateLostError(
                f"the attention of decoder layer {layer} was not seen. Its attention implementation was changed after "
                "patching; unpatch, change it, and patch again."
            )
        return self.seen[layer]

    def _ahead(self, index: int, x: Tensor, kwargs: Mapping[str, Any]) -> Seen:
        """Queries and keys of a layer that has not run, from its own modules."""
        table: Any = self.table
        rotary = kwargs["position_embeddings"] if table is None else table.rotary
        layer = self.stack.layers[index]
        look = _Look()
        layer.self_attn(
            hidden_states=layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None, **{KEYWORD: look}
        )
        return look.seen

    def _tabled(self, x: Tensor, kwargs: Mapping[str, Any], compact: bool) -> _Table:
        tokens: Any = self.tokens
        whole, rotary, places = tokens.whole, kwargs["position_embeddings"], kwargs.get("position_ids")
        if self.table is None:
            self._full = rotary, places
        rotary, places = self._full
        if compact and not _planar(self.model):
            places = (tokens.live.long().cumsum(1) - 1).clamp_min(0)
            rotary = self.stack.rotary_emb(x, position_ids=places)
        else:
            rotary = tuple(_columns(table, whole, -2) for table in rotary)
            places = None if places is None else _columns(places, whole, -1)
        mask = hf_cache.prefill_mask(self.base, tokens, hf_cache.cache_in(kwargs), x)
        return _Table(tokens, rotary, places, mask)

    def after(self, index: int, kwargs: Mapping[str, Any]) -> None:
        """Evicts from the layer's cache what its own attention decides on, or hides it until the next token."""
        stop, cache = self.reduction.evictions.get(index), hf_cache.cache_in(kwargs)
        if stop is None or cache is None:
            return
        if index in self.revived:
            self._hide(index, stop, cache)
        elif stop.reducer.needs and not self.later:
            self._evict(index, cache)

    def _hide(self, index: int, stop: Any, cache: Any) -> None:
        tokens = hf_cache.tokens_of(cache, index) if self.later else self.history.get(index)
        seen = self.seen.pop(index, None)
        if tokens is not None and seen is not None:
            sees = visible(stop, len(self.stack.layers), tokens, seen)
            hf_cache.hide(cache, index, tokens, sees, self.compacts(index))

    def leave(self, cache: Any) -> None:
        """Evicts what depends on the whole prefill, and leaves a note with the cache."""
        if self.later or cache is None or self.tokens is None:
            return
        for index, stop in self.reduction.evictions.items():
            if not stop.reducer.needs:
                self._evict(index, cache)
        for index, tokens in self.history.items():
            if not hf_cache.known(cache, index) and tokens is not self.history[0]:
                hf_cache.note(
                    cache, index, tokens.live if tokens.padded else None, tokens.live.shape[1], self.compacts(index)
                )
        if hf_cache.layers_of(cache) is None:
            hf_cache.mark(cache)

    def compacts(self, index: int) -> bool:
        """Whether tokens after the prompt count from the length of a layer's cache."""
        if _planar(self.model):
            return False
        stops = [stop for layer, stop in self.reduction.stages.items() if layer <= index]
        stops += [self.reduction.evictions[index]] if index in self.reduction.evictions else []
        return bool(stops) and stops[-1].reducer.positions == "compact"

    def _evict(self, index: int, cache: Any) -> None:
        tokens, stop = self.history.get(index), self.reduction.evictions[index]
        if cache is None or tokens is None or (not tokens.spans and stop.reducer.over != "all"):
            return
        keys, values = hf_cache.entries(cache, index, tokens.live.shape[1])
        seen = (lambda: self._saw(index)) if stop.reducer.needs else None
        final: Any = self.tokens
        made = evict(stop, len(self.stack.layers), keys, values, tokens, seen, survivors(tokens, final))
        self.seen.pop(index, None) if index + 1 not in self.reduction.stages else None
        if made is None:
            return
        full = self.history[0].live.shape[1]
        hf_cache.replace(cache, index, made, full, self.compacts(index))
        self.reduction.noted(VisualTrace(Site.KV, index, made.kept, [len(span.columns) for span in tokens.spans]))


class _Look:
    """Takes the place of a run where only queries and keys of one attention are wanted."""

    seen: Seen

    def see(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> None:
        self.seen = Seen(query, key, value, scale)


def _planar(model: Any) -> bool:
    # Positions in several planes cannot be counted.
    return hasattr(model.base_model, "get_rope_index")


def _columns(table: Tensor, whole: Tensor, axis: int) -> Tensor:
    """Rows of a (…, B, L, d) or (…, B, L) table at the columns that remain."""
    tail = () if axis == -1 else table.shape[-1:]
    lead = table.shape[: table.dim() + axis - 1]
    table = table.expand(*lead, whole.shape[0], table.shape[axis], *tail)
    index = whole.view(*[1] * len(lead), *whole.shape, *[1] * len(tail)).expand(*lead, *whole.shape, *tail)
    return table.gather(table.dim() + axis, index)


def _live(mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.dim() == 4:
        # For caches of fixed size the mask is made beforehand; its last query sees every token that is none of padding.
        mask = mask[:, 0, -1, :length]
        mask = mask if mask.dtype == torch.bool else mask == 0
    return mask[:, :length].bool().expand(batch, length)


def _counts(output: Any) -> list[int]:
    features = getattr(output, "pooler_output", None)
    if features is None:
        return []
    return [len(f) for f in features]


def _runs(hits: Tensor) -> list[int]:
    """Lengths of unbroken runs of placeholders, row by row."""
    starts = hits & ~torch.nn.functional.pad(hits, (1, 0))[:, :-1]
    group = (starts.flatten().cumsum(0) - 1)[hits.flatten()]
    return torch.bincount(group).tolist() if group.numel() else []


def _filled(cache: Any) -> bool:
    return cache is not None and bool(cache.get_seq_length() > 0)
