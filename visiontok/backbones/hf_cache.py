"""transformers' caches after some of a prompt's entries went: what each layer holds, and the masks for later tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.core.decoding import Evicted, Tokens
from visiontok.errors import IncompatibleError

__all__ = [
    "cache_in",
    "entries",
    "hide",
    "known",
    "layers_of",
    "mark",
    "note",
    "prefill_mask",
    "replace",
    "substitute",
    "tokens_of",
]

_NAME = "_visiontok_layers"


class _Held(NamedTuple):
    """What a layer's cache holds of the prompt.

    Attributes:
        live: (B, E) bool, False for padding; None if there is none.
        length: E.
        compact: Whether later tokens count from the length of this cache.
        sees: (B, Hkv, E) bool, which entries the next tokens see; None for all live ones.
        tokens: What the entries are, where that is asked again.
    """

    live: Tensor | None
    length: int
    compact: bool
    sees: Tensor | None = None
    tokens: Tokens | None = None


def cache_in(given: Any) -> Any:
    """The cache in what a model takes or gives, under its name since transformers 5.24 or the one before; None if
    there is none."""
    if not isinstance(given, Mapping):
        return None
    return next((given[name] for name in ("cache", "past_key_values") if name in given), None)


def layers_of(cache: Any) -> dict[int, _Held] | None:
    """Per layer what it holds, for layers that are shorter than the prompt; None if no patched prefill filled it."""
    return getattr(cache, _NAME, None)


def mark(cache: Any) -> None:
    """Says that a patched prefill filled the cache."""
    if layers_of(cache) is None:
        setattr(cache, _NAME, {})


def known(cache: Any, index: int) -> bool:
    """Whether a layer has a note."""
    return index in (layers_of(cache) or {})


def note(cache: Any, index: int, live: Tensor | None, length: int, compact: bool) -> None:
    """Notes what a layer holds."""
    mark(cache)
    getattr(cache, _NAME)[index] = _Held(live, length, compact)


def hide(cache: Any, index: int, tokens: Tokens, sees: Tensor | None, compact: bool) -> None:
    """Notes which of a layer's entries (B, Hkv, E) the next tokens see."""
    mark(cache)
    live = tokens.live if tokens.padded else None
    getattr(cache, _NAME)[index] = _Held(live, tokens.live.shape[1], compact, sees, tokens)


def tokens_of(cache: Any, index: int) -> Tokens | None:
    """What a layer's entries are, where that was noted."""
    held = (layers_of(cache) or {}).get(index)
    return None if held is None else held.tokens


def entries(cache: Any, index: int, length: int) -> tuple[Tensor, Tensor]:
    """(B, Hkv, L', d) keys and values of the prompt in a layer's cache."""
    layer = cache.layers[index]
    return layer.keys[:, :, :length], layer.values[:, :, :length]


def replace(cache: Any, index: int, made: Evicted, full: int, compact: bool) -> None:
    """Puts what an eviction left in a layer's cache, the first of which goes on telling the length of the prompt.

    Raises:
        IncompatibleError: The layer is of a kind that cannot hold it.
    """
    layer, length = cache.layers[index], made.keys.shape[2]
    short = _short_layers()
    if type(layer) not in short:
        names = ", ".join(cls.__name__ for cls in short)
        raise IncompatibleError(f"a cache layer of kind {type(layer).__name__} cannot be shortened; known: {names}.")
    if hasattr(layer, "cumulative_length"):
        layer.keys[:, :, :length], layer.values[:, :, :length] = made.keys, made.values
        layer.keys[:, :, length:], layer.values[:, :, length:] = 0, 0
        layer.cumulative_length.fill_(length)
    else:
        layer.keys, layer.values = made.keys.contiguous(), made.values.contiguous()
    layer.__class__ = short[type(layer)]
    # Only the first layer is asked how long the prompt was.
    layer.gone = full - length if index == 0 else 0
    note(cache, index, made.live if made.padded else None, length, compact)


@functools.cache
def _short_layers() -> dict[type, type]:
    from transformers.cache_utils import DynamicLayer, StaticLayer

    class ShortDynamicLayer(DynamicLayer):  # type: ignore[misc]
        """A dynamic layer without some entries of the prompt."""

        gone = 0

        def get_seq_length(self) -> int:
            return super().get_seq_length() + self.gone

    class ShortStaticLayer(StaticLayer):  # type: ignore[misc]
        """A static layer without some entries of the prompt."""

        gone = 0

        def get_seq_length(self) -> Any:
            return super().get_seq_length() + self.gone

    return {DynamicLayer: ShortDynamicLayer, StaticLayer: ShortStaticLayer}


