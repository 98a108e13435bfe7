"""transformers' tiny LLaVA and LLaVA-NeXT from golden parameters and weights, and how their files are run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from golden_case import Case
from torch import Tensor


class Asked(NamedTuple):
    """One call of a reducer's `decide`."""

    reducer: Any
    signals: Any
    state: Any
    map: Any


class Shown(NamedTuple):
    """What one prompt did.

    Attributes:
        embeds: (T', D) input of the first decoder layer.
        features: (n, D) the part of it that belongs to each image.
        asked: The decisions.
    """

    embeds: Tensor
    features: list[Tensor]
    asked: list[Asked]


def build(case: Case) -> Any:
    """The model that `params.config` describes, with the weights of the file, in their dtype."""
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llava import configuration_llava, modeling_llava
    from transformers.models.llava_next import configuration_llava_next, modeling_llava_next

    given = case.params["config"]
    text = dict(given["text"])
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    shared: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**given["vision"]),
        "text_config": LlamaConfig(**text, rope_parameters=rope),
        "projector_hidden_act": given["projector_hidden_act"],
        "image_token_index": given["image_token_index"],
        "vision_feature_layer": given["vision_feature_layer"],
        "vision_feature_select_strategy": given["vision_feature_select_strategy"],
    }
    if given["next"]:
        config = configuration_llava_next.LlavaNextConfig(**shared, image_grid_pinpoints=given["image_grid_pinpoints"])
        model: Any = modeling_llava_next.LlavaNextForConditionalGeneration(config)
    else:
        model = modeling_llava.LlavaForConditionalGeneration(configuration_llava.LlavaConfig(**shared))
    weights = case.weights()
    model.to(weights["lm_head.weight"].dtype).load_state_dict(weights, strict=True)
    # The files continue past the end-of-sequence token.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = text["pad_token_id"]
    return model.eval()


def placeholder(case: Case) -> int:
    """Id of the token that stands for an image."""
    return case.params["config"]["image_token_index"]


def prompts(case: Case) -> list[tuple[str, Tensor]]:
    """(suffix, (T,) ids) of every prompt: one placeholder per image; suffixes are `` or `_0`, `_1`, ..."""
    names = sorted(name for name in case.tensors if name.startswith("in.prompt"))
    return [(name.removeprefix("in.prompt"), case.tensors[name]) for name in names]


def sizes(case: Case) -> Tensor | None:
    """(images, 2) original (H, W) of each image, for LLaVA-NeXT."""
    return case.given("image_sizes_hw")


def expand(case: Case, ids: Tensor, counts: list[int]) -> Tensor:
    """(1, T') the ids with placeholder j repeated `counts[j]` times, as transformers' processors do."""
    token, left = placeholder(case), iter(counts)
    parts = [torch.full((next(left),), token) if int(i) == token else i.reshape(1) for i in ids]
    return torch.cat(parts).unsqueeze(0)


def features(model: Any, images: dict[str, Tensor]) -> list[Tensor]:
    """(n, D) projected features of each image, as the unpatched model feeds them to its language model."""
    with torch.no_grad():
        return list(model.get_image_features(**images).pooler_output)


def calls(case: Case, model: Any) -> list[tuple[str, dict[str, Any]]]:
    """(suffix, keyword arguments of `forward` and `generate`) of every prompt; images go to prompts in their order.

    Prompts are expanded to the full number of features of the unpatched model, so call this before patching.
    """
    pixels, shapes, made, first = case.need("pixel_values"), sizes(case), [], 0
    for suffix, ids in prompts(case):
        count = int((ids == placeholder(case)).sum())
        images = {"pixel_values": pixels[first : first + count]}
        if shapes is not None:
            images["image_sizes"] = shapes[first : first + count]
        first += count
        ids = expand(case, ids, [len(one) for one in features(model, images)])
        made.append((suffix, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}))
    assert first == len(pixels), f"{first} placeholders, {len(pixels)} images"
    return made


def embedded(model: Any) -> list[Tensor]:
    """A list that gets the (B, T, D) input of the first decoder layer at every forward from now on."""
    seen: list[Tensor] = []

    def note(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((given[0] if given else named["hidden_states"]).detach())

    model.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    return seen


def greedy(model: Any, call: dict[str, Any], steps: int) -> Tensor:
    """(steps,) greedy continuation."""
    with torch.no_grad():
        out = model.generate(**call, max_new_tokens=steps, do_sample=False)
    assert torch.equal(out[:, : call["input_ids"].shape[1]], call["input_ids"]), "generate must begin with the prompt"
    return out[0, call["input_ids"].shape[1] :]


@contextlib.contextmanager
def decisions(reducer: type) -> Iterator[list[Asked]]:
    """A list that gets every decision of a class of reducers."""
    made: list[Asked] = []
    decide: Any = reducer.decide  # type: ignore[attr-defined]

    def note(self: Any, signals: Any, state: Any, budget: Any = None) -> Any:
        made.append(Asked(self, signals, state, decide(self, signals, state, budget)))
        return made[-1].map

    with mock.patch.object(reducer, "decide", note):
        yield made


def image_features(case: Case, ids: Tensor, embeds: Tensor) -> list[Tensor]:
    """The rows of embeds (T', D) that belong to each image of a prompt with one placeholder each, all equally many."""
    places = (ids == placeholder(case)).nonzero().squeeze(1).tolist()
    count, rest = divmod(len(embeds) - len(ids) + len(places), len(places))
    assert rest == 0, "the images of a prompt kept different numbers of tokens"
    # Every earlier image stands for `count` tokens instead of one.
    return [embeds[start : start + count] for start in (place + i * (count - 1) for i, place in enumerate(places))]


def check_run(case: Case, model: Any, suffix: str, call: dict[str, Any], reducer: Any) -> Shown:
    """Compares embeddings, logits and greedy tokens of one prompt, those that the file has.

    Args:
        case: The file.
        model: Patched.
        suffix: Of the prompt's tensors.
        call: From `calls`.
        reducer: Whose decisions are noted.
    """
    seen = embedded(model)
    with torch.no_grad(), decisions(type(reducer)) as asked:
        logits = model(**call).logits
    embeds = seen[0][0]
    if case.has(f"inputs_embeds{suffix}"):
        case.check(f"inputs_embeds{suffix}", embeds)
    if case.has(f"logits{suffix}"):
        # Official runs were made with another release of transformers; the golden README allows 2e-3.
        close(case, f"logits{suffix}", logits[0], 2e-3)
    if case.has(f"greedy_tokens{suffix}"):
        want = case.tensors[f"out.greedy_tokens{suffix}"]
        case.check(f"greedy_tokens{suffix}", greedy(model, call, len(want)))
    return Shown(embeds, image_features(case, case.need(f"prompt{suffix}"), embeds), list(asked))


def close(case: Case, name: str, got: Tensor, atol: float) -> None:
    """`case.check` with another tolerance for fp32."""
    kept, case.atol32 = case.atol32, atol
    try:
        case.check(name, got)
    finally:
        case.atol32 = kept
