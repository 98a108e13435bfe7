"""torchvision's VisionTransformer: exactness, signals, restored features, refusals, SWAG names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vision_transformer as tv

import visiontok as vt
from visiontok import backbones
from visiontok.backbones.torchvision_vit import TorchvisionViT, swag_keys
from visiontok.core.reducer import Reducer
from visiontok.core.signals import Signal
from visiontok.errors import IncompatibleError


@dataclass(frozen=True)
class Listens(Reducer):
    """Asks for everything and then leaves every token alone: what runs is our attention, on the host's tokens."""

    needs = (Signal.KEY, Signal.QUERY, Signal.VALUE, Signal.ATTN_PREFIX, Signal.ATTN, Signal.GRID)

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> None:
        q, k = signals.QUERY, signals.KEY
        expected = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        torch.testing.assert_close(signals.ATTN, expected)
        torch.testing.assert_close(signals.ATTN_PREFIX, expected[:, :, :1])
        assert signals.GRID == (4, 4)


@pytest.fixture
def model() -> Any:
    return backbones.registry.get("torchvision_vit")().examples()["cls"][0].double()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_zero_reduction_and_unpatching_are_bit_equal(model: Any, image: Tensor) -> None:
    with torch.no_grad():
        before = model(image)
        names = list(model.state_dict())
        for name in ("tome", "expedite"):
            red = vt.patch(model, name, r=0)
            assert torch.equal(model(image), before)
            assert list(model.state_dict()) == names
            red.unpatch()
            assert torch.equal(model(image), before)
    assert type(model) is tv.VisionTransformer
    assert not any("_visiontok" in vars(module) for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_our_attention_equals_the_hosts_and_its_signals_are_right(model: Any, image: Tensor, training: bool) -> None:
    model.train(training)
    before = model(image)
    with vt.patched(model, Listens(r=1)):
        after = model(image)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_merged_tokens_weigh_as_much_as_their_members(model: Any, image: Tensor) -> None:
    # All patches alike: any merge, seen with its size, must leave the class token as it was.
    with torch.no_grad():
        model.encoder.pos_embedding[:, 1:] = 0.3
        flat = torch.ones_like(image)
        before = model(flat)
        with vt.patched(model, "tome", r=4) as red:
            torch.testing.assert_close(model(flat), before, rtol=1e-11, atol=1e-11)
            assert red.tokens == red.plan.tokens == [13, 9, 5, 3]


@pytest.mark.parametrize(("name", "options"), [("tome", {"r": 3}), ("expedite", {"clusters": 9})])
def test_encoder_features_come_back_at_full_length(model: Any, image: Tensor, name: str, options: Any) -> None:
    seen: list[Tensor] = []
    model.encoder.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        with vt.patched(model, name, restore="gather", **options):
            logits = model(image)
        with vt.patched(model, name, **options):
            plain = model(image)
    torch.testing.assert_close(logits, plain)
    assert seen[0].shape[1] == 17
    assert seen[1].shape[1] == (17 if name == "expedite" else 5)


def test_hooks_of_the_attention_fire(model: Any, image: Tensor) -> None:
    called: list[int] = []
    model.encoder.layers[1].self_attention.register_forward_hook(lambda *_: called.append(1))
    with vt.patched(model, "tome", r=2):
        model(image)
    assert called == [1]


def test_a_strange_attention_is_refused(model: Any) -> None:
    block = model.encoder.layers[2]
    for strange in (
        nn.MultiheadAttention(48, 3, batch_first=True, kdim=24, vdim=24),
        nn.MultiheadAttention(48, 3, batch_first=True, add_bias_kv=True),
        nn.MultiheadAttention(48, 3),
        nn.Identity(),
    ):
        block.self_attention = strange
        with pytest.raises(IncompatibleError, match="encoder_layer_2.self_attention"):
            vt.patch(model, "tome", r=2)


def test_a_block_with_its_own_forward_is_refused(model: Any) -> None:
    class Other(tv.EncoderBlock):
        def forward(self, input: Tensor) -> Tensor:
            return input

    model.encoder.layers[0].__class__ = Other
    with pytest.raises(IncompatibleError, match="encoder_layer_0 is a Other"):
        vt.patch(model, "tome", r=2)


def test_swag_names_become_torchvisions() -> None:
    backbone = TorchvisionViT()
    model: Any = backbone.example()[0]
    theirs: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        name = name.replace("encoder_layer_", "layer_").replace("heads.", "head.layers.")
        name = name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
        theirs[name] = value.transpose(0, 1) if name == "encoder.pos_embedding" else value
    ours = swag_keys(theirs)
    assert set(ours) == set(model.state_dict())
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())


def test_v3_signatures_are_known() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(tv.EncoderBlock.forward) == ["self", "input"]
    assert names(tv.Encoder.forward) == ["self", "input"]
    assert names(tv.VisionTransformer.forward) == ["self", "x"]
    assert names(nn.MultiheadAttention.forward)[:5] == ["self", "query", "key", "value", "key_padding_mask"]
