"""timm models from golden parameters, and what their blocks saw while patched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from golden_case import Case
from torch import Tensor, nn

from visiontok.core.reduction import Reduction


def build(case: Case) -> nn.Module:
    """The ViT that `params` describes, with the weights of the file, in the dtype of the images."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    params = case.params
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    options = {name: params[name] for name in names}
    options["norm_layer"] = functools.partial(nn.LayerNorm, eps=params["norm_eps"])
    options["num_classes"] = params.get("num_classes", 0)
    if params.get("distilled"):
        model: nn.Module = VisionTransformerDistilled(**options)
    elif params.get("global_pool"):
        model = VisionTransformer(**options, global_pool="avg", fc_norm=True)
    else:
        model = VisionTransformer(**options, global_pool="token" if options["num_classes"] else "")
    model.to(case.need("x").dtype)
    model.load_state_dict(case.weights(), strict=True)
    return model.eval()


@dataclass
class Run:
    """One patched forward.

    Attributes:
        output: What the forward returned.
        hidden: Output of every block.
        metric: Head-averaged keys (or hidden states) at the layers that decided.
        group: (B, N0) slot of each original token after every block.
        size: (B, N) sizes after every block.
        maps: The map of each layer that decided.
    """

    output: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    metric: dict[int, Tensor] = field(default_factory=dict)
    group: list[Tensor] = field(default_factory=list)
    size: list[Tensor] = field(default_factory=list)
    maps: dict[int, Any] = field(default_factory=dict)


def watch(red: Reduction, forward: Callable[[Tensor], Tensor], x: Tensor, read: Callable[[Any, Any], Tensor]) -> Run:
    """Runs a patched model and notes what happened; `read` takes the reducer and its signals to the metric."""
    hidden: list[Tensor] = []
    metric: dict[int, Tensor] = {}
    cls = type(red.reducers[0])
    decide = cls.decide

    def spy(self: Any, signals: Any, state: Any, budget: int | None = None) -> Any:
        metric[state.layer] = read(self, signals)
        return decide(self, signals, state, budget)

    blocks = [block.module for block in red.backbone.blocks(red.model)]
    hooks = [block.register_forward_hook(lambda *call: hidden.append(call[-1].detach())) for block in blocks]
    try:
        with torch.no_grad(), mock.patch.object(cls, "decide", spy):
            run = Run(forward(x), hidden, metric)
    finally:
        for hook in hooks:
            hook.remove()
    noted = {step.layer: step for step in red.trace}
    assert len(noted) == len(red.trace), "a layer decided twice"
    batch, length = len(x), red.plan.length
    group = torch.arange(length).expand(batch, length)
    size = torch.ones(batch, length)
    for layer in range(len(hidden)):
        if layer in noted:
            step = noted[layer]
            run.maps[layer] = step.map
            group = step.origin
            size = torch.ones(batch, step.tokens) if step.size is None else step.size.squeeze(-1)
        run.group.append(group)
        run.size.append(size)
    return run


def check_layers(case: Case, run: Run) -> None:
    """Compares what every method saves per layer, and the token counts."""
    for layer, hidden in enumerate(run.hidden):
        case.check(f"layer{layer}.hidden", hidden)
        case.check(f"layer{layer}.size", run.size[layer], exact=True)
        case.check(f"layer{layer}.group", run.group[layer])
        if case.has(f"layer{layer}.metric"):
            case.check(f"layer{layer}.metric", run.metric[layer])
        else:
            assert layer not in run.maps, f"layer {layer} reduced, the golden did not"
    tokens = torch.tensor([hidden.shape[1] for hidden in run.hidden])
    case.check("tokens", tokens)
    assert tokens.tolist() == case.params["tokens_per_layer"]


def fields(case: Case, layer: int, *names: str) -> dict[str, Tensor]:
    """Golden tensors of a layer, for building absolute positions from them."""
    return {name: case.tensors[f"out.layer{layer}.{name}"].long() for name in names if case.has(f"layer{layer}.{name}")}