def substitute(run: Any, index: int, x: Tensor, kwargs: dict[str, Any]) -> None:
    """Gives a layer with a short cache the mask, and where needed the positions, of tokens after the prompt."""
    cache: Any = cache_in(kwargs)
    held = (layers_of(cache) or {}).get(index)
    if held is None:
        return
    batch, count = x.shape[:2]
    live = held.live
    if live is not None and live.shape[0] != batch:
        live = live.repeat_interleave(batch // live.shape[0], 0)
    layer = cache.layers[index]
    past = layer.get_seq_length() - getattr(layer, "gone", 0)
    static = hasattr(layer, "cumulative_length")
    if held.sees is not None:
        kwargs["attention_mask"] = _hidden_mask(run, held, past, count, x, layer if static else None)
    else:
        kwargs["attention_mask"] = _later_mask(run.base, live, held.length, past, count, x, layer if static else None,
                                               kwargs.get("attention_mask"))  # fmt: skip
    if held.compact:
        own = held.length if live is None else live.sum(dim=1, keepdim=True)
        places = (own + past - held.length + torch.arange(count, device=x.device)).expand(batch, -1)
        kwargs["position_embeddings"] = run.stack.rotary_emb(x, position_ids=places)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = places


def _later_mask(
    base: str, live: Tensor | None, length: int, past: Any, count: int, x: Tensor, static: Any, host: Any
) -> Any:
    """Mask of `count` new tokens over a cache with `length` entries of the prompt and `past` entries in all."""
    if static is None:
        if live is None and host is None and count == 1:
            return None
        total = int(past) + count
    else:
        total = static.get_max_length()
    if base.startswith("flash"):
        return _two_dimensional(live, length, total, x)
    columns = torch.arange(total, device=x.device)
    rows = past + torch.arange(count, device=x.device)
    sees = (columns <= rows.unsqueeze(1)).expand(x.shape[0], count, total).clone()
    if live is not None:
        sees[:, :, :length] &= live.unsqueeze(1)
    if static is None and isinstance(host, Tensor) and host.dim() == 4 and total > length:
        # What the host says of tokens after the prompt, padding between turns included.
        own = host[:, 0, :, length - total :]
        sees[:, :, length:] &= own if own.dtype == torch.bool else own == 0
    return _form(base, sees.unsqueeze(1), x)


def _hidden_mask(run: Any, held: _Held, past: Any, count: int, x: Tensor, static: Any) -> Tensor:
    if run.base not in ("sdpa", "eager"):
        raise IncompatibleError(f"entries cannot be hidden per head under {run.base!r} attention; use 'sdpa'.")
    own: Any = held.sees
    total = int(past) + count if static is None else static.get_max_length()
    columns, rows = torch.arange(total, device=x.device), past + torch.arange(count, device=x.device)
    own = own.repeat_interleave(x.shape[0] // own.shape[0], 0)
    own = own.repeat_interleave(run.stack.config.num_attention_heads // own.shape[1], 1)
    sees = (columns <= rows.unsqueeze(1)).expand(*own.shape[:2], count, total).clone()
    sees[..., : held.length] &= own.unsqueeze(2)
    return _form(run.base, sees, x)


def _two_dimensional(live: Tensor | None, length: int, total: int, x: Tensor) -> Tensor | None:
    if live is None:
        return None
    ones = live.new_ones(x.shape[0], total - length)
    return torch.cat((live, ones), dim=1)


def prefill_mask(base: str, tokens: Tokens, cache: Any, x: Tensor) -> Any:
    """Mask of a shortened sequence among itself."""
    batch, length = tokens.live.shape
    static: int | None = None
    if cache is not None and len(cache.layers) and hasattr(cache.layers[0], "cumulative_length"):
        static = cache.layers[0].get_max_length()
    if base.startswith("flash"):
        return tokens.live if tokens.padded else None
    if not tokens.padded and static is None:
        # Attention without a mask is causal.
        return None
    total = static or length
    columns, rows = torch.arange(total, device=x.device), torch.arange(length, device=x.device)
    sees = (columns <= rows.unsqueeze(1)).expand(batch, length, total).clone()
    sees[:, :, :length] &= tokens.live.unsqueeze(1)
    # Rows of padding see themselves: a row without any key is no number.
    sees |= columns == rows.unsqueeze(1)
    return _form(base, sees.unsqueeze(1), x)


def _form(base: str, sees: Tensor, x: Tensor) -> Tensor:
    if base == "sdpa":
        return sees
    return torch.zeros_like(sees, dtype=x.dtype).masked_fill(~sees, torch.finfo(x.dtype).min)
