"""Encodes the images and videos of a prompt with transformers' own towers, and tells the core what came out."""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visiontok.backbones import hf_attention
from visiontok.backbones.hf_watching import Layout, Watch
from visiontok.core.backbone import own_class
from visiontok.core.chain import Chain
from visiontok.core.pictures import Picture, Row, Tower, Vision, arrange, assemble, plain_picture
from visiontok.core.state import TokenState
from visiontok.core.visual import Crops, Text
from visiontok.errors import IncompatibleError
from visiontok.ops.anyres import valid_area
from visiontok.ops.constants import wide_dtype

__all__ = ["MODALITIES", "Encoded", "PacksCrops", "encode", "pixels_in"]

MODALITIES = ("image", "video")
_PIXELS = {
    "image": ("pixel_values", "pixel_values_images", "image_patches"),
    "video": ("pixel_values_videos",),
}


class Encoded(NamedTuple):
    """The features of one kind of input.

    Attributes:
        output: What the model's `get_…_features` returned.
        vision: The pictures.
    """

    output: Any
    vision: Vision


def pixels_in(given: Mapping[str, Any], modality: str) -> bool:
    """Whether a call brings images, or videos."""
    return any(given.get(name) is not None for name in _PIXELS[modality])


class _Notes(threading.local):
    def __init__(self) -> None:
        self.packed: list[tuple[Tensor, Any]] | None = None


_notes = _Notes()


