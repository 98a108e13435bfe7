"""R12: ways to generate with a shortened prompt, caches of several turns, and the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mllm_support import (
    CACHE,
    IMAGE,
    MIXED,
    PAIR,
    SILENT,
    P,
    act,
    alone,
    ask,
    copy_of,
    generated,
    greedy,
    grown,
    masked,
    model_of,
    watch,
)
from torch import Tensor

import visiontok as vt
from visiontok.backbones import hf_cache
from visiontok.backbones.hf_decoder import stack_of
from visiontok.errors import IncompatibleError

SOME = pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
INSIDE = pytest.mark.parametrize("place", ["post", "llm", "kv"])


@SOME
@INSIDE
def test_ids_begin_with_the_prompt_that_was_given(name: str, place: str) -> None:
    model, given = model_of(name), ask(name, MIXED)
    length = given["input_ids"].shape[1]
    with vt.patched(model, act(place)):
        ids = generated(model, given, 3)
        out = generated(model, given, 3, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert ids.shape == (3, length + 3)
    assert torch.equal(ids[:, :length], given["input_ids"])
    assert torch.equal(out.sequences, ids)
    assert len(out.scores) == len(out.logits) == 3
    # What was chosen at every step is what the scores say.
    assert torch.equal(torch.stack([s.argmax(1) for s in out.scores], dim=1), ids[:, length:])


@pytest.mark.parametrize(("name", "place"), [("llava", "post"), ("llava", "llm"), ("llava", "kv"),
                                             ("qwen2_5_vl", "post"), ("qwen2_5_vl", "llm")])  # fmt: skip
def test_beams_of_a_batch_are_those_of_its_rows(name: str, place: str) -> None:
    model, given = model_of(name), ask(name, PAIR)
    how: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    with vt.patched(model, act(place)) as red:
        both = generated(model, given, 4, output_scores=True, **how)
        assert both.sequences.shape[0] == 4
        assert red.plan.removes
        for b, one in enumerate(alone(name, PAIR, given)):
            own = generated(model, one, 4, output_scores=True, **how)
            assert torch.equal(own.sequences[:, -4:], both.sequences[2 * b : 2 * b + 2, -4:])
            torch.testing.assert_close(
                own.sequences_scores, both.sequences_scores[2 * b : 2 * b + 2], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("place", ["llm", *(pytest.param(p, marks=pytest.mark.full) for p in ("post", "kv"))])
def test_one_beam_of_many_is_the_best_of_all_continuations(place: str) -> None:
    # As many beams as there are words: the search over two tokens misses nothing.
    model, given = model_of("llava"), ask("llava", [[1, 5, P, 6]])
    with vt.patched(model, act(place), trace=True) as red, torch.no_grad():
        found = generated(model, given, 2, num_beams=100, length_penalty=0.0)
        generated(model, given, 1)
        seen = watch(red, given, "llava")
    first = masked(model, seen, given)[:, -1].log_softmax(-1)[0]
    first[SILENT] = -torch.inf
    best, words = -torch.inf, (0, 0)
    for word in first.isfinite().nonzero().flatten().tolist():
        second = masked(model, seen, grown(given, torch.tensor([[word]])))[0, -1].log_softmax(-1)
        second[SILENT] = -torch.inf
        total = float(first[word] + second.max())
        if total > best:
            best, words = total, (word, int(second.argmax()))
    assert tuple(found[0, -2:].tolist()) == words


@INSIDE
def test_sampling_is_repeatable_and_draws_several(place: str) -> None:
    model, given = model_of("llava"), ask("llava", PAIR)
    length = given["input_ids"].shape[1]

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return generated(model, given, 4, do_sample=True, num_return_sequences=3, temperature=2.0)

    with vt.patched(model, act(place)):
        one, again, other = drawn(3), drawn(3), drawn(4)
    assert one.shape == (6, length + 4)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one[:, :length], given["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in one[:3, length:]}) > 1


@SOME
@INSIDE
def test_a_static_cache_gives_the_same(name: str, place: str) -> None:
    model, given = model_of(name), ask(name, PAIR)
    with vt.patched(model, act(place)):
        dynamic = generated(model, given, 5)
        assert torch.equal(generated(model, given, 5, cache_implementation="static", disable_compile=True), dynamic)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_shortened_prompt_can_be_read_in_pieces(name: str) -> None:
    model, given = model_of(name), ask(name, [[1, 5, P, 6, 7, 8]])
    with vt.patched(model, act("post")):
        whole = generated(model, given, 5)
        assert torch.equal(generated(model, given, 5, prefill_chunk_size=9), whole)


@pytest.mark.parametrize("place", ["llm", "kv"])
def test_a_prompt_in_pieces_is_refused_inside_the_decoder(place: str) -> None:
    model, given = model_of("llava"), ask("llava", PAIR)
    with vt.patched(model, act(place)), pytest.raises(IncompatibleError, match="prefill_chunk_size=9.*POST or EMBED"):
        generated(model, given, 5, prefill_chunk_size=9)


@pytest.mark.parametrize("place", ["post", "llm"])
def test_an_assistant_changes_nothing(place: str) -> None:
    model, given = copy_of("llava"), ask("llava", [[1, 5, P, 6, 7, 8]])
    helper = copy_of("llava")
    with vt.patched(model, act(place)):
        plain = generated(model, given, 6)
        assert torch.equal(generated(model, given, 6, assistant_model=helper), plain)


@pytest.mark.parametrize("place", ["post", "embed"])
def test_without_a_cache(place: str) -> None:
    model, given = model_of("llava"), ask("llava", PAIR)
    with vt.patched(model, act(place)):
        assert torch.equal(generated(model, given, 4, use_cache=False), generated(model, given, 4))


@SOME
def test_inside_the_decoder_without_a_cache_every_token_decides_anew(name: str) -> None:
    model, given = model_of(name), ask(name, PAIR)
    with vt.patched(model, act("llm")), torch.no_grad():
        ids = generated(model, given, 4, use_cache=False)
        assert torch.equal(ids, greedy(lambda now: model(**now, use_cache=False).logits[:, -1], given, 4))


# ---- several turns


def second_turn(name: str, given: dict[str, Any], first: Tensor) -> dict[str, Any]:
    words = torch.tensor([[13, 14, 15]])
    return grown(given, torch.cat((first[:, given["input_ids"].shape[1] :], words), dim=1))


# Hosts alone refuse the pictures of turns that the cache holds; where the prompt is shortened, they may come again.
TURNS = [("llava", "post", True), ("llava", "post", False), ("llava_next", "post", True), ("llava_next", "post", False),
         ("qwen2_5_vl", "post", True), ("qwen2_5_vl", "post", False), ("llava", "llm", False), ("llava", "kv", False),
         ("qwen3_vl", "llm", False)]  # fmt: skip


@pytest.mark.parametrize(("name", "place", "again"), TURNS)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_second_turn_on_the_same_cache(name: str, place: str, positions: str, again: bool) -> None:
    from transformers import DynamicCache

    model, given = model_of(name), ask(name, [[1, 5, P, 6, 7, 8]])
    with vt.patched(model, act(place, positions=positions), trace=True) as red, torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        first = generated(model, given, 3, **{CACHE: cache})
        seen = watch(red, given, name)
        assert torch.equal(first[:, -3:], generated(model, given, 3)[:, -3:])
        turn = second_turn(name, given, first)
        sent = {k: v for k, v in turn.items() if again or not k.startswith(("pixel", "image"))}
        second = generated(model, sent, 3, **{CACHE: cache})
    assert torch.equal(second[:, : turn["input_ids"].shape[1]], turn["input_ids"])
    assert torch.equal(second, greedy(lambda now: masked(model, seen, now)[:, -1], turn, 3))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_new_picture_in_the_second_turn(name: str) -> None:
    from transformers import DynamicCache

    model, rows = model_of(name), [[1, 5, P, 6, 7]]
    both = ask(name, [[1, 5, P, 6, 7, 8, P, 9]])
    along = [key for key in both if key in ("input_ids", "attention_mask", "mm_token_type_ids")]
    end = both["input_ids"][0].tolist().index(8)
    given = alone(name, rows, {**both, **{key: both[key][:, :end] for key in along}})[0]
    with vt.patched(model, act("post")), torch.no_grad():
        whole = model(**both)
        cache = DynamicCache(config=model.config.get_text_config())
        model(**given, past_key_values=cache, use_cache=True)
        ids = generated(model, both, 2, **{CACHE: cache})
        last = whole.logits[:, -1]
        last[:, SILENT] = -torch.inf
        assert torch.equal(ids[:, -2], last.argmax(1))
        assert torch.equal(ids, generated(model, both, 2))


def test_a_loop_of_forwards_with_a_growing_mask() -> None:
    model, given = model_of("llava"), ask("llava", [[1, 5, P, 6, 7, 8]])
    for place in ("post", "llm", "kv"):
        for positions in ("original", "compact"):
            with vt.patched(model, act(place, positions=positions)), torch.no_grad():
                expected = generated(model, given, 4)[:, -4:]
                mask, found = given["attention_mask"], []
                step = model(**given, use_cache=True)
                for _ in range(4):
                    step.logits[:, -1, SILENT] = -torch.inf
                    found.append(step.logits[:, -1:].argmax(-1))
                    mask = torch.cat((mask, mask.new_ones(1, 1)), dim=1)
                    step = model(input_ids=found[-1], attention_mask=mask, **{CACHE: hf_cache.cache_in(step)})
            assert torch.equal(torch.cat(found, dim=1), expected), (place, positions)


def test_a_loop_of_forwards_over_a_padded_batch() -> None:
    model, given = model_of("llava"), ask("llava", MIXED)
    mask = given["attention_mask"]
    with vt.patched(model, act("post", positions="original")), torch.no_grad():
        expected = generated(model, given, 4)[:, -4:]
        found, step = [], model(**given, use_cache=True)
        for _ in range(4):
            step.logits[:, -1, SILENT] = -torch.inf
            found.append(step.logits[:, -1:].argmax(-1))
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            step = model(input_ids=found[-1], attention_mask=mask, **{CACHE: hf_cache.cache_in(step)})
    assert torch.equal(torch.cat(found, dim=1), expected)


# ---- the loss


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl"])
@pytest.mark.parametrize("place", ["post", "llm"])
def test_labels_follow_their_tokens(name: str, place: str) -> None:
    model, given = model_of(name), ask(name, MIXED)
    # Neither pictures nor padding nor first tokens, which padding would have to foresee.
    labels = given["input_ids"].masked_fill((given["input_ids"] == IMAGE) | (given["input_ids"] < 2), -100)
    with vt.patched(model, act(place), trace=True) as red, torch.no_grad():
        out = model(**given, labels=labels)
        plain = model(**given)
        seen = watch(red, given, name)
        total, count = 0.0, 0
        for b, live in enumerate(seen.live[-1]):
            own = labels[b, live]
            logits = plain.logits[b, plain.logits.shape[1] - len(own) :].double()
            for place_, label in enumerate(own.tolist()):
                if place_ and label != -100:
                    total -= float(logits[place_ - 1].log_softmax(-1)[label])
                    count += 1
    assert torch.equal(out.logits, plain.logits)
    assert count > 3
    assert abs(float(out.loss) - total / count) < 1e-5
    with vt.patched(model, act(place)), torch.no_grad():
        as_tuple = model(**given, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_hidden_entries_are_not_seen_by_later_tokens(name: str) -> None:
    """Against the plain model with the columns masked, layer by layer, that the patched run hid."""
    model, given = model_of(name), ask(name, [[1, 5, P, 6, 7, 8]])
    token = torch.tensor([[11]])
    mask = torch.ones(1, given["input_ids"].shape[1] + 1, dtype=torch.long)

    def stepped(cache: Any) -> Tensor:
        return model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits[:, -1]

    with torch.no_grad():
        plain_cache = hf_cache.cache_in(model(**given, use_cache=True))
        with vt.patched(model, "lazy_llm", begin=0.0, final_keep=0.2):
            cache = hf_cache.cache_in(model(**given, use_cache=True))
            sees = {layer: held.sees for layer, held in (hf_cache.layers_of(cache) or {}).items()}
            got = stepped(cache)
        unmasked = stepped(copy.deepcopy(plain_cache))
        hooks = [masking(layer, sees[index]) for index, layer in enumerate(stack_of(model).layers) if index in sees]
        try:
            want = stepped(plain_cache)
        finally:
            for hook in hooks:
                hook.remove()
    assert any(not bool(part.all()) for part in sees.values() if part is not None)
    assert not torch.allclose(got, unmasked, atol=1e-4)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def masking(layer: Any, sees: Tensor | None) -> Any:
    """Makes a layer of the plain model look past the columns that are False in (B, Hkv, E)."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if sees is None:
            return None
        groups = module.self_attn.num_key_value_groups
        seen = torch.nn.functional.pad(sees, (0, 1), value=True).repeat_interleave(groups, 1)[:, :, None]
        return args, {**kwargs, "attention_mask": torch.zeros(seen.shape).masked_fill(~seen, -1e9)}

    return layer.register_forward_pre_hook(before, with_kwargs=True)
