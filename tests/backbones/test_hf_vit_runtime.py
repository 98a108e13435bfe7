"""Patched vision encoders of transformers in what people run them with: pipelines, adapters, offload, compilers."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import tiny
from PIL import Image
from torch import Tensor, nn

import visiontok as vt
from visiontok.errors import StateLostError

OPTIONS: dict[str, Any] = {"num_labels": 3}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 8, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
NAMES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "vit": ("vit", "ViTConfig", "ViTForImageClassification", OPTIONS),
    "dinov3": ("dinov3_vit", "DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 4}),
    "clip": ("clip", "CLIPConfig", "CLIPModel", {"vision_config": VISION, "text_config": TEXT, "projection_dim": 16}),
    "siglip": ("siglip", "SiglipVisionConfig", "SiglipVisionModel", {}),
    "beit": ("beit", "BeitConfig", "BeitForImageClassification", {"use_relative_position_bias": True, **OPTIONS}),
}


@functools.cache
def _model(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny(*NAMES[name][:3], **NAMES[name][3])


def make(name: str = "vit") -> Any:
    """A copy that a test may change."""
    return copy.deepcopy(_model(name))


def image(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def read(output: Any) -> Tensor:
    """The logits or pooled features."""
    return output.logits if "logits" in output else output.pooler_output


def run(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return read(model(x))


# ---- whole models


def test_pipelines_take_patched_models() -> None:
    from transformers import pipeline
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.clip.tokenization_clip import CLIPTokenizer
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    size = {"height": 32, "width": 32}
    model = make()
    classify = pipeline("image-classification", model=model, image_processor=ViTImageProcessorPil(size=size))
    whole = classify(picture)
    with vt.patched(model, "tome", r=3) as red:
        assert {row["label"] for row in classify(picture)} == {"LABEL_0", "LABEL_1", "LABEL_2"}
        assert classify(picture) != whole
        assert red.tokens == [14, 11, 8, 5]
    assert classify(picture) == whole

    clip = make("clip")
    words = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3})
    shape = {"size": size, "crop_size": size}
    parts = {"tokenizer": words, "image_processor": CLIPImageProcessorPil(**shape)}
    guess = pipeline("zero-shot-image-classification", model=clip, **parts)
    asked = {"candidate_labels": ["a", "b"], "hypothesis_template": "{}"}
    whole = guess(picture, **asked)
    with vt.patched(guess, "tome", r=3) as red:
        found = guess(picture, **asked)
        assert red.tokens == [14, 11, 8, 5]
    assert {row["label"] for row in found} == {"a", "b"}
    assert found != whole


@pytest.mark.parametrize("name", NAMES)
def test_signature_keys_copies_and_files(name: str) -> None:
    model = make(name).vision_model if name == "clip" else make(name)
    x, keys, parameters = image(), list(model.state_dict()), inspect.signature(model.forward)
    plain = run(model, x)
    red = vt.patch(model, "tome", r=3)
    assert inspect.signature(model.forward) == parameters
    assert list(model.state_dict()) == keys
    want = run(model, x)
    assert not torch.equal(want, plain)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded, pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, x), want)
    with torch.no_grad():
        for parameter in red.model.parameters():
            parameter.zero_()
    assert torch.equal(run(twin, x), want)
    vt.unpatch(twin)
    assert torch.equal(run(twin, x), plain)
    assert type(twin) is type(make(name)) or name == "clip"


# ---- training


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    read(model(x)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    model, x = make(name).train(), image()
    vt.patch(model, "tome", r=3)
    want = gradients(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = {"layers": 0}
    layers = [m for m in model.modules() if type(m).__name__.endswith("Layer")]

    def count(*_: Any) -> None:
        calls["layers"] += 1

    for layer in layers:
        next(m for m in layer.modules() if isinstance(m, nn.Linear)).register_forward_hook(count)
    got = gradients(model, x)
    assert calls["layers"] == 2 * len(layers)
    assert got.keys() == want.keys()
    for key, gradient in want.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-5, atol=1e-6)
    # Asking for hidden states must not take from the recomputation what it starts from.
    output = model(x, output_hidden_states=True)
    assert not any(hasattr(h, "_visiontok_state") for h in output.hidden_states)
    read(output).sum().backward()


def test_reentrant_checkpointing_says_that_the_state_is_lost() -> None:
    model = make().train()
    vt.patch(model, "tome", r=3)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(StateLostError, match="use_reentrant=False"):
        read(model(image().requires_grad_())).sum().backward()


def test_hidden_states_stay_on_the_way_of_gradients() -> None:
    model = make()
    with vt.patched(model, "tome", r=3):
        output = model(image(), output_hidden_states=True)
        for states in output.hidden_states:
            states.retain_grad()
        read(output).sum().backward()
    assert all(states.grad is not None for states in output.hidden_states)


def test_training_uses_dropout_in_the_patched_layers() -> None:
    model = tiny(*NAMES["vit"][:3], **OPTIONS, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    with vt.patched(model, "tome", r=3):
        still = run(model, image())
        assert torch.equal(run(model, image()), still)
        model.train()
        torch.manual_seed(0)
        first = run(model, image())
        assert not torch.equal(run(model, image()), first)
        torch.manual_seed(0)
        assert torch.equal(run(model, image()), first)


# ---- what others put into or around the model


class Quantised(nn.Module):
    """A linear layer as quantisers make it: packed, without a weight to read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = (linear.weight.detach(), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *self.packed)


