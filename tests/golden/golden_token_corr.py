"""Runs the files of token_corr, which pin visiontok's own definition; names as in the golden README."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from golden_case import Case

import visiontok as vt
from visiontok.core.visual import Crops


def run_op(case: Case) -> None:
    """op_*: one sub-image."""
    x, params = case.need("x").unsqueeze(0), case.params
    keys = torch.stack([case.need("k_low"), case.need("k_deep")])
    queries = torch.stack([case.need("q_cls_low"), case.need("q_cls_deep")])
    assert params["sampling"].startswith("topk")
    reducer: Any = vt.reducers.create(
        "token_corr", tau=params["tau"], min_repeats=params["min_repeats"], aggregate=params["aggregate"], low_layer=0,
        deep_layer=1,
    )  # fmt: skip
    # The class token's own key and features are not in the file, and nothing may depend on them.
    signals = vt.Signals.of(
        KEY=F.pad(keys, (0, 0, 1, 0), value=9.0)[None, :, None],
        QUERY_PREFIX=queries[None, :, None, None] * keys.shape[-1] ** -0.5,
        CROPS=Crops(0, 0, (1, x.shape[1]), (1, x.shape[1])),
    )
    state = vt.TokenState.initial(F.pad(x, (0, 0, 1, 0), value=7.0), prefix=1, depth=2)
    live = torch.ones(x.shape[:2], dtype=torch.bool)
    cosine = reducer.similarity(signals, state)
    repeats = reducer.repeats(cosine, live)
    case.check("redundant_count", repeats[0])
    redundant = repeats[0] >= params["min_repeats"]
    case.check("redundant", redundant)
    case.check("density", 1 - redundant.double().mean())
    for name, layer in (("p_low", 0), ("p_deep", 1)):
        case.check(name, reducer.attention(signals, state, layer, live)[0])
    local, wide, _ = reducer.chosen(signals, state, cosine, live)
    case.check("n_local", local.sum())
    case.check("local_indices", local[0].nonzero().squeeze(1))
    case.check("global_indices", wide[0].nonzero().squeeze(1))
    tm = reducer.decide(signals, state)
    count = int(tm.counts[0])
    case.check("kept_indices", tm.kept[0, :count] - 1)
    reduced, _ = vt.apply(tm, F.pad(x, (0, 0, 1, 0), value=7.0), state)
    case.check("features", reduced[0, :count])
