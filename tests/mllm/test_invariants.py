"""The five invariants of reduced multimodal models, on every family and place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mllm_support import (
    ACTS,
    CACHE,
    FAMILIES,
    MIXED,
    ONE,
    PAIR,
    SILENT,
    act,
    alone,
    ask,
    assert_same_rows,
    generated,
    greedy,
    masked,
    model_of,
    planar,
    watch,
)

import visiontok as vt
from visiontok.backbones import hf_cache
from visiontok.core.signals import Site

PLACES = tuple(ACTS)
BEFORE_CACHE = ("post", "embed", "llm")
EVERY = pytest.mark.parametrize("name", FAMILIES)


def few(places: tuple[str, ...], always: tuple[str, ...]) -> list[Any]:
    """Family and place; all of them only in the full run."""
    pairs = [(name, place) for name in FAMILIES for place in places]
    return [pair if pair[1] in always else pytest.param(*pair, marks=pytest.mark.full) for pair in pairs]


# ---- 1. keeping everything changes no bit


@EVERY
def test_keeping_all_changes_no_bit(name: str) -> None:
    model, given = model_of(name), ask(name, MIXED)
    with torch.no_grad():
        logits = model(**given).logits
    ids = generated(model, given)
    for place in PLACES:
        reducer = act(place, keep=10**6, ratio=None) if place == "llm" else act(place, keep=10**6)
        with vt.patched(model, reducer) as red, torch.no_grad():
            assert torch.equal(model(**given).logits, logits), place
            assert torch.equal(generated(model, given), ids), place
            assert not red.plan.removes


# ---- 2. original positions: the plain model, with the dropped tokens out of sight


@pytest.mark.parametrize(("name", "place"), few(BEFORE_CACHE, ("post", "llm")))
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_dropped_tokens_are_only_out_of_sight(name: str, place: str, positions: str) -> None:
    model, given = model_of(name), ask(name, MIXED)
    with vt.patched(model, act(place, positions=positions), trace=True) as red, torch.no_grad():
        short = model(**given).logits
        seen = watch(red, given, name)
    live = seen.live[-1]
    assert int(live.sum()) < int(given["attention_mask"].sum())
    assert_same_rows(short, masked(model, seen, given), live)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", pytest.param("llava_next", marks=pytest.mark.full)])
def test_dropping_before_and_inside_the_decoder(name: str) -> None:
    model, given = model_of(name), ask(name, MIXED)
    with vt.patched(model, [act("post"), act("llm")], trace=True) as red, torch.no_grad():
        short = model(**given).logits
        seen = watch(red, given, name)
    counts = [int(live.sum()) for live in seen.live]
    assert counts[0] == counts[1] > counts[2] == counts[3]
    assert_same_rows(short, masked(model, seen, given), seen.live[-1])


# ---- 3. a row of a padded batch is what it is alone


@pytest.mark.parametrize(("name", "place"), few(PLACES, ("post", "llm")))
def test_a_padded_batch_equals_its_rows(name: str, place: str) -> None:
    model, given = model_of(name), ask(name, MIXED)
    with vt.patched(model, act(place), trace=True) as red, torch.no_grad():
        short = model(**given).logits
        live = watch(red, given, name).live[-1]
        for b, one in enumerate(alone(name, MIXED, given)):
            own = model(**one).logits[0]
            assert len(own) == int(live[b].sum())
            torch.testing.assert_close(short[b, short.shape[1] - len(own) :], own, atol=1e-4, rtol=1e-4)
        ids = generated(model, given)
        for b, one in enumerate(alone(name, MIXED, given)):
            assert torch.equal(generated(model, one)[0, -5:], ids[b, -5:]), b


@pytest.mark.parametrize("reducer", [("prumerge", {}), ("random", {"keep": 0.3}), ("token_corr", {})])
def test_rows_with_counts_of_their_own(reducer: Any) -> None:
    model, given = model_of("llava"), ask("llava", MIXED)
    with vt.patched(model, [reducer], trace=True) as red, torch.no_grad():
        short = model(**given).logits
        kept = [len(k) for k in red.trace[-1].kept]
        assert all(0 < k < 64 for k in kept)
        assert len(set(kept)) > 1 or reducer[0] == "random"
        for b, one in enumerate(alone("llava", MIXED, given)):
            own = model(**one).logits[0]
            torch.testing.assert_close(short[b, short.shape[1] - len(own) :], own, atol=1e-4, rtol=1e-4)


# ---- 4. generate equals computing everything anew for every token


@pytest.mark.parametrize(("name", "place"), few(("post", "embed"), ("post",)))
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_generate_equals_a_loop_without_cache(name: str, place: str, positions: str) -> None:
    model, given = model_of(name), ask(name, PAIR)
    with vt.patched(model, act(place, positions=positions)) as red, torch.no_grad():
        ids = generated(model, given)
        anew = greedy(lambda now: model(**now, use_cache=False).logits[:, -1], given, 5)
        assert red.plan.removes
    assert torch.equal(ids, anew)


@pytest.mark.parametrize(("name", "place"), few(PLACES, ("llm", "kv")))
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_generate_equals_the_masked_model(name: str, place: str, positions: str) -> None:
    # Who looks at the last token would decide anew at every step: what the prompt kept counts.
    model, given = model_of(name), ask(name, PAIR)
    with vt.patched(model, act(place, positions=positions), trace=True) as red, torch.no_grad():
        ids = generated(model, given)
        seen = watch(red, given, name)
    assert any(t.site is {"kv": Site.KV, "llm": Site.LLM}.get(place, t.site) for t in red.trace)
    assert torch.equal(ids, greedy(lambda now: masked(model, seen, now)[:, -1], given, 5))


@EVERY
def test_evicting_leaves_the_first_token_alone(name: str) -> None:
    model, given = model_of(name), ask(name, PAIR)
    mask = given["attention_mask"]
    # Forward alone counts positions over padding; generate does not.
    counted = {} if planar(name) else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        plain = model(**given, **counted).logits
        with vt.patched(model, act("kv")):
            ids = generated(model, given)
            step = model(**given, **counted, use_cache=True)
            assert torch.equal(step.logits, plain)
            found = []
            for _ in range(5):
                logits = step.logits[:, -1]
                logits[:, SILENT] = -torch.inf
                found.append(logits.argmax(-1, keepdim=True))
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
                places = mask.cumsum(1)[:, -1:] - 1
                if planar(name):
                    # The host would count positions of the whole mask for one new token.
                    places = (places + model.model.rope_deltas).expand(3, -1, -1)
                counted = {"position_ids": places}
                cache = hf_cache.cache_in(step)
                step = model(input_ids=found[-1], attention_mask=mask, **{CACHE: cache}, **counted)
    assert torch.equal(torch.cat(found, dim=1), ids[:, -5:])


# ---- 5. unpatching gives everything back


def snapshot(model: Any) -> dict[str, Any]:
    hooks = [key for key in vars(torch.nn.Module()) if key.endswith("_hooks") or "hooks_with" in key]
    return {
        "types": {path: type(m) for path, m in model.named_modules()},
        "attributes": {path: sorted(vars(m)) for path, m in model.named_modules()},
        "hooks": {path: [len(vars(m).get(key) or ()) for key in hooks] for path, m in model.named_modules()},
        "attention": {p: m.config._attn_implementation for p, m in model.named_modules() if hasattr(m, "config")},
        "keys": list(model.state_dict()),
        "storage": [t.data_ptr() for t in (*model.parameters(), *model.buffers())],
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "repr": repr(model),
    }


@EVERY
def test_unpatching_restores_every_bit(name: str) -> None:
    model, given = model_of(name), ask(name, ONE)
    before = snapshot(model)
    with torch.no_grad():
        logits = model(**given).logits
    for place in PLACES:
        with torch.no_grad(), vt.patched(model, act(place)):
            assert list(model.state_dict()) == before["keys"]
            model(**given)
            generated(model, given, 2)
        after = snapshot(model)
        assert {key for key in before if before[key] != after[key]} == set(), place
    with torch.no_grad():
        assert torch.equal(model(**given).logits, logits)
