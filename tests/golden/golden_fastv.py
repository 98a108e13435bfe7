"""Runs FastV's golden files: the ranking from an attention map, and the patched model with its decoding."""

from __future__ import annotations

from typing import Any

import models_llava
import torch
from golden_case import Case

import visiontok as vt
from visiontok.backbones import hf_cache


def run_op(case: Case) -> None:
    """op_*: kept places of the sequence from the attention of the layer before."""
    params, attention = case.params, case.need("attention")
    first, count = params["image_token_start_index"], params["image_token_length"]
    last = attention[:, :, -1, first : first + count]
    case.check("visual_scores", last.mean(dim=1)[0])
    reducer: Any = vt.reducers.create("fastv", k=2, ratio=params["fastv_r"])
    state = vt.TokenState.initial(
        torch.zeros(len(attention), count, 1, dtype=attention.dtype), prefix=0, layer=2, depth=4
    )
    tm = reducer.decide(vt.Signals.of(ATTN_LAST=last), state)
    kept = torch.arange(count) if tm is None else tm.kept[0]
    case.check("keep_indices", places(kept, first, count, attention.shape[-1]))


def places(kept: torch.Tensor, first: int, count: int, length: int) -> torch.Tensor:
    """Places in the sequence: text, the kept visual tokens, text."""
    return torch.cat((torch.arange(first), kept + first, torch.arange(first + count, length)))


def run_model(case: Case) -> None:
    """model_*: the patched LLaVA."""
    params, model = case.params, models_llava.build(case)
    ((suffix, call),) = models_llava.calls(case, model)
    case.check("visual_scores", scores(case, model, call))
    red: Any = vt.patch(model, "fastv", k=params["fastv_k"], ratio=params["fastv_r"], trace=True)
    with torch.no_grad():
        out = model(**call, use_cache=True)
    first, count = params["image_token_start_index"], params["image_token_length"]
    (step,) = red.trace
    length = call["input_ids"].shape[1]
    case.check("keep_indices", places(step.kept[0] - first, first, count, length))
    models_llava.close(case, f"logits{suffix}", out.logits[0], 2e-3)
    cache = hf_cache.cache_in(out)
    lens = [cache.get_seq_length(layer) for layer in range(len(cache.layers))]
    case.check("cache_lens_after_prefill", torch.tensor(lens))
    with torch.no_grad():
        made = model.generate(
            **call, max_new_tokens=len(case.tensors["out.greedy_tokens"]), do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    case.check("greedy_tokens", made.sequences[0, length:])
    models_llava.close(case, "generate_scores", torch.cat(made.scores), 2e-3)


def scores(case: Case, model: Any, call: dict[str, Any]) -> torch.Tensor:
    """(n,) head mean of the last token's attention, in the unpatched model."""
    params = case.params
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**call, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    first = params["image_token_start_index"]
    return maps[params["fastv_k"] - 1][0, :, -1, first : first + params["image_token_length"]].mean(dim=0)
