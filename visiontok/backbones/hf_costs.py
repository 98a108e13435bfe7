"""What the parts of transformers' multimodal models cost, counted on the meta device where the parts run there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from visiontok.backbones import hf_cache, hf_decoder
from visiontok.core import flops, patching
from visiontok.core.costs import Anatomy, LayerCost
from visiontok.errors import IncompatibleError

__all__ = ["anatomy", "decoder_costs", "qwen_tower_macs"]

# Two lengths determine the quadratic that a layer's compute is in the number of tokens.
_SHORT, _LONG = 2, 4


def anatomy(backbone: Any, model: nn.Module) -> Anatomy:
    """The parts of a model of a family of `hf_mllm`."""
    stack, form = hf_decoder.stack_of(model), backbone.layout(model).form
    host: Any = model
    config, head = stack.config, host.get_output_embeddings()
    projector = getattr(host.base_model, "multi_modal_projector", None)
    return Anatomy(
        encoder=qwen_tower_macs(host, _side(backbone, host)) if form == "thw" else _tower(host),
        projector=None if projector is None else _linear(projector),
        layers=decoder_costs(stack),
        head=_linear(head),
        width=config.hidden_size,
        inner=config.intermediate_size,
        dtype=next(stack.parameters()).dtype,
    )


def _linear(*modules: nn.Module) -> int:
    """MACs of one token in all linear layers of some modules."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]
    # Not the weights: quantized ones are packed.
    return sum(part.in_features * part.out_features for part in parts)


def decoder_costs(stack: Any) -> list[LayerCost]:
    """Per layer of a decoder, from two runs on the meta device; layers of one shape are run once.

    Args:
        stack: The module that holds the layers.

    Raises:
        IncompatibleError: It does not run there.
    """
    known: dict[Any, LayerCost] = {}
    costs = []
    for layer in stack.layers:
        kind = (type(layer), *((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        if kind not in known:
            known[kind] = _layer_cost(stack, layer)
        costs.append(known[kind])
    return costs


def _layer_cost(stack: Any, layer: nn.Module) -> LayerCost:
    single = copy.copy(stack)
    single._modules = {**stack._modules, "layers": nn.ModuleList([layer])}
    ghost: Any = flops.meta_copy(single)
    # Kernels that need a device do not run without one; the arithmetic is the same.
    ghost.config._attn_implementation = "eager"
    try:
        (one, _), (two, cached) = _run(ghost, _SHORT), _run(ghost, _LONG)
    except (RuntimeError, NotImplementedError) as error:
        raise IncompatibleError(f"the decoder {type(stack).__name__} cannot be counted: {error}") from error
    pair = (two - one * _LONG // _SHORT) // (_LONG**2 - _LONG * _SHORT)
    return LayerCost((one - pair * _SHORT**2) // _SHORT, pair, cached // _LONG)


def _run(stack: Any, length: int) -> tuple[int, int]:
    """MACs of the only layer of a decoder, and how many numbers it caches."""
    dtype = next(p.dtype for p in stack.parameters() if p.is_floating_point())
    kept: list[Any] = []
    hook = stack.register_forward_hook(lambda module, args, output: kept.append(hf_cache.cache_in(output)))
    try:
        given = {
            "inputs_embeds": torch.empty(1, length, stack.config.hidden_size, device="meta", dtype=dtype),
            # A mask that is ready: making one reads values.
            "attention_mask": torch.empty(1, 1, length, length, device="meta", dtype=dtype),
            "use_cache": True,
        }
        profile = flops.profile(stack, given, ("layers.0",))
    finally:
        hook.remove()
    held = [part for entry in kept[0].layers for part in (entry.keys, entry.values) if part is not None]
    return profile.blocks["layers.0"], sum(part.numel() for part in held)


def _tower(model: Any) -> int | None:
    """MACs of a tower that takes images of one size, or None."""
    tower = getattr(model.base_model, "vision_tower", None)
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if tower is None or not isinstance(height, int) or not isinstance(width, int):
        return None
    if patching.ATTRIBUTE in vars(tower):
        # Its own reduction reports it.
        return None
    ghost: Any = flops.meta_copy(tower)
    ghost.config._attn_implementation = "eager"
    return flops.profile(ghost, flops.meta_input(ghost, (3, height, width))).total


def _side(backbone: Any, model: Any) -> int:
    return (backbone.grid(model) or (1, 1))[0] * model.config.vision_config.spatial_merge_size


def qwen_tower_macs(model: Any, side: int) -> int:
    """MACs of Qwen's towers by the shapes of their modules; windows are cut by values, which the meta device lacks.

    Args:
        model: The model with the language modeling head.
        side: Patches along both sides of the image.
    """
    tower, config = model.base_model.visual, model.config.vision_config
    merge, patch, tokens = config.spatial_merge_size, config.patch_size, side * side
    blocks = list(tower.blocks)
    embed = next(part for part in tower.patch_embed.modules() if isinstance(part, (nn.Conv3d, nn.Linear)))
    count = tokens * (_linear(*blocks) + embed.weight.numel())
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    count += tokens // merge**2 * _linear(*mergers)
    window, whole = getattr(config, "window_size", None), getattr(config, "fullatt_block_indexes", None)
    for index, _ in enumerate(blocks):
        pairs = tokens**2
        if window and whole is not None and index not in whole:
            # Windows at the border hold what is left.
            edge = window // patch
            lengths = [min(edge, side - start) for start in range(0, side, edge)]
            pairs = sum((h * w) ** 2 for h in lengths for w in lengths)
        count += 2 * config.hidden_size * pairs
    return count
