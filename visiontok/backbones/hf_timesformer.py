"""TimeSformer of transformers: attention over space and time jointly, divided, or over each frame alone.

Divided attention needs the same spatial map in all frames. Its tokens are therefore places: what the T frames show
there lies side by side, T * C channels and T * H heads wide, so one decision moves all frames alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visiontok.backbones.hf_outputs import Holder, PatchedModel
from visiontok.backbones.timm_blocks import PatchedNorm
from visiontok.core.backbone import Backbone, Block, Swap, class_paths, own_class
from visiontok.core.blocks import Ran, Tap, bias_dtype, offers_ahead, run_block
from visiontok.core.runtime import Stage, attach_state, carry_state, hint_grid, state_of
from visiontok.core.signals import ATTENTION, Offers, Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError, ParameterError

__all__ = ["HFTimesformer"]

_MODULE = "transformers.models.timesformer.modeling_timesformer"
_HAVE = frozenset({Signal.HIDDEN, Signal.GRID}) | ATTENTION


def fold(x: Tensor, frames: int) -> Tensor:
    """(B, 1 + P * T, C), frames innermost, to (B, 1 + P, T * C); the class token stands in every frame."""
    if (x.shape[1] - 1) % frames:
        raise ParameterError(
            f"the input has {x.shape[1] - 1} patches, no multiple of config.num_frames={frames}; give it that many "
            "frames, or set config.num_frames to those that it has."
        )
    places = x[:, 1:].reshape(x.shape[0], -1, frames * x.shape[2])
    return carry_state(x, torch.cat((x[:, :1].repeat(1, 1, frames), places), dim=1))


def unfold(x: Tensor, frames: int) -> Tensor:
    """The inverse of `fold`."""
    width = x.shape[2] // frames
    return carry_state(x, torch.cat((x[:, :1, :width], x[:, 1:].reshape(x.shape[0], -1, width)), dim=1))


# ---- patched modules


class PatchedEmbeddings:
    """The embeddings, which tell the first layer the grid of a frame."""

    def forward(self: Any, pixel_values: Tensor) -> Tensor:
        y = super().forward(pixel_values)  # type: ignore[misc]
        height, width = self.patch_embeddings.projection.kernel_size
        return hint_grid(y, (pixel_values.shape[-2] // height, pixel_values.shape[-1] // width))


class PatchedSelfAttention:
    """Attention that, when given a tap, leaves its q, k, v there and adds a bias over keys."""

    def forward(
        self: Any, hidden_states: Tensor, output_attentions: bool = False, tap: Tap | None = None, bias: Any = None
    ) -> Any:
        if tap is None:
            return super().forward(hidden_states, output_attentions)  # type: ignore[misc]
        tap.q, tap.k, tap.v = q, k, v = self._visiontok_qkv(hidden_states)
        logits = (q @ k.transpose(-2, -1)) * self.scale
        probs = self.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1))
        y = (probs @ v).transpose(1, 2).flatten(2)
        return (y, probs) if output_attentions else (y,)

    def _visiontok_qkv(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class PatchedAttention:
    """Attention with its output projection; hands a tap on."""

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False, **given: Any) -> Any:
        if not given:
            return super().forward(hidden_states, output_attentions)  # type: ignore[misc]
        y, *maps = self.attention(hidden_states, output_attentions, **given)
        return (self.output(y), *maps)


def _mlp(layer: Any, x: Tensor) -> Tensor:
    return x + layer.drop_path(layer.output(layer.intermediate(layer.layernorm_after(x))))


class PatchedLayer:
    """A layer with one attention: over the whole video, or over a frame where frames are rows of the batch."""

    _visiontok: Stage

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> Any:
        host, maps = super().forward, []  # type: ignore[misc, var-annotated]

        def untouched(x: Tensor, state: TokenState) -> Tensor:
            y, *seen = host(x, output_attentions)
            maps.extend(seen)
            return y

        def run(x: Tensor, state: TokenState) -> Ran:
            return self._visiontok_run(x, state, output_attentions, maps)

        return (run_block(self._visiontok, hidden_states, untouched, self._visiontok_ahead, run), *maps)

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        attn = self.attention.attention
        project = lambda: attn._visiontok_qkv(self.layernorm_before(x))  # noqa: E731
        return offers_ahead(project, attn.scale, state.key_bias(torch.float32), state.prefix)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState, output_attentions: bool, maps: list[Tensor]) -> Ran:
        tap, bias = Tap(), state.key_bias(bias_dtype(x, fused=False))
        y, *seen = self.attention(self.layernorm_before(x), output_attentions, tap=tap, bias=bias)
        maps.extend(seen)
        offered = tap.offers(self.attention.attention.scale, bias, state.prefix)
        x, after = self._visiontok.mid(x + self.drop_path(y), state, offered)
        return _mlp(self, x), after, offered


class PatchedDividedLayer:
    """A layer that attends over the frames of each place, then over the places of each frame."""

    _visiontok: Stage

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> Any:
        stage, frames, maps = self._visiontok, self.config.num_frames, []
        host = super().forward  # type: ignore[misc]
        x = fold(hidden_states, frames)
        if stage.layer > 0 and state_of(x) is None and not torch.compiler.is_compiling():
            lost = stage.chain.recovered(hidden_states, stage.layer)
            x = x if lost is None else attach_state(x, lost)

        def run(x: Tensor, state: TokenState) -> Ran:
            return self._visiontok_run(x, state, output_attentions, maps)

        def untouched(x: Tensor, state: TokenState) -> Tensor:
            if state.trail:
                # The host counts on the full grid of every frame.
                return run(x, state)[0]
            y, *seen = host(unfold(x, frames), output_attentions)
            maps.extend(seen)
            return fold(y, frames)

        y = unfold(run_block(stage, x, untouched, self._visiontok_ahead, run), frames)
        if not torch.compiler.is_compiling():
            # The stage noted the folded tokens; the next layer gets these.
            state: Any = state_of(y)
            stage.chain.handed(y, None if state.layer == stage.depth else state)
        return (y, *maps)

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        attn = self.attention.attention

        def project() -> tuple[Tensor, Tensor, Tensor]:
            _, tokens = self._visiontok_space(x)
            q, k, v = map(self._visiontok_heads, attn._visiontok_qkv(self.layernorm_before(tokens)))
            return q, k, v

        return offers_ahead(project, attn.scale, state.key_bias(torch.float32), state.prefix)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState, output_attentions: bool, maps: list[Tensor]) -> Ran:
        batch, frames, tap = x.shape[0], self.config.num_frames, Tap()
        places, tokens = self._visiontok_space(x)
        bias = state.key_bias(bias_dtype(x, fused=False))
        each = None if bias is None else bias.repeat_interleave(frames, dim=0)
        y, *seen = self.attention(self.layernorm_before(tokens), output_attentions, tap=tap, bias=each)
        maps.extend(seen)
        tap.q, tap.k, tap.v = map(self._visiontok_heads, (tap.q, tap.k, tap.v))
        offered = tap.offers(self.attention.attention.scale, bias, state.prefix)
        y = self.drop_path(y).unflatten(0, (batch, frames)).transpose(1, 2)
        lead = x[:, :1] + y[:, :1].mean(dim=2).repeat(1, 1, frames)
        x = torch.cat((lead, (places + y[:, 1:]).flatten(2)), dim=1)
        x, after = self._visiontok.mid(x, state, offered)
        return fold(_mlp(self, unfold(x, frames)), frames), after, offered

    def _visiontok_space(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, T, C) places after attention over time, and (B * T, 1 + P, C) the tokens of each frame."""
        batch, frames = x.shape[0], self.config.num_frames
        lead, places = x.unflatten(2, (frames, -1)).split((1, x.shape[1] - 1), dim=1)
        y = self.temporal_attention(self.temporal_layernorm(places.flatten(0, 1)))[0]
        places = places + self.temporal_dense(self.drop_path(y).unflatten(0, (batch, -1)))
        return places, torch.cat((lead, places), dim=1).transpose(1, 2).flatten(0, 1)

    def _visiontok_heads(self: Any, x: Tensor) -> Tensor:
        """(B * T, H, N, d) to (B, T * H, N, d): frames count as heads."""
        return x.unflatten(0, (-1, self.config.num_frames)).flatten(1, 2)


