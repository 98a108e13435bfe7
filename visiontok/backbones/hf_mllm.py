"""Multimodal language models of transformers: LLaVA, LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen-VL and their kin."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import nn

from visiontok.backbones import hf_attention, hf_decoder, hf_hooks, hf_prompt
from visiontok.backbones.hf_outputs import signed
from visiontok.backbones.hf_pictures import PacksCrops
from visiontok.backbones.hf_watching import Layout
from visiontok.core.backbone import Backbone, Block, Swap, class_paths, own_class
from visiontok.core.multimodal import PROMPT, MultimodalBackbone, MultimodalReduction
from visiontok.core.reducer import Reducer
from visiontok.core.signals import Signal, Site
from visiontok.errors import IncompatibleError

__all__ = ["HFMultimodal"]

_ANY = frozenset({Signal.HIDDEN, Signal.GRID, Signal.FRAMES, Signal.CROPS, Signal.RAND})
_TOWER = frozenset({Signal.ATTN_PREFIX, Signal.KEY, Signal.QUERY_PREFIX})
_DECODER = frozenset(
    {Signal.HIDDEN, Signal.ATTN_LAST, Signal.ATTN_TEXT, Signal.TEXT, Signal.KEY, Signal.VALUE, Signal.GRID, Signal.RAND}
)
_CACHE = frozenset({Signal.KEY, Signal.VALUE, Signal.ATTN_SUM, Signal.RAND})

_CLIP = Layout("vision_tower", "encoder.layers", "multi_modal_projector", "rows")
_QWEN = Layout("visual", "blocks", None, "thw")
# Whatever else takes encoded inputs: flat lists of features.
_OTHER = Layout("", "", None, "list")
_LAYOUTS = {
    "llava.modeling_llava.Llava": _CLIP,
    "vipllava.modeling_vipllava.VipLlava": _OTHER,
    "llava_next.modeling_llava_next.LlavaNext": _CLIP._replace(form="crops"),
    "llava_onevision.modeling_llava_onevision.LlavaOnevision": _CLIP._replace(form="crops"),
    "internvl.modeling_internvl.InternVL": Layout("vision_tower", "encoder.layer", None, "shuffled"),
    "qwen2_vl.modeling_qwen2_vl.Qwen2VL": _QWEN,
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VL": _QWEN,
    "qwen3_vl.modeling_qwen3_vl.Qwen3VL": _QWEN,
}
_END = "ForConditionalGeneration"


class _Place(NamedTuple):
    layout: Layout
    tested: bool


@functools.cache
def _known() -> dict[str, Layout]:
    return {f"transformers.models.{stem}{_END}": layout for stem, layout in _LAYOUTS.items()}


class Generates:
    """The model with the language modeling head, whose prompt is shortened."""

    _visiontok: MultimodalReduction
    _visiontok_base: type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # transformers learns from the signature what a model takes.
        cls.forward = signed(cls._visiontok_base.forward, cls.forward)  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        host = super().forward  # type: ignore[misc]
        return hf_prompt.forward(self, host, _named(host, args, kwargs))

    def generate(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if inputs is not None:
            kwargs["input_ids"] = inputs
        host = super().generate  # type: ignore[misc]
        names = list(inspect.signature(host).parameters)[1:]
        return hf_prompt.generate(self, host, {**dict(zip(names, args)), **kwargs})


def _named(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(function).parameters, args)), **kwargs} if args else kwargs


class HFMultimodal(MultimodalBackbone):
    """LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, and any other model of
    transformers that generates from `mm_encoder_outputs` (features as a list, no attention of the tower)."""

    name = "hf_mllm"
    library = "transformers"
    hosts: ClassVar[tuple[str, ...]] = tuple(_known())
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {
        Site.POST: _ANY | _TOWER,
        Site.EMBED: _ANY | _TOWER | {Signal.TEXT},
        Site.LLM: _DECODER,
        Site.KV: _CACHE,
        Site.MID: frozenset(Signal),
        Site.PRE: frozenset(Signal),
        Site.AROUND: frozenset(Signal),
    }

    def matches(self, model: nn.Module) -> bool:
        return _matches(own_class(model))

    # ---- parts

    def layout(self, model: nn.Module) -> Layout:
        """How the model's features come about."""
        known = _known()
        return next((known[path] for path in class_paths(model) if path in known), _OTHER)

    def vision_tower(self, model: Any) -> Block:
        inner, layout = model.base_model, self.layout(model)
        if not layout.tower:
            return Block("vision encoder", model)
        prefix = f"{model.base_model_prefix}." if inner is not model else ""
        return Block(prefix + layout.tower, inner.get_submodule(layout.tower))

    def encoder(self, model: nn.Module) -> Backbone | None:
        from visiontok import backbones

        if self.layout(model).form not in ("rows", "crops"):
            return None
        return backbones.find(self.vision_tower(model).module)

    def decoder(self, model: nn.Module) -> list[Block]:
        stack: Any = hf_decoder.stack_of(model)
        path = next(name for name, module in model.named_modules() if module is stack)
        return [Block(f"{path}.layers.{i}", layer) for i, layer in enumerate(stack.layers)]

    def tower_depth(self, model: nn.Module) -> int:
        layout = self.layout(model)
        if not layout.layers:
            return 1
        return len(list(self.vision_tower(model).module.get_submodule(layout.layers).children()))

    def blocks(self, model: nn.Module) -> list[Block]:
        return self.decoder(model)

    def prefix(self, model: Any) -> int:
        if self.layout(model).form not in ("rows", "crops"):
            return 0
        return 1 if model.config.vision_feature_select_strategy == "default" else 0

    def length(self, model: Any) -> int:
        height, width = self.grid(model) or (1, 1)
        return height * width + self.prefix(model)

    def grid(self, model: Any) -> tuple[int, int] | None:
        return hf_prompt.nominal_grid(model, self.layout(model))

    # ---- what fits

    def signals(self, model: nn.Module, site: Site) -> frozenset[Signal]:
        layout = self.layout(model)
        if site not in (*PROMPT, Site.LLM, Site.KV):
            encoder = self.encoder(model)
            tower = self.vision_tower(model).module
            return frozenset() if encoder is None else encoder.signals(tower, site)
        have = self.provides[site]
        if site not in PROMPT:
            return have
        if layout.form == "shuffled":
            return have - {Signal.KEY, Signal.QUERY_PREFIX, Signal.CROPS}
        if layout.form == "list":
            return have - _TOWER - {Signal.CROPS, Signal.GRID}
        if layout.form == "thw":
            # Flash attention takes all images at once, so that none has a row of its own.
            config: Any = self.vision_tower(model).module.config
            gone = _TOWER if "flash" in (config._attn_implementation or "") else _TOWER - {Signal.ATTN_PREFIX}
            return have - gone - {Signal.CROPS}
        return have if self.prefix(model) else have - {Signal.QUERY_PREFIX}

    def check(self, model: Any, site: Site) -> None:
        if site in (Site.LLM, Site.KV):
            hf_decoder.check(model)
        elif site not in PROMPT:
            encoder, tower = self.encoder(model), self.vision_tower(model)
            if encoder is None or site not in encoder.provides:
                raise IncompatibleError(
                    f"the vision tower {tower.path} ({type(tower.module).__name__}) cannot be reduced at {site}; use a "
                    "reducer of site POST, EMBED, LLM or KV."
                )
            encoder.check(tower.module, site)

    def anatomy(self, model: nn.Module) -> Any:
        from visiontok.backbones import hf_costs

        return hf_costs.anatomy(self, model)

    def check_stop(self, model: Any, reducer: Reducer, layer: int) -> None:
        if reducer.site is Site.LLM:
            hf_decoder.check_layer(model, reducer, layer)

    # ---- patching

    def swaps(self, model: Any) -> list[Swap]:
        inner = model.base_model
        swaps = [Swap("", model, Generates)]
        if self.layout(model).form == "crops":
            swaps.append(Swap(model.base_model_prefix, inner, PacksCrops))
        return swaps

    def attach(self, model: nn.Module, reduction: MultimodalReduction) -> None:
        if reduction.watches_tower and self.layout(model).layers:
            hf_attention.set_implementation(hf_attention.configs_of(self.vision_tower(model).module), True)
        if reduction.acts_in_decoder:
            hf_hooks.attach(model)

    def detach(self, model: nn.Module) -> None:
        if self.layout(model).layers:
            hf_attention.set_implementation(hf_attention.configs_of(self.vision_tower(model).module), False)
        hf_hooks.detach(model)

    # ---- examples

    def input_size(self, model: Any) -> tuple[int, ...]:
        size = getattr(model.config.vision_config, "image_size", 448)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return (3, height, width)

    def example(self) -> tuple[nn.Module, Any]:
        return self.examples()["llava"]

    def examples(self) -> dict[str, tuple[nn.Module, Any]]:
        from visiontok.backbones.hf_mllm_examples import examples

        return examples()


@functools.cache
def _matches(cls: type) -> bool:
    if any(f"{base.__module__}.{base.__qualname__}" in _known() for base in cls.__mro__):
        return True
    # Only classes of transformers, or made from them, have both methods.
    if not cls.__name__.endswith(_END) or not hasattr(cls, "generate"):
        return False
    return "mm_encoder_outputs" in inspect.signature(cls.forward).parameters
