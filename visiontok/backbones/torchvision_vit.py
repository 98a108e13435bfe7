"""torchvision's VisionTransformer, also with SWAG weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visiontok.backbones import mha
from visiontok.core.backbone import Backbone, Block, Swap, class_paths, own_class
from visiontok.core.blocks import Ran, Tap, bias_dtype, offers_ahead, run_block
from visiontok.core.joints import Joint
from visiontok.core.runtime import Stage, carry_state, state_of
from visiontok.core.signals import ATTENTION, Offers, Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError

__all__ = ["TorchvisionViT", "swag_keys"]

_MODULE = "torchvision.models.vision_transformer"
_FILLS: dict[Any, Any] = {None: None, "gather": "nearest", "zero": "zero"}
_HAVE = frozenset({Signal.HIDDEN, Signal.GRID}) | ATTENTION

# What SWAG's own model calls the parts that torchvision names otherwise.
_SWAG = (
    (r"^encoder\.layers\.layer_(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.3."),
    (r"^head\.layers\.", "heads."),
)


def swag_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns a state dict of SWAG's VisionTransformer into one of torchvision's.

    Args:
        state: Names `encoder.layers.layer_<i>`, `mlp.linear_1`, `head.layers`; positions (N, 1, C).

    Returns:
        The same tensors under torchvision's names; positions (1, N, C).
    """
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, other in _SWAG:
            name = re.sub(pattern, other, name)
        named[name] = value.transpose(0, 1) if name == "encoder.pos_embedding" and value.shape[1] == 1 else value
    return named


class PatchedBlock:
    """An encoder block with a reduction point between attention and MLP."""

    _visiontok: Stage

    def forward(self: Any, input: Tensor) -> Tensor:
        host = super().forward  # type: ignore[misc]
        return run_block(self._visiontok, input, lambda x, _: host(x), self._visiontok_ahead, self._visiontok_run)

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        attn, bias = self.self_attention, state.key_bias(torch.float32)
        return offers_ahead(lambda: mha.project(attn, self.ln_1(x)), attn.head_dim**-0.5, bias, state.prefix)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        bias = state.key_bias(bias_dtype(x, attends=True))
        tap = Tap()
        y = mha.attend(self.self_attention, self.ln_1(x), tap, bias)
        offered = tap.offers(self.self_attention.head_dim**-0.5, bias, state.prefix)
        joint = Joint(self.dropout, self.ln_2, plain=not self.training)
        x, normed, after = self._visiontok.between(x, y, joint, state, offered)
        x = x + self.mlp(normed)
        return x, after, offered


class PatchedNorm:
    """The final norm, which lets the token state pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return carry_state(x, super().forward(x))  # type: ignore[misc]


class PatchedModel:
    """The model itself, unchanged: it holds the handle."""


class PatchedEncoder:
    """The encoder, which ends what its consumer should not see."""

    def forward(self: Any, input: Tensor) -> Tensor:
        y = super().forward(input)  # type: ignore[misc]
        state = state_of(y)
        # The head reads the class token only, so nobody after this needs the state.
        return y if state is None else state.whole(y, _FILLS[self.layers[-1]._visiontok.chain.restore])[0]


class TorchvisionViT(Backbone):
    """torchvision VisionTransformer with its own EncoderBlock and MultiheadAttention."""

    name = "torchvision_vit"
    library = "torchvision"
    hosts = (f"{_MODULE}.VisionTransformer",)
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {Site.MID: _HAVE, Site.PRE: _HAVE, Site.AROUND: _HAVE}

    def blocks(self, model: Any) -> list[Block]:
        return [Block(f"encoder.layers.{name}", block) for name, block in model.encoder.layers.named_children()]

    def prefix(self, model: Any) -> int:
        return 1

    def length(self, model: Any) -> int:
        return model.seq_length

    def grid(self, model: Any) -> tuple[int, int] | None:
        side = model.image_size // model.patch_size
        return side, side

    def width(self, model: Any) -> int:
        return model.hidden_dim

    def heads(self, model: Any) -> int:
        return self.blocks(model)[0].module.self_attention.num_heads  # type: ignore[union-attr, return-value]

    def classes(self, model: Any) -> int:
        return model.num_classes

    def class_token(self, model: Any) -> Tensor | None:
        return model.class_token

    def input_size(self, model: Any) -> tuple[int, ...]:
        return 3, model.image_size, model.image_size

    def check(self, model: Any, site: Site) -> None:
        for path, block in self.blocks(model):
            if not _runs(block, f"{_MODULE}.EncoderBlock"):
                raise IncompatibleError(
                    f"{path} is a {type(block).__name__}; visiontok runs torchvision's EncoderBlock."
                )
            attn: Any = block.self_attention
            why = mha.obstacle(attn) or (None if attn.batch_first else "it takes tokens first (batch_first=False)")
            if why is not None:
                raise IncompatibleError(f"visiontok cannot read queries and keys from {path}.self_attention: {why}.")

    def swaps(self, model: Any) -> list[Swap]:
        encoder = model.encoder
        swaps = [Swap("", model, PatchedModel), Swap("encoder", encoder, PatchedEncoder)]
        if not isinstance(encoder.ln, nn.Identity):
            swaps.append(Swap("encoder.ln", encoder.ln, PatchedNorm))
        for path, block in self.blocks(model):
            attn: Any = block.self_attention
            name = f"{path}.self_attention"
            swaps += [Swap(path, block, PatchedBlock), Swap(name, mha.inner(attn), mha.PatchedAttention)]
        return swaps

    def example(self) -> tuple[nn.Module, Tensor]:
        return self.examples()["cls"]

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from torchvision.models.vision_transformer import VisionTransformer

        small: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 3, "hidden_dim": 48}
        small |= {"mlp_dim": 96, "num_classes": 10}
        made: dict[str, tuple[nn.Module, Tensor]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            image = torch.randn(2, 3, 32, 32)
            for key, options in {"cls": {}, "representation": {"representation_size": 24}}.items():
                model: Any = VisionTransformer(**small, **options)
                # torchvision starts the head at zero, where every model gives the same logits.
                nn.init.normal_(model.heads.head.weight, std=0.2)
                nn.init.normal_(model.class_token, std=0.2)
                made[key] = (model.eval(), image)
        return made


def _runs(module: nn.Module, path: str) -> bool:
    """Whether the module is of the class at `path`, or of a subclass with that class's forward."""
    own: Callable[..., Any] = own_class(module).forward
    return path in class_paths(module) and f"{own.__module__}.{own.__qualname__}" == f"{path}.forward"
