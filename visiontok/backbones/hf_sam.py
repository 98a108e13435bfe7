"""SAM's image encoder in transformers: attention windows with relative positions, so only grids may shrink."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.core.backbone import Backbone, Block, Swap, class_paths, own_class
from visiontok.core.runtime import Stage, attach_state, carry_state, state_of
from visiontok.core.signals import Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError

__all__ = ["HFSam", "segment_anything_keys"]

_MODULE = "transformers.models.sam.modeling_sam"
_HAVE = frozenset({Signal.HIDDEN, Signal.GRID})
# Height and width of the whole map, for putting windows together again.
_MAP = "hf_sam.map"

_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^blocks\.", "layers."),
    (r"^(layers\.\d+)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^neck\.0\.", "neck.conv1."),
    (r"^neck\.1\.", "neck.layer_norm1."),
    (r"^neck\.2\.", "neck.conv2."),
    (r"^neck\.3\.", "neck.layer_norm2."),
)


def segment_anything_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the image encoder's part of a segment_anything state dict into one of transformers.

    Args:
        state: Of a whole SAM (`image_encoder.blocks.0…`; other parts are left out) or of its `ImageEncoderViT` alone.

    Returns:
        The encoder's tensors as `SamVisionModel` (`vision_encoder.layers.0…`) or `SamVisionEncoder` names them.
    """
    lead = "image_encoder."
    whole = any(name.startswith(lead) for name in state)
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        if whole and not name.startswith(lead):
            continue
        short = name.removeprefix(lead)
        for pattern, other in _NAMES:
            short = re.sub(pattern, other, short)
        named[f"vision_encoder.{short}" if whole else short] = value
    return named


# ---- windows


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) to (B * windows, h * w, C), zero-padded at the bottom and right to whole windows."""
    height, width = x.shape[1:3]
    down, across = -(-height // window[0]), -(-width // window[1])
    x = F.pad(x, (0, 0, 0, across * window[1] - width, 0, down * window[0] - height))
    x = x.unflatten(2, (across, window[1])).unflatten(1, (down, window[0])).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def join(windows: Tensor, window: tuple[int, int], count: tuple[int, int]) -> Tensor:
    """(B * windows, h * w, C) to (B, H, W, C) of `count` windows down and across."""
    x = windows.unflatten(0, (-1, *count)).unflatten(3, window).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _count(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // window[0]), -(-size[1] // window[1])


def _to_windows(x: Tensor, state: TokenState) -> Tensor:
    return partition(x, _grid(state))


def _to_map(windows: Tensor, state: TokenState, base: tuple[int, int]) -> Tensor:
    size = state.memo[_MAP]
    x = join(windows, _grid(state), _count(size, base))
    # Padding leaves with the windows' own size; in a smaller map it has been mixed into the clusters.
    return x[:, : size[0], : size[1]].contiguous() if state.grid == base else x


def _grid(state: TokenState) -> tuple[int, int]:
    if state.grid is None:
        raise IncompatibleError(
            "the tokens of a window form no grid any more; SAM takes grid-preserving reducers only."
        )
    return state.grid


# ---- patched modules


class PatchedModel:
    """The model itself, unchanged: it holds the handle."""


class PatchedLayer:
    """A layer whose windows may have been made smaller; its state is that of the windows, one row each."""

    _visiontok: Stage

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        stage: Stage = self._visiontok
        x, base = hidden_states, _base(stage)
        state = self._visiontok_enter(x, stage, base)
        if stage.opens:
            windows, after = stage.before(_to_windows(x, state), state, {})
            x = x if after is state else _to_map(windows, after, base)
            state = after
        if not stage.idle(state):
            raise IncompatibleError(
                f"layer {stage.layer}: this reduction needs attention over keys of different sizes, which SAM's "
                "attention with relative positions does not take."
            )
        whole = state.grid == base
        y = super().forward(x) if whole else self._visiontok_run(x, state)  # type: ignore[misc]
        return self._visiontok_leave(y, state, stage, base)

    def _visiontok_enter(self: Any, x: Tensor, stage: Stage, base: tuple[int, int]) -> TokenState:
        known = None if stage.layer == 0 else state_of(x)
        if known is None and stage.layer > 0 and not torch.compiler.is_compiling():
            known = stage.chain.recovered(x, stage.layer)
        window = base if known is None else _grid(known)
        down, across = _count((x.shape[1], x.shape[2]), window)
        # The check needs shapes only, so it gets a stand-in without channels instead of a copy.
        shape = x.new_empty(x.shape[0] * down * across, window[0] * window[1], 0)
        state = stage.enter(shape if known is None else attach_state(shape, known))
        return state.changed(memo={**state.memo, _MAP: (x.shape[1], x.shape[2])}) if stage.layer == 0 else state

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Tensor:
        window, size = _grid(state), (x.shape[1], x.shape[2])
        y = self.layer_norm1(x)
        if self.window_size > 0:
            y = partition(y, window).unflatten(1, window)
        y, _ = self.attn(hidden_states=y)
        if self.window_size > 0:
            y = join(y.flatten(1, 2), window, _count(size, window))
        x = x + y
        return x + self.mlp(self.layer_norm2(x))

    def _visiontok_leave(self: Any, x: Tensor, state: TokenState, stage: Stage, base: tuple[int, int]) -> Tensor:
        ends = bool(state.frames) and state.frames[-1].until == stage.layer + 1
        if not ends and "NEXT" not in stage.steps:
            carry_state(stage.leave(x.new_empty(state.batch, state.n, 0), state, {}), x)
        else:
            windows = stage.leave(_to_windows(x, state), state, {})
            left: Any = state_of(windows)
            moved = ends or len(left.trail) != len(state.trail)
            x = carry_state(windows, _to_map(windows, left, base) if moved else x)
        if not torch.compiler.is_compiling():
            # The stage noted the windows; the next layer gets the map.
            left = state_of(x)
            stage.chain.handed(x, None if left.layer == stage.depth else left)
        return x


class PatchedNeck:
    """The neck, the consumer of the map: sees it at full size."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        state = state_of(hidden_states)
        if state is not None and state.trail:
            base: Any = state.grid0
            windows, full = state.whole(_to_windows(hidden_states, state), "nearest")
            hidden_states = _to_map(windows, full.changed(grid=base), base)
        return super().forward(hidden_states)  # type: ignore[misc]


