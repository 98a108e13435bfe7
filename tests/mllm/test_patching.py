"""Copies, other processes, threads, training and composition of patched multimodal models."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_support import (
    MIXED,
    PAIR,
    act,
    ask,
    assert_same_rows,
    copy_of,
    fresh_copy_of,
    generated,
    masked,
    model_of,
    watch,
)
from torch import Tensor

import visiontok as vt
from visiontok.core.signals import Site

CHAIN: list[Any] = [
    ("pitome", {"keep": 0.9}),
    ("vtc_cls", {"keep": 0.5}),
    ("fastv", {"k": 2, "ratio": 0.5}),
    ("h2o", {"keep": 0.5}),
]
PLACES = pytest.mark.parametrize("place", ["post", "llm", "kv"])


def logits_of(model: Any, given: dict[str, Any], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**given, **more).logits


@PLACES
def test_a_copy_is_independent(place: str) -> None:
    model, given = copy_of("llava"), ask("llava", PAIR)
    plain, plain_ids = logits_of(model, given), generated(model, given, 3)
    red = vt.patch(model, act(place))
    expected, ids = logits_of(model, given), generated(model, given, 3)
    twin = copy.deepcopy(model)
    red.unpatch()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits_of(twin, given), expected)
    assert torch.equal(generated(twin, given, 3), ids)
    vt.unpatch(twin)
    assert torch.equal(logits_of(twin, given), plain)
    assert torch.equal(generated(twin, given, 3), plain_ids)
    assert type(twin) is type(model)


CHILD = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    models, given = pickle.load(file)
import torch
import visiontok as vt
from visiontok.backbones.hf_mllm_examples import examples
# A process that never built a model cannot record hidden states, patched or not: transformers notes it on building.
examples()
out = []
for model in models:
    ids = [model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)]
    vt.unpatch(model)
    ids.append(model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False))
    out.append([i.tolist() for i in ids])
print(out)
"""


def test_a_pickle_works_in_a_fresh_process(tmp_path: Path) -> None:
    given = ask("llava", PAIR)
    how: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    models, expected = [], []
    for reducer in ([act("post")], [act("llm")], CHAIN):
        model = model_of("llava")
        with vt.patched(model, reducer):
            reduced = model.generate(**given, **how).tolist()
        expected.append([reduced, model.generate(**given, **how).tolist()])
        # Once a model ran, transformers' own hooks on it cannot be pickled.
        models.append(fresh_copy_of("llava"))
        vt.patch(models[-1], reducer)
    path = tmp_path / "models.pkl"
    path.write_bytes(pickle.dumps((models, given)))
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(expected)


@PLACES
def test_a_detached_model_shares_the_weights(place: str) -> None:
    model, given = model_of("llava"), ask("llava", PAIR)
    plain, ids = logits_of(model, given), generated(model, given, 3)
    with vt.patched(model, act(place)):
        expected = generated(model, given, 3)
        twin = vt.detached(model)
        assert torch.equal(generated(twin, given, 3), expected)
    assert torch.equal(generated(twin, given, 3), expected)
    assert torch.equal(generated(model, given, 3), ids)
    assert torch.equal(logits_of(model, given), plain)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]


def test_two_models_with_different_methods_at_once() -> None:
    given, reducers = ask("llava", PAIR), [[act("post")], [act("llm")], [act("kv")], CHAIN]
    models = [copy_of("llava") for _ in reducers]
    alone = []
    for model, reducer in zip(models, reducers):
        with vt.patched(model, reducer):
            alone.append((logits_of(model, given), generated(model, given, 3)))
    for model, reducer in zip(models, reducers):
        vt.patch(model, reducer)
    for _ in range(2):
        for model, (logits, ids) in zip(models, alone):
            assert torch.equal(logits_of(model, given), logits)
            assert torch.equal(generated(model, given, 3), ids)