def test_quantised_linears_are_called() -> None:
    model, x = make(), image()
    with vt.patched(model, "tome", r=3):
        want = run(model, x)
    for layer in model.vit.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.attention, name, Quantised(getattr(layer.attention, name)))
    with vt.patched(model, "tome", r=3):
        assert torch.equal(run(model, x), want)


def test_lora_before_patching_takes_part() -> None:
    peft = pytest.importorskip("peft")
    model, x = make(), image()
    with vt.patched(model, "tome", r=3):
        plain = run(model, x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    vt.patch(adapted, "tome", r=3)
    assert torch.equal(run(adapted, x), plain)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.equal(run(adapted, x), plain)
    read(adapted(x)).sum().backward()
    found = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert found
    assert all("lora" in name for name in found)


@pytest.mark.parametrize("name", ["vit", "dinov3", "beit"])
@pytest.mark.parametrize("before", [True, False])
def test_offload_hooks_before_and_after_patching(name: str, before: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = make(name), image()
    with vt.patched(model, "tome", r=3):
        want = run(model, x)
    if before:
        accelerate.cpu_offload(model, torch.device("cpu"))
    red = vt.patch(model, "tome", r=3)
    if not before:
        accelerate.cpu_offload(model, torch.device("cpu"))
    # A norm that a hook has to load is called as a module; else it may be part of the merge, which rounds otherwise.
    torch.testing.assert_close(run(model, x), want, rtol=0, atol=1e-6)
    assert red.tokens[-1] < red.plan.length
    red.unpatch()
    assert torch.equal(run(model, x), run(make(name), x))


def test_a_device_map_is_followed() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = make(), image()
    with vt.patched(model, "tome", r=3):
        want = run(model, x)
    places = {name: "cpu" for name, _ in model.named_parameters()}
    accelerate.dispatch_model(model, device_map=places, force_hooks=True)
    with vt.patched(model, "tome", r=3) as red:
        assert torch.equal(run(model, x), want)
        assert red.tokens == [14, 11, 8, 5]


# ---- compilers


FULL = [pytest.param(name, "aot_eager", marks=pytest.mark.full) for name in ("vit", "dinov3", "siglip", "beit")]


@pytest.mark.parametrize(("name", "backend"), [("dinov3", "eager"), *FULL])
def test_patched_models_compile_to_one_graph(name: str, backend: str) -> None:
    model, x = make(name), image()
    # Two layers: one that merges, and one that sees what was merged.
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    del stack[2:]
    with vt.patched(model, "tome", r=[3, 0]):
        want = run(model, x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(run(compiled, x), want, rtol=1e-4, atol=1e-5)


def test_patched_models_export() -> None:
    model, x = make(), image()
    with vt.patched(model, "tome", r=3):
        want = run(model, x)
        program = torch.export.export(model, (x,), strict=False)
        assert program.graph_module is not None
        torch.testing.assert_close(read(program.module()(x)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_half_precision_stays_close(dtype: torch.dtype, impl: str) -> None:
    model, x = make("siglip"), image()
    model.set_attn_implementation(impl)
    with vt.patched(model, "random", r=3, seed=0):
        want = run(model, x)
        with torch.autocast("cpu", dtype=dtype):
            casted = run(model, x)
        got = run(model.to(dtype), x.to(dtype))
    assert got.dtype == dtype
    for found in (got, casted):
        assert (found.float() - want).norm() < 0.05 * want.norm()