class PatchedDividedModel(PatchedModel):
    """The model, whose output is presented with the frames of a place side by side."""

    def _visiontok_present(self: Any, outputs: Any) -> None:
        frames = self.config.num_frames
        _each(outputs, lambda x: fold(x, frames))
        super()._visiontok_present(outputs)
        _each(outputs, lambda x: unfold(x, frames))


def _each(outputs: Any, change: Callable[[Tensor], Tensor]) -> None:
    outputs["last_hidden_state"] = change(outputs["last_hidden_state"])
    if outputs.get("hidden_states") is not None:
        outputs["hidden_states"] = tuple(map(change, outputs["hidden_states"]))


class HFTimesformer(Backbone):
    """TimesformerModel of transformers, alone or with a classifier.

    `joint_space_time`: tokens are the space-time patches; they form no grid of the core's, which is flat.
    `divided_space_time`: tokens are the places of a frame, each with its T frames; counts are per frame. Signals have
    T * C channels and T * H heads. `space_only`: every frame is a row of the batch and is reduced on its own.
    """

    name = "hf_timesformer"
    library = "transformers"
    hosts = (f"{_MODULE}.TimesformerModel", f"{_MODULE}.TimesformerForVideoClassification")
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {Site.MID: _HAVE, Site.PRE: _HAVE, Site.AROUND: _HAVE}

    def blocks(self, model: Any) -> list[Block]:
        lead, inner = _inner(model)
        return [Block(f"{lead}encoder.layer.{i}", layer) for i, layer in enumerate(inner.encoder.layer)]

    def prefix(self, model: Any) -> int:
        return 1

    def length(self, model: Any) -> int:
        frames = model.config.num_frames if _kind(model) == "joint_space_time" else 1
        return 1 + frames * _inner(model)[1].embeddings.num_patches

    def grid(self, model: Any) -> tuple[int, int] | None:
        if _kind(model) == "joint_space_time":
            return None
        side = model.config.image_size // model.config.patch_size
        return side, side

    def signals(self, model: Any, site: Site) -> frozenset[Signal]:
        return self.provides[site] - ({Signal.GRID} if self.grid(model) is None else set())

    def width(self, model: Any) -> int:
        return model.config.hidden_size * _side_by_side(model)

    def heads(self, model: Any) -> int:
        return model.config.num_attention_heads * _side_by_side(model)

    def class_token(self, model: Any) -> Tensor | None:
        return _inner(model)[1].embeddings.cls_token.repeat(1, 1, _side_by_side(model))

    def input_size(self, model: Any) -> tuple[int, ...]:
        config = model.config
        return config.num_frames, config.num_channels, config.image_size, config.image_size

    def check(self, model: Any, site: Site) -> None:
        for path, layer in self.blocks(model):
            attn: Any = layer.attention
            parts = (("", layer, "TimesformerLayer"), (".attention", attn, "TimeSformerAttention"))
            for where, part, name in (*parts, (".attention.attention", attn.attention, "TimesformerSelfAttention")):
                own: Any = own_class(part).forward
                # A subclass with a forward of its own may do anything there; running ours instead would be wrong.
                if f"{own.__module__}.{own.__qualname__}" != f"{_MODULE}.{name}.forward":
                    raise IncompatibleError(
                        f"{path}{where} is a {type(part).__name__} with a forward of its own; visiontok runs {name}."
                    )
            if layer.attention_type != _kind(model):
                raise IncompatibleError(f"{path} has {layer.attention_type} attention, the config {_kind(model)}.")

    def swaps(self, model: Any) -> list[Swap]:
        lead, inner = _inner(model)
        swaps = [Swap("", model, Holder)] if lead else []
        divided = _kind(model) == "divided_space_time"
        swaps.append(Swap(lead[:-1], inner, PatchedDividedModel if divided else PatchedModel))
        swaps.append(Swap(f"{lead}layernorm", inner.layernorm, PatchedNorm))
        if _kind(model) != "joint_space_time":
            swaps.append(Swap(f"{lead}embeddings", inner.embeddings, PatchedEmbeddings))
        kind = PatchedDividedLayer if divided else PatchedLayer
        for path, layer in self.blocks(model):
            attn: Any = layer.attention
            swaps += [Swap(path, layer, kind), Swap(f"{path}.attention", attn, PatchedAttention)]
            swaps.append(Swap(f"{path}.attention.attention", attn.attention, PatchedSelfAttention))
        return swaps

    def example(self) -> tuple[nn.Module, Tensor]:
        return self.examples()["divided"]

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from transformers.models.timesformer import configuration_timesformer as configs
        from transformers.models.timesformer import modeling_timesformer as timesformer

        small: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3}
        small |= {"intermediate_size": 96, "image_size": 32, "patch_size": 8, "num_labels": 10}
        small |= {"initializer_range": 0.1, "num_frames": 2}
        made: dict[str, tuple[nn.Module, Tensor]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            video = torch.randn(2, 2, 3, 32, 32)
            for key in ("divided", "joint"):
                config = configs.TimesformerConfig(**small, attention_type=f"{key}_space_time")
                model: Any = timesformer.TimesformerForVideoClassification(config)
                # It starts at zero, where no mistake with frames would show.
                nn.init.normal_(model.timesformer.embeddings.time_embeddings, std=0.2)
                made[key] = (model.eval(), video)
        return made


def _inner(model: Any) -> tuple[str, Any]:
    alone = f"{_MODULE}.TimesformerModel" in class_paths(model)
    return ("", model) if alone else ("timesformer.", model.timesformer)


def _kind(model: Any) -> str:
    return model.config.attention_type


def _side_by_side(model: Any) -> int:
    return model.config.num_frames if _kind(model) == "divided_space_time" else 1
