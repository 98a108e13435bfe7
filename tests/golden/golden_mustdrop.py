"""Runs MustDrop's golden files: the merge of windows, the dual filter, and the patched model with its decoding."""

from __future__ import annotations

from typing import Any
from unittest import mock

import models_llava
import torch
from golden_case import Case
from torch import Tensor

import visiontok as vt
from visiontok.backbones import hf_cache


def run_op(case: Case) -> None:
    """op_merge_*, op_dual_filter_*."""
    if case.given("x") is not None:
        merge(case)
    else:
        dual_filter(case)


def parts(**params: Any) -> tuple[Any, ...]:
    """The parts of a reducer that reproduces the released code."""
    return vt.reducers.create("mustdrop", compat="official", **params).parts()


def merge(case: Case) -> None:
    params, x = case.params, case.need("x")
    first = parts(spatial_threshold=params["threshold"], window=tuple(params["window"]))[0]
    state = vt.TokenState.initial(x, 1, (params["side"], params["side"]), layer=1, depth=24)
    tm = first.decide(vt.Signals.of(HIDDEN=x, GRID=state.grid), state).compacted()
    y, after = vt.apply(tm, x, state)
    case.check("y", y)
    case.check("size", torch.ones_like(y[..., :1]) if after.size is None else after.size, exact=True)
    source = torch.nn.functional.one_hot(tm.assign, tm.K).transpose(1, 2)
    case.check("source", source, exact=True)
    height, width = params["window"]
    case.check("merged_windows", torch.tensor((x.shape[1] - tm.K) // (height * width - 1)))


def dual_filter(case: Case) -> None:
    params, attention = case.params, case.need("attention")
    first, count = params["v_token_start"], params["img_seq"]
    rows = attention[:, :, first + count :, first : first + count]
    case.check("text_len", torch.tensor(rows.shape[2]))
    reducer: Any = vt.reducers.create(
        "mustdrop", compat="official", global_thr=params["global_thr"], individual_thr=params["individual_thr"]
    )
    state = vt.TokenState.initial(torch.zeros(len(rows), count, 1), prefix=0, layer=3, depth=32)
    tm = reducer.decide(vt.Signals.of(ATTN_TEXT=rows), state)
    case.check("kept_visual_indices", tm.kept[0, : int(tm.counts[0])])


def run_model(case: Case) -> None:
    """model_*: the patched LLaVA, from the tower to six greedy steps."""
    params, model = case.params, models_llava.build(case)
    ((suffix, call),) = models_llava.calls(case, model)
    seen = models_llava.embedded(model)
    blocks, tower = model.model.vision_tower.encoder.layers, []
    hooks = [block.register_forward_pre_hook(lambda _, given: tower.append(given[0])) for block in blocks]
    with torch.no_grad():
        model.get_image_features(pixel_values=call["pixel_values"])
        case.check("hidden_after_layer0", tower[1])
    tower.clear()
    red = vt.patch(
        model, "mustdrop", compat="official", global_thr=params["global_thr"], individual_thr=params["individual_thr"],
        spatial_threshold=params["spatial_threshold"], window=tuple(params["window"]), keep_rate=params["keep_rate"],
        pruning_layers=tuple(params["pruning_layers"]), trace=True,
    )  # fmt: skip
    final: list[Tensor] = []
    keys: list[Tensor] = []
    model.model.language_model.norm.register_forward_hook(lambda *run: final.append(run[-1]))
    part: Any = type(red.reducers[0].parts()[1])
    decide = part.decide

    def spy(self: Any, signals: Any, state: Any, budget: int | None = None) -> Any:
        tm = decide(self, signals, state, budget)
        keys.append(tm.carry["mustdrop.key"][0])
        return tm

    length = call["input_ids"].shape[1]
    with torch.no_grad(), mock.patch.object(part, "decide", spy):
        out = model(**call, use_cache=True)
    for hook in hooks:
        hook.remove()
    case.check("hidden_after_merge", tower[1])
    case.check("vision_features", tower[-1][:, 1:])
    case.check("inputs_embeds", seen[-1][0])
    case.check("image_features", image_rows(case, seen[-1][0]).unsqueeze(0))
    case.check("last_hidden", final[0][0])
    steps = {(str(step.site), step.layer): step for step in red.trace}
    tm = steps["PRE", 1].map
    case.check("merge_source", torch.nn.functional.one_hot(tm.assign, tm.K).transpose(1, 2), exact=True)
    case.check("merge_size", torch.nn.functional.one_hot(tm.assign, tm.K).sum(dim=1).unsqueeze(-1), exact=True)
    # Officially by falling attention; the set is what counts.
    assert torch.equal(keys[0].nonzero().squeeze(1), case.tensors["out.key_set"][0].sort().values), "key_set differs"
    case.compared.add("out.key_set")
    filters(case, steps, keys[0])
    cache = hf_cache.cache_in(out)
    lens = [cache.get_seq_length(layer) for layer in range(len(cache.layers))]
    case.check("cache_lens_after_prefill", torch.tensor(lens))
    with torch.no_grad():
        made = model.generate(
            **call, max_new_tokens=len(case.tensors["out.greedy_tokens"]), do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    case.check("greedy_tokens", made.sequences[0, length:])
    models_llava.close(case, "scores", torch.cat(made.scores), 2e-3)


def first_column(case: Case) -> int:
    """Where the image stands in the prompt."""
    return int((case.need("prompt") == models_llava.placeholder(case)).nonzero()[0])


def image_rows(case: Case, embeds: Tensor) -> Tensor:
    """Of the prompt's embeddings, those of its one image."""
    first = first_column(case)
    return embeds[first : first + len(embeds) - len(case.need("prompt")) + 1]


def filters(case: Case, steps: dict[Any, Any], key: Tensor) -> None:
    """What each filter kept; the files have it before the union with the key set."""
    for j, layer in enumerate(case.params["pruning_layers"]):
        step = steps["LLM", layer + 1]
        case.check(f"dual_filter_n_{j}", torch.tensor(step.before[0]))
        kept = step.kept[0] - first_column(case)
        want = case.tensors[f"out.dual_filter_kept_{j}"]
        assert torch.equal(torch.cat((want, key.nonzero().squeeze(1))).unique(), kept), f"filter {j} differs"
        case.compared.add(f"out.dual_filter_kept_{j}")
        key = key[kept]
