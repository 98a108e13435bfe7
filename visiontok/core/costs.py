"""What a multimodal model computes and caches before and after a reduction: encoder, projector, prefill, decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from visiontok.core.reducer import Where
from visiontok.errors import ParameterError

if TYPE_CHECKING:
    from visiontok.core.multimodal import MultimodalReduction, Stop

__all__ = ["Anatomy", "Change", "CostReport", "LayerCost", "paper_tflops", "report"]

NEW_TOKENS = 64


class LayerCost(NamedTuple):
    """What one decoder layer costs.

    Attributes:
        token: MACs of a token outside the attention matrix.
        pair: MACs of a query with a key, scores and values together.
        cached: Numbers that a token leaves in the key-value cache.
    """

    token: int
    pair: int
    cached: int


class Anatomy(NamedTuple):
    """Costs of the parts of an unpatched model.

    Attributes:
        encoder: MACs of the vision tower on one nominal image; None where it is not known how to count them.
        projector: MACs of one token that the decoder reads; None where the tower projects by itself.
        layers: Of the decoder.
        head: MACs of the language modeling head on one token.
        width: d, channels of the decoder.
        inner: m, channels inside its feed-forward networks.
        dtype: Of the decoder.
    """

    encoder: int | None
    projector: int | None
    layers: Sequence[LayerCost]
    head: int
    width: int
    inner: int
    dtype: torch.dtype


class Change(NamedTuple):
    """A number before and after the reduction; None where it is not known."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class CostReport:
    """Compute and memory of one prompt with its images. Prints as a table.

    GMACs are those of the model: linear layers as they are (grouped-query attention, gated feed-forward networks),
    whole attention matrices, the head on the last token. What a method computes to decide is not in them.

    Attributes:
        prompt: Text tokens.
        images: Images of the nominal size, one run of the vision tower each.
        new_tokens: Generated tokens over which `decode` is the mean.
        dtype: Of the cache.
        encoder, projector: GMACs of all images. `projector` is None where the tower projects.
        prefill: GMACs of the decoder on the prompt, and of its head on one token.
        decode: GMACs of one generated token.
        kv_bytes: Of the key-value cache after the prefill.
        tokens_input: Visual tokens that the decoder is given: the count of VTC-CLS or VisionZip.
        tokens_mean: Visual tokens per layer, averaged over the decoder's: the count of FastV, SparseVLM or MustDrop.
        paper_tflops: 2 * sum over layers of (4 n d^2 + 2 n^2 d + 3 n d m) / 1e12 with n visual tokens: what papers
            compare. No text, no head, no grouped queries, no encoder.
        tokens: Visual tokens that each decoder layer computes on.
        entries: What each layer's cache holds after the prefill, text included.
        notes: What a reader of the numbers must know.
    """

    prompt: int
    images: int
    new_tokens: int
    dtype: torch.dtype
    encoder: Change
    projector: Change
    prefill: Change
    decode: Change
    kv_bytes: Change
    tokens_input: Change
    tokens_mean: Change
    paper_tflops: Change
    tokens: list[int]
    entries: list[int]
    notes: tuple[str, ...] = ()

    @property
    def first_token(self) -> Change:
        """GMACs until the first token: encoder, projector and prefill."""
        parts = (self.encoder, self.projector, self.prefill)
        return Change(*(sum(values) for values in zip(*([v or 0.0 for v in part] for part in parts))))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; pairs are (before, after)."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["first_token"] = self.first_token
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def __str__(self) -> str:
        paper = "papers' TFLOPs (visual tokens only)"
        rows = [f"{'':<16} {'GMACs before':>12} {'after':>12}   {paper} before, after"]
        lines = {
            "encoder": self.encoder,
            "projector": self.projector,
            "prefill": self.prefill,
            "to first token": self.first_token,
            "decode, a token": self.decode,
        }
        for name, (before, after) in lines.items():
            tail = "   {:.3g}, {:.3g}".format(*self.paper_tflops) if name == "prefill" else ""
            rows.append(f"{name:<16} {_number(before):>12} {_number(after):>12}{tail}")
        size = [_number((value or 0) / 1e6) for value in self.kv_bytes]
        rows.append(f"KV cache: {size[0]} -> {size[1]} MB in {str(self.dtype).removeprefix('torch.')}")
        rows.append(
            f"visual tokens: input {self.tokens_input.before:g} -> {self.tokens_input.after:g}, "
            f"mean of layers {self.tokens_mean.before:g} -> {self.tokens_mean.after:.4g}"
        )
        rows.append(f"of {self.images} image(s) of the nominal size and {self.prompt} text tokens")
        return "\n".join([*rows, *self.notes])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def paper_tflops(tokens: Sequence[int], width: int, inner: int) -> float:
    """The TFLOPs of papers: 2 (4 n d^2 + 2 n^2 d + 3 n d m) summed over the layers, n visual tokens each.

    Args:
        tokens: n of each layer.
        width: d.
        inner: m.
    """
    return 2e-12 * sum(4 * n * width**2 + 2 * n**2 * width + 3 * n * width * inner for n in tokens)


