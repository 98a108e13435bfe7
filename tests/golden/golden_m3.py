"""Runs M3's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

import models_llava
import torch
from golden_case import Case

import visiontok as vt


def run_op(case: Case) -> None:
    """op_*: pooling of one crop's features."""
    x = case.need("features")
    side = round(x.shape[1] ** 0.5)
    reducer = vt.reducers.create("m3", scale=case.params["matryoshka_vis_token_scale"])
    state = vt.TokenState.initial(x, prefix=0, depth=1)
    tm = reducer.decide(vt.Signals.of(HIDDEN=x, GRID=(side, side), FRAMES=1), state)
    pooled = x if tm is None else vt.apply(tm, x, state)[0]
    assert pooled.shape[1] == (side // case.params["pool"]) ** 2
    case.check("features", pooled)


def run_model(case: Case) -> None:
    """model_*: a patched LLaVA or LLaVA-NeXT."""
    model = models_llava.build(case)
    calls = models_llava.calls(case, model)
    reducer = vt.reducers.create("m3", scale=case.params["matryoshka_vis_token_scale"])
    vt.patch(model, reducer)
    for suffix, call in calls:
        shown = models_llava.check_run(case, model, suffix, call, reducer)
        if case.has(f"image_features{suffix}"):
            case.check(f"image_features{suffix}", torch.cat(list(shown.features)))
