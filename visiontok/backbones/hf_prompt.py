"""Shortened prompts: what a patched multimodal model does with a call of `forward` or `generate`."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from visiontok.backbones import hf_cache, hf_decoder, hf_hooks
from visiontok.backbones.hf_pictures import MODALITIES, Encoded, encode, pixels_in
from visiontok.backbones.hf_watching import Layout
from visiontok.core.compacting import Compacted, Span, compact, find_spans
from visiontok.core.multimodal import MultimodalReduction, VisualTrace
from visiontok.core.pictures import Kept, Picture
from visiontok.core.prompt import decide_pictures
from visiontok.errors import IncompatibleError

__all__ = ["forward", "generate", "nominal_grid"]

_MEMORY = "_visiontok_turns"
# Per-token inputs besides ids, and their padding.
_ALONG = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "moe_mm_token_type_ids": 0}
_DROPPED = ("image_sizes", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "batch_num_images")
_SELECTION = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")


class _Inside(threading.local):
    """Whether this thread runs inside a patched `generate`, whose inner calls are shortened already."""

    def __init__(self) -> None:
        self.depth = 0


_inside = _Inside()


@dataclass
class Memory:
    """What was removed from the turns that a cache holds.

    Attributes:
        kept: Columns that remain, per modality and picture.
        counts: Placeholders, likewise.
        length: Columns of the full prompts so far.
        live: (B, L') bool mask of the shortened prompt.
        offset: (B, 1) positions by which the tokens of the full prompt outnumber the columns of the shortened one.
        original: Whether positions of the full prompt are in use.
    """

    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    length: int = 0
    live: Tensor | None = None
    offset: Tensor | None = None
    original: bool = False


def nominal_grid(model: Any, layout: Layout) -> tuple[int, int] | None:
    """(h, w) of an image of the size that the tower was made for, as the language model reads it."""
    vision = getattr(model.config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if isinstance(size, (list, tuple)):
        size, patch = size[0], patch[0] if isinstance(patch, (list, tuple)) else patch
    if isinstance(size, int) and isinstance(patch, int):
        side = size // patch
        return (side // 2, side // 2) if layout.form == "shuffled" else (side, side)
    # Towers that take any size: an image of 448 pixels, their usual example.
    merge = getattr(vision, "spatial_merge_size", None)
    if not isinstance(patch, int):
        return None
    side = max(448 // (patch * (merge or 1)), 1)
    return side, side


def forward(model: Any, host: Callable[..., Any], given: dict[str, Any]) -> Any:
    """One forward of a patched model.

    Args:
        model: The model.
        host: Its own forward.
        given: The call's arguments by name.
    """
    reduction: MultimodalReduction = model._visiontok
    memory = None
    if _inside.depth == 0:
        given, memory = _shortened(model, reduction, given)
    return _remembered(_run(model, reduction, host, given), memory)


def _run(model: Any, reduction: MultimodalReduction, host: Callable[..., Any], given: dict[str, Any]) -> Any:
    if not reduction.acts_in_decoder:
        return host(**given)
    labels = given.get("labels") if reduction.stages else None
    with hf_hooks.running(model, reduction, given) as run:
        if labels is None:
            return host(**given)
        out = host(**{**given, "labels": None})
    return _with_loss(model, out, run.follow(labels), given)


def _with_loss(model: Any, out: Any, labels: Tensor, given: Mapping[str, Any]) -> Any:
    """The output with the loss over the tokens that the last layer still had."""
    counted = {name: given[name] for name in ("num_items_in_batch",) if name in given}
    logits = out.logits if hasattr(out, "logits") else out[0]
    vocabulary = model.config.get_text_config().vocab_size
    loss = model.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **counted)
    if not hasattr(out, "logits"):
        return (loss, *out)
    out.loss = loss
    return out


def generate(model: Any, host: Callable[..., Any], given: dict[str, Any]) -> Any:
    """`generate` of a patched model: the prompt is shortened, and comes back whole before the new tokens."""
    reduction: MultimodalReduction = model._visiontok
    if reduction.acts_in_decoder:
        hf_decoder.check_generation(model, given)
    full = given.get("input_ids")
    with torch.no_grad():
        short, memory = _shortened(model, reduction, given, generating=True)
    _inside.depth += 1
    try:
        out = host(**short)
    finally:
        _inside.depth -= 1
    if short is given or full is None:
        return out
    return _remembered(_restored(out, full, short["input_ids"]), memory)


def _remembered(out: Any, memory: Memory | None) -> Any:
    """The output, whose cache knows what is missing from the turns that it holds."""
    cache = hf_cache.cache_in(out)
    if memory is not None and cache is not None:
        setattr(cache, _MEMORY, memory)
    return out


def _restored(out: Any, full: Tensor, short: Tensor) -> Any:
    """The output with the prompt that the caller passed in place of the shortened one."""
    plain = isinstance(out, Tensor)
    sequences = out if plain else out.sequences
    copies = sequences.shape[0] // full.shape[0]
    whole = torch.cat((full.repeat_interleave(copies, 0).to(sequences), sequences[:, short.shape[1] :]), dim=1)
    if plain:
        return whole
    out.sequences = whole
    return out


def _shortened(
    model: Any, reduction: MultimodalReduction, given: dict[str, Any], generating: bool = False
) -> tuple[dict[str, Any], Memory | None]:
    """The call with a shortened prompt, or itself, and what is to be remembered of it."""
    cache = hf_cache.cache_in(given)
    memory: Memory | None = getattr(cache, _MEMORY, None)
    brings = any(pixels_in(given, modality) for modality in MODALITIES)
    if reduction.prompt is None and reduction.inner is None:
        return given, None
    if not brings:
        return (given if memory is None else _continued(model, given, memory)), None
    if given.get("mm_encoder_outputs"):
        raise IncompatibleError("give images or mm_encoder_outputs, not both.")
    ids = given.get("input_ids")
    if ids is None:
        raise IncompatibleError(
            "a patched model needs input_ids with its placeholders; inputs_embeds do not show them."
        )
    backbone: Any = reduction.backbone
    layout = backbone.layout(model)
    encoded = encode(model, layout, given, reduction.taps, reduction.needs, reduction.tower_chain)
    shortening = _Shortening(model, reduction, given, encoded, memory, generating)
    call = shortening.call()
    return call, shortening.memory if shortening.memory.live is not None else None


class _Shortening:
    """One prompt with its encoded pictures."""

    def __init__(
        self,
        model: Any,
        reduction: MultimodalReduction,
        given: dict[str, Any],
        encoded: dict[str, Encoded],
        memory: Memory | None,
        generating: bool,
    ) -> None:
        self.model, self.reduction, self.given, self.encoded = model, reduction, given, encoded
        self.generating = generating
        # A copy: a call that fails must not leave its pictures with the cache.
        self.memory = Memory() if memory is None else replace(memory, kept={**memory.kept}, counts={**memory.counts})
        self.decided: list[VisualTrace] = []
        self.carry: list[Mapping[str, Tensor]] = []
        self.ids: Tensor = given["input_ids"]
        mask = given.get("attention_mask")
        self.mask = torch.ones_like(self.ids, dtype=torch.bool) if mask is None else mask.bool()

    def call(self) -> dict[str, Any]:
        spans, kept, features = [], [], {}
        changed = bool(self.memory.kept)
        for modality in MODALITIES:
            own, chosen, made, differs = self._modality(modality)
            spans += own
            kept += chosen
            changed |= differs
            if made is not None:
                features[modality] = made
        self.reduction.started([len(columns) for columns in kept])
        for trace in self.decided:
            self.reduction.noted(trace)
        call = {name: value for name, value in self.given.items() if not self._is_input(name)}
        if not changed:
            # Nothing goes: the host's own features, and the prompt as it is.
            call["mm_encoder_outputs"] = {name: encoded.output for name, encoded in self.encoded.items()}
            return {**call, **{name: self.given[name] for name in _DROPPED if self.given.get(name) is not None}}
        short = compact(self.mask, spans, kept)
        return self._short_call(call, short, features)

    def _is_input(self, name: str) -> bool:
        return name.startswith("pixel_values") or name in ("image_patches", *_DROPPED, *_SELECTION)

    def _modality(self, modality: str) -> tuple[list[Span], list[Tensor], Any, bool]:
        token = getattr(self.model.config, f"{modality}_token_id", None)
        known = self.memory.kept.get(modality, [])
        encoded = self.encoded.get(modality)
        if encoded is None and not known:
            return [], [], None, False
        counts = list(self.memory.counts.get(modality, []))
        pictures = () if encoded is None else encoded.vision.pictures
        total = 0 if token is None else int((self.ids == token).sum())
        own_counts = [picture.placeholders for picture in pictures]
        if sum(counts) + sum(own_counts) != total and sum(own_counts) == total:
            # The whole conversation's images again; those of turns in the cache are there already.
            pictures, own_counts = pictures[len(counts) :], own_counts[len(counts) :]
        spans = find_spans(self.ids, token or 0, [*counts, *own_counts], modality)
        if encoded is None or not pictures:
            return spans, known, None, False
        kept, decided = self._kept(encoded, pictures, spans[len(counts) :])
        columns = [k.columns if p.places is None else p.places[k.columns] for k, p in zip(kept, pictures)]
        self.memory.kept[modality] = [*known, *columns]
        self.memory.counts[modality] = [*counts, *own_counts]
        differs = decided or any(picture.places is not None for picture in pictures)
        made = _output(encoded.output, kept)
        if self.carry:
            made._visiontok_carry, self.carry = self.carry, []
        return spans, self.memory.kept[modality], made, differs

    def _kept(self, encoded: Encoded, pictures: Sequence[Picture], spans: Sequence[Span]) -> tuple[list[Kept], bool]:
        placed = tuple(replace(picture, sample=span.sample) for picture, span in zip(pictures, spans))
        stop = self.reduction.prompt
        decided = None
        if stop is not None:
            decided = decide_pictures(stop.reducer, stop.budget, encoded.vision._replace(pictures=placed))
        if decided is None or stop is None:
            every = [torch.arange(len(p.features), device=p.features.device) for p in pictures]
            return [Kept(columns, p.features, p.extras) for columns, p in zip(every, pictures)], False
        self.decided.append(
            VisualTrace(stop.reducer.site, stop.layer, [k.columns for k in decided.kept], [p.tokens for p in placed])
        )
        if any(decided.carry):
            self.carry.extend(decided.carry)
        return decided.kept, True

    def _short_call(self, call: dict[str, Any], short: Compacted, features: dict[str, Any]) -> dict[str, Any]:
        call["input_ids"] = short.take(self.ids, _padding(self.model))
        call["attention_mask"] = short.live.to(self.ids.dtype)
        call.update(_along(self.given, short))
        if features:
            call["mm_encoder_outputs"] = features
        self._place(call, short)
        self._remember(call, short)
        return call

    def _place(self, call: dict[str, Any], short: Compacted) -> None:
        """Positions of the shortened prompt, where they are not simply renumbered."""
        given = self.given.get("position_ids")
        planes = _rope_index(self.model, self.given)
        full = (self.mask.long().cumsum(-1) - 1).clamp_min(0) if given is None else given
        if planes is not None:
            self._place_planes(call, short, _gathered(planes, short), full)
        elif self.reduction.keeps_positions or given is not None:
            call["position_ids"] = _gathered(full, short)

    def _place_planes(self, call: dict[str, Any], short: Compacted, planes: Tensor, full: Tensor) -> None:
        compacted = (short.live.long().cumsum(-1) - 1).clamp_min(0)
        text = _gathered(full, short) if self.reduction.keeps_positions else compacted
        inner = self.model.base_model
        # Later tokens follow the largest position; the model counts from the length of the mask.
        top = planes.masked_fill(~short.live, -1).amax(dim=(0, 2)) + 1
        inner.rope_deltas = (top - short.live.sum(1)).unsqueeze(1)
        call["position_ids"] = torch.cat((text[None], planes)) if self.generating else planes
        call.pop("mm_token_type_ids", None)

    def _remember(self, call: dict[str, Any], short: Compacted) -> None:
        memory, cache = self.memory, hf_cache.cache_in(self.given)
        memory.length, memory.live = self.ids.shape[1], short.live
        memory.offset = (self.mask.sum(1) - short.live.shape[1]).unsqueeze(1)
        memory.original = self.reduction.keeps_positions
        if cache is not None:
            setattr(cache, _MEMORY, memory)


def _along(given: Mapping[str, Any], short: Compacted) -> dict[str, Tensor]:
    """What a call says of each token besides its id, shortened."""
    found = {name: value for name, value in given.items() if name in _ALONG and isinstance(value, Tensor)}
    whole = given["input_ids"].shape
    made = {name: short.take(value, _ALONG[name]) for name, value in found.items() if value.shape == whole}
    if "labels" in made:
        # Padding that was not there before predicts nothing.
        first = short.live.long().argmax(dim=1, keepdim=True)
        made["labels"] = made["labels"].scatter(1, first, -100)
    return made


def _gathered(positions: Tensor, short: Compacted) -> Tensor:
    """(…, B, L) positions at the columns that remain."""
    index = short.source.expand(*positions.shape[:-2], *short.source.shape)
    positions = positions.expand(*positions.shape[:-2], *short.source.shape[:1], positions.shape[-1])
    return positions.gather(-1, index).masked_fill(~short.live, 0)


def _output(output: Any, kept: Sequence[Kept]) -> Any:
    """The host's output with what remains of each picture."""
    made = copy.copy(output)
    features = [k.features for k in kept]
    made["pooler_output"] = features if isinstance(output.pooler_output, (list, tuple)) else torch.cat(features)[None]
    if getattr(output, "deepstack_features", None):
        layers = range(len(output.deepstack_features))
        made["deepstack_features"] = [[k.extras[layer] for k in kept] for layer in layers]
    return made


def _padding(model: Any) -> int:
    text = model.config.get_text_config()
    return text.pad_token_id if isinstance(text.pad_token_id, int) else 0


def _rope_index(model: Any, given: Mapping[str, Any]) -> Tensor | None:
    """(3, B, L) temporal, height and width positions of the full prompt, for models that use them."""
    inner = model.base_model
    function = getattr(inner, "get_rope_index", None)
    if function is None:
        return None
    if given.get("mm_token_type_ids") is None:
        raise IncompatibleError("mm_token_type_ids is missing; the processor returns it, and positions are made of it.")
    names = (
        "input_ids",
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "attention_mask",
    )
    return function(**{name: given[name] for name in names if given.get(name) is not None})[0]


def _continued(model: Any, given: dict[str, Any], memory: Memory) -> dict[str, Any]:
    """A call without new pictures on a cache whose prompt was shortened."""
    call, ids = dict(given), given.get("input_ids")
    if memory.live is None or memory.offset is None:
        return given
    mask = given.get("attention_mask")
    # Positions in planes are the model's own, which knows by how much they differ.
    planes = hasattr(model.base_model, "get_rope_index")
    original = memory.original and given.get("position_ids") is None and not planes
    if mask is not None and mask.shape[1] > memory.length:
        call["attention_mask"] = torch.cat((memory.live.to(mask), mask[:, memory.length :]), dim=1)
    if ids is not None and ids.shape[1] > memory.length:
        spans, kept = [], []
        for modality, columns in memory.kept.items():
            token = getattr(model.config, f"{modality}_token_id", None)
            spans += find_spans(ids, token or 0, memory.counts[modality], modality)
            kept += columns
        live = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        short = compact(live, spans, kept)
        call["input_ids"] = short.take(ids, _padding(model))
        call["attention_mask"] = short.live.to(ids.dtype)
        for name, fill in _ALONG.items():
            if isinstance(given.get(name), Tensor):
                call[name] = short.take(given[name], fill)
        if original:
            call["position_ids"] = _gathered((live.long().cumsum(-1) - 1).clamp_min(0), short)
    elif original and ids is not None:
        past = hf_cache.cache_in(given).get_seq_length()
        places = torch.arange(ids.shape[1], device=ids.device) + past
        call["position_ids"] = places + memory.offset
    return call