def _base(stage: Stage) -> tuple[int, int]:
    grid: Any = stage.grid
    return grid


class HFSam(Backbone):
    """SamVisionEncoder of transformers, alone or inside SamVisionModel or SamModel. Items are attention windows."""

    name = "hf_sam"
    library = "transformers"
    hosts = (f"{_MODULE}.SamVisionModel", f"{_MODULE}.SamVisionEncoder", f"{_MODULE}.SamModel")
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {Site.AROUND: _HAVE, Site.PRE: _HAVE}
    grid_only = True

    def blocks(self, model: Any) -> list[Block]:
        lead, encoder = _encoder(model)
        return [Block(f"{lead}layers.{i}", layer) for i, layer in enumerate(encoder.layers)]

    def prefix(self, model: Any) -> int:
        return 0

    def length(self, model: Any) -> int:
        height, width = self.grid(model)
        return height * width

    def grid(self, model: Any) -> tuple[int, int]:
        config = _encoder(model)[1].config
        side = config.window_size or config.image_size // config.patch_size
        return side, side

    def width(self, model: Any) -> int:
        return _encoder(model)[1].config.hidden_size

    def heads(self, model: Any) -> int:
        return _encoder(model)[1].config.num_attention_heads

    def input_size(self, model: Any) -> tuple[int, ...]:
        config = _encoder(model)[1].config
        return config.num_channels, config.image_size, config.image_size

    def check(self, model: Any, site: Site) -> None:
        side = self.grid(model)[0]
        for path, layer in self.blocks(model):
            own = own_class(layer).forward
            if f"{own.__module__}.{own.__qualname__}" != f"{_MODULE}.SamVisionLayer.forward":
                raise IncompatibleError(f"{path} is a {type(layer).__name__}; visiontok runs SamVisionLayer.")
            if layer.window_size not in (0, side):
                raise IncompatibleError(f"{path} has windows of {layer.window_size}, the others of {side}.")

    def swaps(self, model: Any) -> list[Swap]:
        lead, encoder = _encoder(model)
        layers = [Swap(path, layer, PatchedLayer) for path, layer in self.blocks(model)]
        return [Swap("", model, PatchedModel), *layers, Swap(f"{lead}neck", encoder.neck, PatchedNeck)]

    def example(self) -> tuple[nn.Module, Any]:
        return self.examples()["vision"]

    def examples(self) -> dict[str, tuple[nn.Module, Any]]:
        from transformers.models.sam import configuration_sam as configs
        from transformers.models.sam import modeling_sam as sam

        small: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_dim": 96}
        small |= {"image_size": 64, "patch_size": 8, "output_channels": 16, "global_attn_indexes": [2]}
        small |= {"initializer_range": 0.1}
        variants: dict[str, dict[str, Any]] = {
            "vision": {"window_size": 4},
            "padded": {"window_size": 5, "image_size": 72, "attn_implementation": "eager"},
            "no_windows": {"window_size": 0},
        }
        made: dict[str, tuple[nn.Module, Any]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for key, options in variants.items():
                config: Any = configs.SamVisionConfig(**{**small, **options})
                model: Any = sam.SamVisionModel(config)
                for name, parameter in model.named_parameters():
                    # They start at zero, where no mistake with positions would show.
                    if "pos" in name:
                        nn.init.normal_(parameter, std=0.2)
                made[key] = (model.eval(), torch.randn(2, 3, config.image_size, config.image_size))
        return made


def _encoder(model: Any) -> tuple[str, Any]:
    alone = f"{_MODULE}.SamVisionEncoder" in class_paths(model)
    return ("", model) if alone else ("vision_encoder.", model.vision_encoder)