class PacksCrops:
    """An inner model whose packing of crops is noted while `encode` runs."""

    def pack_image_features(self: Any, image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's, which learns of crops that the tower shortened."""
        host = super().pack_image_features  # type: ignore[misc]
        if _notes.packed is None:
            return host(image_features, image_sizes, *args, **kwargs)
        if not _shortened(self, image_features[0]):
            packed, lengths = host(image_features, image_sizes, *args, **kwargs)
        else:
            # The host can only pack full grids.
            packed = [features.flatten(0, 1) for features in image_features]
            lengths = torch.tensor([len(features) for features in packed])
        _notes.packed = list(zip(image_features, image_sizes))
        return packed, lengths


def _shortened(model: Any, features: Tensor) -> bool:
    vision = model.config.vision_config
    return features.shape[1] != (vision.image_size // vision.patch_size) ** 2


def encode(
    model: Any, layout: Layout, given: Mapping[str, Any], taps: Sequence[int], needs: frozenset[str], chain: Chain
) -> dict[str, Encoded]:
    """Encodes what a call brings.

    Args:
        model: The model with the language modeling head.
        layout: Its family's.
        given: The call's keyword arguments.
        taps: Layers of the tower whose attention is wanted.
        needs: Signals wanted of them.
        chain: Notes of the tower's blocks, if it is patched.

    Returns:
        By modality.
    """
    return {
        modality: _encode(model, layout, given, modality, taps, needs, chain)
        for modality in MODALITIES
        if pixels_in(given, modality)
    }


def _encode(
    model: Any,
    layout: Layout,
    given: Mapping[str, Any],
    modality: str,
    taps: Sequence[int],
    needs: frozenset[str],
    chain: Chain,
) -> Encoded:
    inner = model.base_model
    function = getattr(inner, f"get_{modality}_features")
    names = inspect.signature(function).parameters
    kwargs = {name: given[name] for name in names if name != "kwargs" and given.get(name) is not None}
    tower = inner.get_submodule(layout.tower) if layout.tower else None
    watch = Watch(tower, layout, taps, needs) if tower is not None and taps else None
    _notes.packed = [] if layout.form == "crops" and modality == "image" else None
    try:
        with hf_attention.watching(watch.see if watch else None), chain.collecting() as states:
            output = function(**kwargs, return_dict=True)
        packed = _notes.packed
    finally:
        _notes.packed = None
    hidden, prefix = _selected(inner, layout, output, kwargs)
    state = _state_at(inner, kwargs, states) if hidden is not None else None
    offers = watch.offers(state) if watch else {}
    project = inner.get_submodule(layout.projector) if layout.projector else None
    if layout.form == "crops" and modality == "image":
        pictures = _cut_pictures(inner, output, packed or [], _places(state, prefix))
        pictures = [_with_scores(inner, picture, packed or [], i, offers, kwargs) for i, picture in enumerate(pictures)]
    else:
        pictures, offers = _plain_pictures(inner, layout, output, kwargs, modality, hidden is not None, offers)
        hidden = hidden if layout.form in ("rows", "crops") and modality == "image" else None
        if hidden is not None:
            pictures = _merged_pictures(pictures, state, prefix)
    depth = len(tower.get_submodule(layout.layers)) if tower is not None and layout.layers else 1
    seen = Tower(hidden, prefix if hidden is not None else 0, depth, offers, project)
    return Encoded(output, Vision(tuple(pictures), seen, lambda: text_of(model, given)))


def _selected(inner: Any, layout: Layout, output: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, int]:
    """The tower's features before the projector, class token included, and how many class tokens they have."""
    if layout.projector is None or getattr(output, "hidden_states", None) is None:
        return None, 0
    layer = kwargs.get("vision_feature_layer", inner.config.vision_feature_layer)
    strategy = kwargs.get("vision_feature_select_strategy", inner.config.vision_feature_select_strategy)
    prefix = 1 if strategy == "default" else 0
    if isinstance(layer, int):
        return output.hidden_states[layer], prefix
    return torch.cat([output.hidden_states[index] for index in layer], dim=-1), prefix


def _cut_pictures(
    inner: Any, output: Any, packed: Sequence[tuple[Tensor, Any]], places: Sequence[Tensor] | None
) -> list[Picture]:
    newline = getattr(inner, "image_newline", None)
    pictures, first = [], 0
    side = inner.config.vision_config.image_size // inner.config.vision_config.patch_size
    for features, (projected, size) in zip(output.pooler_output, packed):
        count = projected.shape[0]
        own = None if places is None else places[first : first + count]
        if count == 1:
            pictures.append(_uncut_picture(features, projected[0], first, (side, side), own, newline))
        else:
            pictures.append(_cut_picture(inner, features, projected, first, (side, side), size, own, newline))
        first += count
    return pictures


def _uncut_picture(
    features: Tensor, projected: Tensor, first: int, side: tuple[int, int], places: Any, newline: Tensor | None
) -> Picture:
    if places is None:
        row = Row(len(projected), torch.arange(len(projected), device=features.device), first, None, side)
        return Picture(features, (row,), newline=newline)
    count, length = len(places[0]), side[0] * side[1]
    every = torch.arange(count, device=features.device)
    tail = [] if newline is None else [newline.to(projected)[None]]
    at = places[0] if newline is None else torch.cat((places[0], places[0].new_tensor([length])))
    row = Row(count, every, first, every)
    return Picture(torch.cat((projected[:count], *tail)), (row,), places=at, full=length + len(tail))


def _cut_picture(
    inner: Any,
    features: Tensor,
    projected: Tensor,
    first: int,
    side: tuple[int, int],
    size: Any,
    places: Sequence[Tensor] | None,
    newline: Tensor | None,
) -> Picture:
    host = sys.modules[own_class(inner).__module__]
    config = inner.config
    rows, columns = host.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    height, width = (int(v) for v in size)
    crops = Crops(rows, columns, side, (height, width), newline is not None)
    if places is not None:
        return arrange([p[: len(at)] for p, at in zip(projected, places)], places, first, crops, newline)
    picture = assemble(projected, first, crops, newline)
    if len(picture.features) == len(features):
        return replace(picture, features=features)
    return _scaled_picture(features, projected.shape[1], crops, first)


def _scaled_picture(features: Tensor, thumbnail: int, crops: Crops, first: int) -> Picture:
    # The host scaled the canvas of a large image down: its tokens are no crop's.
    top, bottom, left, right = valid_area(crops.image_size, (crops.rows * crops.side[0], crops.columns * crops.side[1]))
    place = torch.arange(len(features), device=features.device)
    rest, line = len(features) - thumbnail, 1 if crops.newline else 0
    # Rows and columns shrink by one ratio; their numbers are those that fit.
    wide = (right - left) / (bottom - top)
    height = min(range(1, rest + 1), key=lambda h: (rest % h != 0, abs((rest // h - line) / h - wide)))
    canvas = place[thumbnail:].view(height, -1)[:, : rest // height - line]
    rows = (
        Row(thumbnail, place[:thumbnail], first, None, crops.side),
        Row(canvas.numel(), canvas.flatten(), None, None, (canvas.shape[0], canvas.shape[1])),
    )
    return Picture(features, rows)


def _with_scores(
    inner: Any,
    picture: Picture,
    packed: Sequence[tuple[Tensor, Any]],
    index: int,
    offers: Mapping[str, Callable[[], Tensor]],
    kwargs: Mapping[str, Any],
) -> Picture:
    """The picture with attention scores of a canvas that the host scaled down: scaled down alike."""
    if picture.rows[-1].crop is not None or "ATTN_PREFIX" not in offers:
        return picture
    first = sum(len(features) for features, _ in packed[:index])
    (features, size), aspect = packed[index], kwargs.get("vision_aspect_ratio", inner.config.vision_aspect_ratio)

    def scores() -> Tensor:
        rows = offers["ATTN_PREFIX"]()[first : first + len(features)]
        maps = rows[..., 0, rows.shape[-1] - features.shape[1] :].flatten(1, 2).mT
        canvas = inner.pack_image_features([maps], [size], image_newline=None, vision_aspect_ratio=aspect)[0][0]
        return canvas[features.shape[1] :].mT.unflatten(0, rows.shape[1:3]).unsqueeze(2)

    *rows, last = picture.rows
    return replace(picture, rows=(*rows, last._replace(scores=scores)))


def _video_scores(inner: Any, rows: Tensor, videos: int) -> Tensor:
    """(frames, L, H, 1, P + N) to (videos, L, H, 1, n), pooled like the features."""
    side = inner.config.vision_config.image_size // inner.config.vision_config.patch_size
    maps = rows[..., 0, rows.shape[-1] - side * side :].flatten(1, 2).mT
    pooled = inner.apply_pooling(maps).unflatten(0, (videos, -1)).flatten(1, 2)
    return pooled.mT.unflatten(1, rows.shape[1:3]).unsqueeze(3)


def _plain_pictures(
    inner: Any,
    layout: Layout,
    output: Any,
    kwargs: Mapping[str, Any],
    modality: str,
    rows_of_tower: bool,
    offers: dict[str, Callable[[], Tensor]],
) -> tuple[list[Picture], dict[str, Callable[[], Tensor]]]:
    extras = getattr(output, "deepstack_features", None) or ()
    lists = list(output.pooler_output)
    pictures = []
    for index, features in enumerate(lists):
        own = tuple(extra[index] for extra in extras)
        fields: dict[str, Any] = {"extras": own}
        if layout.form in ("rows", "shuffled", "crops") and modality == "image":
            fields["crop"] = index
        frames, grid, tail = _shape(inner, layout, kwargs, modality, index, features.shape[0])
        if tail:
            tokens = features.shape[0] - tail
            row = Row(tokens, torch.arange(tokens, device=features.device), None, None, grid, frames)
            if "ATTN_PREFIX" in offers:
                read = offers["ATTN_PREFIX"]
                row = row._replace(scores=lambda read=read, i=index: _video_scores(inner, read(), len(lists))[i])
            pictures.append(Picture(features, (row,), extras=own))
        else:
            pictures.append(plain_picture(features, grid, frames=frames, **fields))
    if layout.form == "shuffled" and offers:
        offers = {"ATTN_PREFIX": lambda read=offers["ATTN_PREFIX"]: _shuffled(inner, read())}
    elif layout.form == "thw" and offers:
        every = torch.arange(max(len(features) for features in lists), device=lists[0].device)
        pictures = [
            replace(p, rows=(p.rows[0]._replace(crop=i, cells=every[: p.rows[0].tokens]),))
            for i, p in enumerate(pictures)
        ]
        lengths, grids = [len(features) for features in lists], kwargs[f"{modality}_grid_thw"]
        offers = {"ATTN_PREFIX": lambda read=offers["ATTN_PREFIX"]: _merged_rows(inner.visual, read(), grids, lengths)}
    elif layout.form not in ("rows", "shuffled"):
        offers = {}
    return pictures, offers


def _merged_rows(visual: Any, rows: Tensor, grids: Tensor, lengths: Sequence[int]) -> Tensor:
    """(1, L, H, patches) of all images to (S, L, H, 1, n), the mean over the patches that become one token."""
    rows = rows[0].unflatten(-1, (-1, visual.spatial_merge_size**2)).mean(dim=-1)
    if hasattr(visual, "window_size"):
        host = sys.modules[type(visual).__module__]
        sizes = {"window_size": visual.window_size, "patch_size": visual.patch_size}
        order, _ = host.get_vision_window_index(grids, spatial_merge_size=visual.spatial_merge_size, **sizes)
        rows = rows[..., order.to(rows.device).argsort()]
    longest = max(lengths)
    parts = [nn.functional.pad(part, (0, longest - part.shape[-1])) for part in rows.split(list(lengths), dim=-1)]
    return torch.stack(parts).unsqueeze(3)


def _state_at(inner: Any, kwargs: Mapping[str, Any], states: Sequence[TokenState]) -> TokenState | None:
    """What the tower did with the tokens of the features that are read."""
    layer = kwargs.get("vision_feature_layer", inner.config.vision_feature_layer)
    if not states or not any(state.trail for state in states):
        return None
    if not isinstance(layer, int):
        raise IncompatibleError(f"features of several layers {layer} cannot be read where the tower merges tokens.")
    # Hidden state 0 is the input of layer 0.
    block = layer - 1 if layer >= 0 else len(states) + layer
    # Inside a span the features are those of its tokens.
    return states[block]


def _merged_pictures(pictures: list[Picture], state: TokenState | None, prefix: int) -> list[Picture]:
    """The pictures with the placeholders that their tokens stand for, if the tower merged any."""
    places = _places(state, prefix)
    if state is None or places is None:
        return pictures
    return [_merged_picture(p, i, at, state.n0 - prefix) for i, (p, at) in enumerate(zip(pictures, places))]


def _places(state: TokenState | None, prefix: int) -> list[Tensor] | None:
    """Per row of the tower, the cell that each of its tokens stands for: its first; None if nothing was merged."""
    if state is None or not state.trail:
        return None
    origin = state.origin.long()[:, prefix:]
    spare = torch.where(origin < prefix, state.n, origin)
    place = torch.arange(origin.shape[1], device=origin.device).expand(origin.shape)
    first = place.new_zeros(len(origin), state.n + 1).scatter_reduce(1, spare, place, "amin", include_self=False)
    counts = [state.n] * len(origin)
    if state.padded and state.size is not None:
        counts = (state.size[:, :, 0] > 0).sum(dim=1).tolist()
    return [first[i, prefix:n] for i, n in enumerate(counts)]


def _merged_picture(picture: Picture, crop: int, places: Tensor, full: int) -> Picture:
    count = len(places)
    row = Row(count, None, crop, torch.arange(count, device=places.device))
    return replace(picture, features=picture.features[:count], rows=(row,), places=places, full=full)


def _shape(
    inner: Any, layout: Layout, kwargs: Mapping[str, Any], modality: str, index: int, tokens: int
) -> tuple[int, tuple[int, int] | None, int]:
    """Frames, grid of one frame (of all tokens for an image), and trailing tokens outside."""
    if layout.form == "thw":
        merge = inner.config.vision_config.spatial_merge_size
        frames, height, width = (int(v) for v in kwargs[f"{modality}_grid_thw"][index])
        grid = (height // merge, width // merge)
        return frames, (frames * grid[0], grid[1]), 0
    if modality == "video" and layout.form == "crops":
        frames = kwargs["pixel_values_videos"].shape[1]
        each = (tokens - 1) // frames
        side = math.isqrt(each)
        return frames, (frames * side, side) if side * side == each else None, 1
    side = math.isqrt(tokens)
    return 1, (side, side) if side * side == tokens and layout.form != "list" else None, 0


def _shuffled(inner: Any, rows: Tensor) -> Tensor:
    """(S, L, H, 1, P + N) to (S, L, H, 1, n): the mean over the tokens that become one."""
    tokens = rows[..., rows.shape[-1] - math.isqrt(rows.shape[-1]) ** 2 :]
    side = math.isqrt(tokens.shape[-1])
    ids = torch.arange(side * side, device=rows.device, dtype=torch.float64).view(1, side, side, 1)
    blocks = inner.pixel_shuffle(ids, scale_factor=inner.config.downsample_ratio).flatten(1, 2)[0].long()
    return tokens[..., blocks].mean(dim=-1)


def text_of(model: Any, given: Mapping[str, Any]) -> Text:
    """The embeddings of a prompt's text tokens."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    live = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    for modality in MODALITIES:
        token = getattr(model.config, f"{modality}_token_id", None)
        if token is not None:
            live = live & (ids != token)
    count = int(live.sum(dim=1).amax())
    order = (~live).to(torch.int64).argsort(dim=1, stable=True)[:, :count]
    live = live.gather(1, order)
    tokens = model.get_input_embeddings()(ids.gather(1, order))
    tokens = tokens.to(wide_dtype(tokens.dtype)).masked_fill(~live.unsqueeze(2), 0)
    return Text(tokens, live)
