"""What cannot work is refused with a message that says why, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mllm_support import PAIR, P, act, ask, copy_of, generated, model_of
from torch import nn

import visiontok as vt
from visiontok.backbones.hf_mllm_examples import IMAGE
from visiontok.core import patching
from visiontok.errors import IncompatibleError, NothingPatchedError, ParameterError, StateLostError, UnknownNameError


def untouched(model: Any) -> bool:
    # transformers hangs up hooks of its own when hidden states are first asked for.
    found = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    hooks = any(type(hook).__module__.startswith("visiontok") for hook in found)
    names = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    marked = any(patching.ATTRIBUTE in vars(m) for m in model.modules())
    swapped = any("_visiontok" in key for m in model.modules() for key in dir(type(m)))
    return not hooks and not marked and not swapped and not any("visiontok" in str(name) for name in names)


@pytest.mark.parametrize("place", ["post", "embed", "llm", "kv"])
def test_more_than_there_are_removes_nothing_and_says_so(place: str) -> None:
    model, given = model_of("llava"), ask("llava", PAIR)
    more = {"ratio": None} if place == "llm" else {}
    with torch.no_grad():
        plain = model(**given).logits
        with vt.patched(model, act(place, keep=1000, **more)) as red:
            assert torch.equal(model(**given).logits, plain)
            assert red.plan.points
            for point in red.plan.points:
                assert (point.before, point.after) == (64, 64)
                assert "1000 tokens asked for, the image has 64" in point.skipped
                assert point.skipped in str(red.plan)


@pytest.mark.parametrize("reducer", ["vtc_cls", "divprune", "random", "fastv", "h2o"])
def test_a_budget_of_zero(reducer: str) -> None:
    model = model_of("llava")
    with pytest.raises(ParameterError, match="keep"):
        vt.patch(model, reducer, keep=0)
    assert untouched(model)


@pytest.mark.parametrize("calls", ["forward", "generate"])
@pytest.mark.parametrize("place", ["post", "embed"])
def test_prompts_and_pictures_that_do_not_match(place: str, calls: str) -> None:
    model, given = model_of("llava"), ask("llava", PAIR)
    ids = given["input_ids"]
    none = {**given, "input_ids": ids.masked_fill(ids == IMAGE, 7)}
    short = {**given, "input_ids": ids.index_fill(1, torch.tensor([10]), 7)}
    moved = ask("llava", [[1, 5, P, P, 6], [1, 9]])
    across = moved["input_ids"].clone()
    across[0, 3:43], across[1, -42:-2] = 7, IMAGE
    with vt.patched(model, act(place)), torch.no_grad():
        run = model if calls == "forward" else model.generate
        fine = generated(model, given, 2)
        with pytest.raises(IncompatibleError, match=r"holds no image placeholder \(token 98\), but 2 image inputs"):
            run(**none)
        with pytest.raises(IncompatibleError, match=r"126 image placeholders .* have 128 features \(64, 64\)"):
            run(**short)
        with pytest.raises(IncompatibleError, match="stand in two rows of the batch"):
            run(**{**moved, "input_ids": across})
        embeds = model.get_input_embeddings()(ids)
        only = {
            "inputs_embeds": embeds,
            "attention_mask": given["attention_mask"],
            "pixel_values": given["pixel_values"],
        }
        with pytest.raises(IncompatibleError, match="needs input_ids with its placeholders"):
            run(**only)
        # A refused call leaves nothing behind.
        assert torch.equal(generated(model, given, 2), fine)


def test_inside_the_decoder_ids_are_needed_too() -> None:
    model, given = model_of("llava"), ask("llava", PAIR)
    embeds = model.get_input_embeddings()(given["input_ids"])
    with vt.patched(model, act("llm")), torch.no_grad(), pytest.raises(IncompatibleError, match="need input_ids"):
        model(inputs_embeds=embeds, attention_mask=given["attention_mask"])


def test_text_needs_no_pictures() -> None:
    model = model_of("llava")
    for name in ("llava", "qwen2_5_vl"):
        model, given = model_of(name), ask(name, [[1, 5, 6, 7], [1, 8]])
        with torch.no_grad():
            plain, ids = model(**given).logits, generated(model, given, 3)
            for place in ("post", "embed", "llm", "kv"):
                with vt.patched(model, act(place)):
                    assert torch.equal(model(**given).logits, plain)
                    assert torch.equal(generated(model, given, 3), ids)


def test_a_family_that_nobody_knows() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(NothingPatchedError):
        vt.patch(model, "vtc_cls", keep=4)
    assert patching.ATTRIBUTE not in vars(model)
    assert not vt.supports("vtc_cls", model)


@pytest.mark.parametrize("place", ["post", "llm", "kv"])
def test_attention_changed_after_patching(place: str) -> None:
    model, given = copy_of("llava"), ask("llava", PAIR)
    red = vt.patch(model, act(place))
    model.set_attn_implementation("eager")
    with torch.no_grad(), pytest.raises(StateLostError, match="implementation was\\s+changed after patching; unpatch"):
        model(**given, use_cache=True)
    red.unpatch()
    assert untouched(model)
    assert model.config._attn_implementation == "eager"
    with torch.no_grad(), vt.patched(model, act(place)):
        model(**given, use_cache=True)


@pytest.mark.parametrize(
    ("name", "reducer", "error", "message"),
    [
        ("llava", [("vtc_cls", {"keep": 8}), ("divprune", {"keep": 4})], IncompatibleError, "both act at"),
        ("llava", [("fastv", {"k": 2}), ("fastv", {"k": 2, "ratio": 0.2})], IncompatibleError, "both act at .*layer 2"),
        ("llava", [("h2o", {"keep": 8}), ("streaming_llm", {"keep": 8})], IncompatibleError, "both act at"),
        ("qwen3_vl", [("fastv", {"k": 1})], IncompatibleError, "DeepStack.*act at layer 2 or later"),
        ("qwen2_5_vl", [("tome", {"r": 4})], IncompatibleError, "cannot be used on Qwen2_5_VL"),
        ("llava", [("vtc_cls", {"keep": 8, "start_layer": 99})], ParameterError, "start_layer must leave a layer"),
        ("llava", [("vtc_cls", {"gflops": 1.0})], ParameterError, "gflops is no budget on a language model"),
        ("llava", [("vtc_cls", {"kep": 8})], UnknownNameError, "no parameter 'kep'"),
    ],
)
def test_a_refused_patch_leaves_no_trace(name: str, reducer: Any, error: Any, message: str) -> None:
    model, given = model_of(name), ask(name, PAIR)
    with torch.no_grad():
        plain = model(**given).logits
        with pytest.raises(error, match=f"(?s){message}"):
            vt.patch(model, reducer)
        assert untouched(model)
        assert torch.equal(model(**given).logits, plain)


def test_a_patch_that_fails_halfway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from visiontok.backbones import hf_hooks

    model, given = model_of("llava"), ask("llava", PAIR)

    def fails(*args: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(hf_hooks, "Leave", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        vt.patch(model, [("pitome", {"keep": 0.9}), act("post"), act("llm")])
    assert untouched(model)
    monkeypatch.undo()
    with torch.no_grad(), vt.patched(model, act("llm")):
        model(**given)
    assert untouched(model)


def test_an_error_inside_a_block_gives_the_model_back() -> None:
    model = model_of("llava")
    with pytest.raises(KeyError), vt.patched(model, [act("post"), act("llm"), act("kv")]):
        raise KeyError
    assert untouched(model)
