"""Runs VisionZip's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

from typing import Any

import models_llava
import torch
from golden_case import Case
from torch import Tensor

import visiontok as vt
from visiontok.ops.ordering import stable_order


def create(case: Case) -> Any:
    params = case.params
    assert params["dominant_num"] == params["dominant_arg"] - 1
    return vt.reducers.create("visionzip", dominant=params["dominant_arg"], contextual=params["contextual_num"])


def by_score(score: Tensor, count: int) -> Tensor:
    """(R, 1 + count) the class token, then patches by falling score."""
    best = stable_order(score, descending=True)[:, :count] + 1
    return torch.cat((torch.zeros_like(best[:, :1]), best), dim=1)


def run_op(case: Case) -> None:
    """Class attention rows and keys of one layer, and the hidden states to choose from."""
    reducer, x, params = create(case), case.need("hidden_states"), case.params
    state = vt.TokenState.initial(x, layer=24, depth=24)
    signals = vt.Signals.of(
        ATTN_PREFIX=case.need("cls_attention_rows").unsqueeze(1).unsqueeze(3),
        # The metric is the mean over heads: one head has it already.
        KEY=case.need("metric").unsqueeze(1).unsqueeze(1),
    )
    tm = reducer.decide(signals, state)
    case.check("all_indices_unsorted", by_score(reducer.scores(signals, state), params["dominant_num"]))
    case.check("dominant_indices_sorted", tm.kept[:, : params["dominant_arg"]])
    case.check("tokens", vt.apply(tm, x, state)[0])


def run_model(case: Case) -> None:
    """A patched LLaVA with 24 layers in its tower; one image per prompt."""
    model = models_llava.build(case)
    calls = models_llava.calls(case, model)
    reducer = create(case)
    vt.patch(model, reducer)
    chosen, tokens, features = [], [], []
    for suffix, call in calls:
        shown = models_llava.check_run(case, model, suffix, call, reducer)
        (asked,) = shown.asked
        score = asked.reducer.scores(asked.signals, asked.state)
        best = by_score(score, case.params["dominant_num"])
        assert torch.equal(best.sort(dim=1).values, asked.map.kept[:, : case.params["dominant_arg"]])
        chosen.append(best)
        tokens.append(vt.apply(asked.map, asked.signals.HIDDEN, asked.state)[0])
        features += shown.features
    case.check("all_indices_unsorted", torch.cat(chosen))
    case.check("vision_tokens", torch.cat(tokens))
    case.check("image_features", torch.stack(features))