def report(
    reduction: MultimodalReduction,
    *,
    prompt: Any = 0,
    images: int = 1,
    new_tokens: int = NEW_TOKENS,
    dtype: torch.dtype | None = None,
) -> CostReport:
    """Compute and memory before and after a reduction, counted on the meta device; nothing is run.

    Args:
        reduction: The handle on the patched model.
        prompt: Text tokens: how many, or their ids without image placeholders.
        images: Images of the nominal size, one run of the tower each; a cut image counts once per crop, thumbnail
            included. Newlines between rows of crops are not counted.
        new_tokens: Generated tokens.
        dtype: Of the cache; default: the model's.

    Raises:
        ParameterError: An argument is out of range.
        IncompatibleError: The costs of the model's family are not known.
    """
    text = _length(prompt)
    for name, value, low in (("images", images, 0), ("new_tokens", new_tokens, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ParameterError(f"{name} must be an int >= {low}, got {value!r}.")
    parts: Anatomy = reduction.backbone.anatomy(reduction.model)
    kind = dtype or parts.dtype
    # A `MultimodalPlan`, which the base class does not say.
    plan: Any = reduction.plan
    full = [(plan.length - plan.prefix) * images] * plan.decoder
    tokens = [n * images for n in plan.tokens]
    # A tower without a plan of its own gives what it always gave.
    leaving = plan.length - plan.prefix
    if plan.tower is not None:
        leaving = (plan.tower.tokens[-2:-1] or plan.tower.tokens)[0] - plan.tower.prefix
    entries = [_entries(reduction.evictions.get(i), i, n, text, plan.decoder) for i, n in enumerate(tokens)]
    before = [text + n for n in full]
    return CostReport(
        prompt=text,
        images=images,
        new_tokens=new_tokens,
        dtype=kind,
        encoder=_encoder(reduction, parts, images),
        projector=_projector(parts, full[0], leaving * images),
        prefill=Change(_prefill(parts, before), _prefill(parts, [text + n for n in tokens])),
        decode=Change(_decode(parts, before, new_tokens), _decode(parts, entries, new_tokens)),
        kv_bytes=Change(_cache(parts, before, kind), _cache(parts, entries, kind)),
        tokens_input=Change(full[0], tokens[0]),
        tokens_mean=Change(full[0], sum(tokens) / len(tokens)),
        paper_tflops=Change(
            paper_tflops(full, parts.width, parts.inner), paper_tflops(tokens, parts.width, parts.inner)
        ),
        tokens=tokens,
        entries=entries,
        notes=_notes(reduction, parts),
    )


def _length(prompt: Any) -> int:
    if isinstance(prompt, Tensor):
        return int(prompt.shape[-1])
    if isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes)):
        return len(prompt)
    if not isinstance(prompt, int) or isinstance(prompt, bool) or prompt < 0:
        raise ParameterError(f"prompt must be a number of text tokens >= 0 or their ids, got {prompt!r}.")
    return prompt


def _encoder(reduction: MultimodalReduction, parts: Anatomy, images: int) -> Change:
    if reduction.inner is not None:
        tower = reduction.inner.report()
        return Change(tower.gmacs_before * images, tower.gmacs_after * images)
    if parts.encoder is None:
        return Change(None, None)
    return Change(parts.encoder * images / 1e9, parts.encoder * images / 1e9)


def _projector(parts: Anatomy, full: int, leaving: int) -> Change:
    # Methods between tower and decoder read or choose from projected tokens, so that all of them are projected.
    if parts.projector is None:
        return Change(None, None)
    return Change(parts.projector * full / 1e9, parts.projector * leaving / 1e9)


def _prefill(parts: Anatomy, lengths: Sequence[int]) -> float:
    layers = sum(layer.token * n + layer.pair * n * n for layer, n in zip(parts.layers, lengths))
    return (layers + (parts.head if any(lengths) else 0)) / 1e9


def _decode(parts: Anatomy, entries: Sequence[int], new_tokens: int) -> float:
    # Each generated token attends to itself and to those before it.
    own = (new_tokens + 1) / 2
    return (sum(layer.token + layer.pair * (n + own) for layer, n in zip(parts.layers, entries)) + parts.head) / 1e9


def _cache(parts: Anatomy, entries: Sequence[int], dtype: torch.dtype) -> int:
    return sum(layer.cached * n for layer, n in zip(parts.layers, entries)) * dtype.itemsize


def _entries(stop: Stop | None, layer: int, tokens: int, text: int, depth: int) -> int:
    """What stays in a layer's cache of a prompt with so many visual tokens."""
    if stop is None or stop.reducer.revives:
        return text + tokens
    item = text + tokens if stop.reducer.over == "all" else tokens
    return text + tokens - (stop.reducer.removed(item, stop.budget, Where(layer, depth), 0) if item else 0)


def _notes(reduction: MultimodalReduction, parts: Anatomy) -> tuple[str, ...]:
    notes: list[str] = []
    points = list(reduction.plan.points)
    if reduction.inner is not None:
        points += reduction.inner.plan.points
    free = sorted({p.reducer.name for p in points if p.reducer.ragged and p.after >= p.before})
    if free:
        notes.append(f"the image decides how much {', '.join(free)} removes: the numbers after are upper bounds")
    hidden = sorted({stop.reducer.name for stop in reduction.evictions.values() if stop.reducer.revives})
    if hidden:
        notes.append(f"{', '.join(hidden)} hides entries of the cache and saves neither memory nor compute")
    if any(not stop.reducer.revives for stop in reduction.evictions.values()):
        notes.append("evicting from the cache saves memory and attention of later tokens, no prefill")
    if parts.encoder is None and reduction.inner is None:
        notes.append("the encoder of this family is not counted")
    return tuple(notes)