@pytest.mark.parametrize("reducer", [[act("post")], [act("llm")], CHAIN], ids=["post", "llm", "chain"])
def test_threads_do_not_disturb_each_other(reducer: Any) -> None:
    model = model_of("llava")
    inputs = [[ask("llava", MIXED if t else PAIR, seed=10 * t + i) for i in range(5)] for t in range(2)]
    with vt.patched(model, reducer):
        serial = [[logits_of(model, given) for given in own] for own in inputs]
        ids = [generated(model, own[0], 3) for own in inputs]
        found: list[Any] = [[], []]
        said: list[Any] = [None, None]

        def work(t: int) -> None:
            found[t] = [logits_of(model, given) for given in inputs[t]]
            said[t] = generated(model, inputs[t][0], 3)

        threads = [threading.Thread(target=work, args=(t,)) for t in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for t in range(2):
        assert len(found[t]) == 5
        assert all(torch.equal(a, b) for a, b in zip(found[t], serial[t]))
        assert torch.equal(said[t], ids[t])


def test_changing_a_budget_in_place() -> None:
    model, given = model_of("llava"), ask("llava", PAIR)
    plain = logits_of(model, given)
    for place, changes in (("post", {"keep": 7}), ("llm", {"keep": 7}), ("kv", {"keep": 7})):
        with vt.patched(model, act(place, **({**changes, "ratio": None} if place == "llm" else changes))):
            expected, ids = logits_of(model, given), generated(model, given, 4)
        with vt.patched(model, act(place)) as red:
            generated(model, given, 2)
            assert red.set(**changes) is red
            assert torch.equal(logits_of(model, given), expected)
            assert torch.equal(generated(model, given, 4), ids)
            if place != "kv":
                assert red.tokens[-1] == 7
            counts = [len(m._forward_pre_hooks) for m in model.modules()]
            assert max(counts) <= 1
        assert torch.equal(logits_of(model, given), plain)


@pytest.mark.parametrize("reducer", [[act("post")], CHAIN], ids=["post", "chain"])
def test_saving_and_loading(reducer: Any, tmp_path: Path) -> None:
    model, given = copy_of("llava"), ask("llava", PAIR)
    plain = logits_of(model, given)
    vt.patch(model, reducer)
    expected = logits_of(model, given)
    model.save_pretrained(tmp_path)
    kind = type(model_of("llava"))
    loaded: Any = kind.from_pretrained(tmp_path).eval()
    assert "visiontok" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits_of(loaded, given), plain)
    vt.patch(loaded, reducer)
    assert torch.equal(logits_of(loaded, given), expected)
    loaded.load_state_dict(model.state_dict(), strict=True)


# ---- training


def gradients(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(**given, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("place", ["post", "llm"])
def test_gradient_checkpointing_gives_the_same_gradients(place: str) -> None:
    model, given = copy_of("llava"), ask("llava", PAIR)
    given["labels"] = given["input_ids"].masked_fill(given["input_ids"] > 90, -100)
    vt.patch(model, act(place))
    model.train()
    plain = gradients(model, given)
    model.gradient_checkpointing_enable()
    again = gradients(model, given)
    assert set(plain) == set(again)
    assert any(name.startswith("model.vision_tower") for name in plain)
    assert all(bool(grad.isfinite().all()) for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reducer", [[act("post")], [act("llm")], CHAIN], ids=["post", "llm", "chain"])
def test_low_precision_and_inference_mode(reducer: Any) -> None:
    model, given = copy_of("llava"), ask("llava", PAIR)
    with vt.patched(model, reducer):
        expected = logits_of(model, given)
        with torch.inference_mode():
            assert torch.equal(model(**given).logits, expected)
            generated(model, given, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert bool(logits_of(model, given).isfinite().all())
            generated(model, given, 2)
    half = model.to(torch.bfloat16)
    with vt.patched(half, reducer):
        low = {**given, "pixel_values": given["pixel_values"].bfloat16()}
        assert logits_of(half, low).dtype == torch.bfloat16
        generated(half, low, 2)


# ---- several methods, and what else a forward may return


def test_one_method_at_each_place() -> None:
    model, given = model_of("llava"), ask("llava", MIXED)
    with vt.patched(model, CHAIN, trace=True) as red:
        short = logits_of(model, given, use_cache=True)
        sites = {t.site for t in red.trace if hasattr(t, "site")}
        assert sites >= {Site.POST, Site.LLM, Site.KV}
        before, after = red.plan.tokens[0], red.plan.tokens[-1]
        assert 64 > before > after > 0
        ids = generated(model, given, 3)
        assert torch.equal(ids[:, :-3], given["input_ids"])
        kept = [t for t in red.trace if getattr(t, "site", None) is Site.LLM][0].kept
        assert short.shape[1] == max(5 + len(kept[0]) + len(kept[1]), 3, 4 + len(kept[2]))


@pytest.mark.parametrize("place", ["post", "llm"])
def test_eager_attention(place: str) -> None:
    model, given = copy_of("llava"), ask("llava", MIXED)
    with vt.patched(model, act(place)):
        fast, ids = logits_of(model, given), generated(model, given, 3)
    model.set_attn_implementation("eager")
    with vt.patched(model, act(place), trace=True) as red:
        slow = logits_of(model, given)
        seen = watch(red, given, "llava")
        assert torch.equal(generated(model, given, 3), ids)
    assert fast.shape == slow.shape
    assert_same_rows(slow, masked(model_of("llava"), seen, given), seen.live[-1])


@PLACES
def test_hidden_states_and_attention_maps(place: str) -> None:
    model, given = model_of("llava"), ask("llava", PAIR)
    plain = model(**given, output_hidden_states=True)
    with vt.patched(model, act(place)) as red, torch.no_grad():
        out = model(**given, output_hidden_states=True)
        assert torch.equal(out.logits, logits_of(model, given))
        tokens = red.tokens
    assert len(out.hidden_states) == len(plain.hidden_states) == 5
    lengths = [h.shape[1] - 5 for h in out.hidden_states]
    # Before each layer, and after the last.
    before = 64 if place == "kv" else None
    assert lengths[-1] == (before or tokens[-1])
    assert lengths[0] == (64 if place != "post" else tokens[0])
