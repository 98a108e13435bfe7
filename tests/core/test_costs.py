"""`red.report` of multimodal models: published numbers, the closed formula, and forwards that were really run."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visiontok as vt
from visiontok.core.costs import paper_tflops
from visiontok.errors import ParameterError

transformers = pytest.importorskip("transformers")

from visiontok.backbones.hf_costs import qwen_tower_macs  # noqa: E402
from visiontok.backbones.hf_mllm import HFMultimodal  # noqa: E402
from visiontok.backbones.hf_mllm_examples import examples  # noqa: E402

HALF = torch.float16
PROJECTED = ("llava", "llava_next", "llava_onevision", "internvl")


@functools.cache
def llava_7b() -> Any:
    """LLaVA-1.5-7B without storage; whoever patches it, unpatches it."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = transformers.LlamaConfig(vocab_size=32064)
    with torch.device("meta"):
        config = transformers.LlavaConfig(vision_config=vision, text_config=text)
        return transformers.LlavaForConditionalGeneration(config).eval()


@functools.cache
def tiny() -> dict[str, Any]:
    return examples()


def counted(model: nn.Module, given: Any) -> dict[str, int]:
    """MACs of a forward by module path."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**given)
    return {name.partition(".")[2]: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}


# mllm.md §12, LLaVA-1.5-7B: TFLOPs of the visual tokens by their number.
def test_published_tflops_of_llava_7b() -> None:
    for n, tflops in {576: 7.63, 256: 3.35, 192: 2.51, 128: 1.67, 64: 0.83}.items():
        assert paper_tflops([n] * 32, 4096, 11008) == pytest.approx(tflops, abs=0.006)
    with vt.patched(llava_7b(), "vtc_cls", keep=64) as red:
        report = red.report(dtype=HALF)
    assert report.paper_tflops == (pytest.approx(7.63, abs=0.006), pytest.approx(0.83, abs=0.006))
    assert report.tokens_input == (576, 64)
    assert report.tokens_mean == (576, 64)
    # With no text and no head the true count is the papers' formula: this model has no grouped queries.
    head = 4096 * 32064 / 1e9
    assert [2 * ((value or 0) - head) / 1e3 for value in report.prefill] == pytest.approx(list(report.paper_tflops))
    # CLIP-L/336: 0.38 TFLOPs, of which the patch embedding is a thousandth.
    assert 2 * (report.encoder.before or 0) / 1e3 == pytest.approx(0.38, abs=0.005)
    assert report.encoder.before == report.encoder.after
    assert report.projector.before == pytest.approx(576 * (1024 * 4096 + 4096**2) / 1e9)


# mllm.md §2, LLaVA-NeXT-7B with five crops: TFLOPs and MB of the cache (2 layers d 2 bytes n) by tokens.
def test_published_memory_of_five_crops() -> None:
    with vt.patched(llava_7b(), "divprune", keep=0.5) as red:
        for keep, tflops, megabytes in ((0.5, 19.74, 755.0), (0.25, 9.60, 377.5), (0.1, 3.77, 151.0)):
            red.set(keep=keep)
            tokens = [n * 5 for n in red.plan.tokens]
            # Each crop rounds its share.
            assert paper_tflops(tokens, 4096, 11008) == pytest.approx(tflops, rel=0.01)
            assert 2 * 4096 * 2 * sum(tokens) / 1e6 == pytest.approx(megabytes, rel=0.01)
        report = red.report(images=5, dtype=HALF)
    assert report.paper_tflops == (pytest.approx(41.65, abs=0.01), pytest.approx(tflops, rel=0.01))
    assert (report.kv_bytes.after or 0) / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert report.kv_bytes.before == 2 * 32 * 4096 * 2 * 2880


def test_published_tflops_of_13b() -> None:
    table = {2880: 79.88, 576: 14.89, 256: 6.55, 192: 4.90, 128: 3.26, 64: 1.63}
    for n, tflops in table.items():
        assert paper_tflops([n] * 40, 5120, 13824) == pytest.approx(tflops, abs=0.01)


def test_fastv_saves_what_its_paper_says() -> None:
    # K = 2 of 32 layers see all tokens: (2 f(576) + 30 f(n)) / (32 f(576)), mllm.md §12.
    full = paper_tflops([576] * 32, 4096, 11008)
    assert paper_tflops([576] * 2 + [288] * 30, 4096, 11008) / full == pytest.approx(0.526, abs=0.001)
    with vt.patched(llava_7b(), "fastv", k=2, ratio=0.75) as red:
        report = red.report()
    assert (report.paper_tflops.after or 0) / full == pytest.approx(0.293, abs=0.001)
    assert report.tokens_input == (576, 576)
    assert report.tokens_mean.after == pytest.approx((2 * 576 + 30 * 144) / 32)
    assert report.entries == [576] * 2 + [144] * 30


@pytest.mark.parametrize("family", [*PROJECTED, "qwen2_5_vl", "qwen3_vl"])
def test_the_quadratic_of_a_layer_is_what_a_forward_computes(family: str) -> None:
    model, given = tiny()[family]
    ran = counted(model, given)
    parts = HFMultimodal().anatomy(model)
    batch, length = given["input_ids"].shape
    text = model.config.get_text_config()
    width, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    for i, layer in enumerate(parts.layers):
        # Linear layers of grouped queries and a gated network, and whole attention matrices.
        both = 2 * width * head * (heads + text.num_key_value_heads) + 3 * width * text.intermediate_size
        assert layer == (both, 2 * heads * head, 2 * text.num_key_value_heads * head)
        path = next(p for p in ran if p.endswith(f"language_model.layers.{i}"))
        assert ran[path] == batch * (layer.token * length + layer.pair * length**2)
    assert ran["lm_head"] == batch * length * parts.head
    if family in PROJECTED:
        assert parts.encoder is not None
        assert parts.projector is not None
        crops = len(given["pixel_values"].flatten(0, -4))
        assert ran["model.vision_tower"] == crops * parts.encoder
        tokens = crops * HFMultimodal().length(model) - crops * HFMultimodal().prefix(model)
        assert ran["model.multi_modal_projector"] == tokens * parts.projector


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_count_of_qwens_towers_is_what_a_forward_computes(family: str) -> None:
    model, _ = tiny()[family]
    for side in (8, 12):
        pixels, grid = torch.zeros(side * side, 96), torch.tensor([[1, side, side]])
        ran = counted(model.base_model.visual, {"hidden_states": pixels, "grid_thw": grid})
        assert ran[""] == qwen_tower_macs(model, side)


def test_cache_and_prefill_are_those_of_a_forward() -> None:
    model, given = tiny()["llava"]
    one = {name: value[:1] for name, value in given.items()}
    reducers = [vt.reducers.create("vtc_cls", keep=40), vt.reducers.create("fastv", k=2, ratio=0.5)]
    with vt.patched(model, [*reducers, vt.reducers.create("h2o", keep=0.5)]) as red:
        report = red.report(prompt=given["input_ids"][0, 64:], new_tokens=1)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            cache = model(**one, use_cache=True, logits_to_keep=1).past_key_values
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert report.entries == held
    assert report.kv_bytes.after == sum(k.keys.numel() * 2 * 4 for k in cache.layers)
    assert report.tokens == [40, 40, 20, 20]
    layers = [n + 5 for n in report.tokens]
    parts = red.backbone.anatomy(model)
    assert report.prefill.after * 1e9 == pytest.approx(
        sum(layer.token * n + layer.pair * n**2 for layer, n in zip(parts.layers, layers)) + parts.head
    )
    made = 1e9 * (report.first_token.after or 0)
    # What the forward does besides is the methods' own.
    assert 0 <= counter.get_total_flops() / 2 - made < 0.2 * made
    step = sum(layer.token + layer.pair * (n + 1) for layer, n in zip(parts.layers, held)) + parts.head
    assert report.decode.after * 1e9 == pytest.approx(step)


def test_a_tower_that_merges_is_counted() -> None:
    model, _ = tiny()["llava"]
    with vt.patched(model, "tome", r=8) as red:
        report = red.report(prompt=4)
        assert report.encoder.after < report.encoder.before
        assert report.projector.after < report.projector.before
        assert report.tokens_input.after == red.plan.tokens[0]
    assert model.config.text_config._attn_implementation == "sdpa"


def test_it_prints_and_turns_into_plain_data() -> None:
    with vt.patched(tiny()["llava"][0], "mustdrop") as red:
        report = red.report(prompt=[1, 2, 3], images=2)
    text = str(report)
    assert "papers' TFLOPs (visual tokens only)" in text
    assert "the image decides how much mustdrop removes" in text
    plain = report.to_dict()
    assert (plain["prompt"], plain["images"], plain["dtype"]) == (3, 2, "float32")
    assert plain["tokens_input"] == [128, 128]


def test_hidden_entries_stay_in_memory() -> None:
    model, _ = tiny()["llava"]
    with vt.patched(model, "lazy_llm") as red:
        report = red.report(prompt=6)
    assert report.kv_bytes.after == report.kv_bytes.before
    assert "lazy_llm hides" in str(report)


def test_text_and_images_can_be_absent() -> None:
    model, _ = tiny()["llava"]
    with vt.patched(model, "vtc_cls", keep=16) as red:
        text = red.report(prompt=7, images=0)
        nothing = red.report(prompt=0, images=0)
    assert text.prefill.before == text.prefill.after > 0
    assert text.encoder == (0, 0)
    assert nothing.prefill == (0, 0)
    assert nothing.kv_bytes == (0, 0)


@pytest.mark.parametrize("given", [{"prompt": "two words"}, {"prompt": -1}, {"images": 1.5}, {"new_tokens": 0}])
def test_wrong_arguments_are_named(given: dict[str, Any]) -> None:
    model, _ = tiny()["llava"]
    with vt.patched(model, "vtc_cls", keep=16) as red, pytest.raises(ParameterError, match=next(iter(given))):
        red.report(**given)
