"""Runs VTC-CLS's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

from typing import Any

import models_llava
import torch
from golden_case import Case

import visiontok as vt


def create(case: Case) -> Any:
    return vt.reducers.create("vtc_cls", token_num=case.params["token_num"], start_layer=case.params["start_layer"])


def run_op(case: Case) -> None:
    """Attention rows of every layer, and the features to choose from."""
    reducer, attention, x = create(case), case.need("cls_attention_rows"), case.need("features")
    depth = attention.shape[1]
    x = torch.cat((torch.zeros_like(x[:, :1]), x), dim=1)
    state = vt.TokenState.initial(x, layer=depth, depth=depth)
    tapped = attention[:, list(reducer.taps(depth))].unsqueeze(3)
    signals = vt.Signals.of(ATTN_PREFIX=tapped)
    tm = reducer.decide(signals, state)
    case.check("scores", reducer.scores(signals, state))
    case.check("kept_indices", tm.kept - 1)
    case.check("features", vt.apply(tm, x, state)[0])


def run_model(case: Case) -> None:
    """A patched LLaVA; features, scores and choices of its images, then logits and greedy tokens of each prompt."""
    model = models_llava.build(case)
    calls = models_llava.calls(case, model)
    reducer = create(case)
    vt.patch(model, reducer)
    features, scores, kept = [], [], []
    for suffix, call in calls:
        shown = models_llava.check_run(case, model, suffix, call, reducer)
        features += shown.features
        scores.append(shown.asked[0].reducer.scores(shown.asked[0].signals, shown.asked[0].state))
        kept.append(shown.asked[0].map.kept - 1)
    case.check("image_features", torch.stack(features))
    case.check("cls_scores", torch.cat(scores))
    case.check("kept_indices", torch.cat(kept))
