"""Runs ToMe's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_case import Case
from golden_models import build, check_layers, watch
from torch import Tensor

import visiontok as vt
from visiontok.core.schedule import parse_r
from visiontok.core.state import Moved
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching


def run_op(case: Case) -> None:
    """op_*: a table of schedules, the k-th variant, or one bipartite step."""
    if "table" in case.params:
        schedules(case)
    elif "k" in case.params:
        kth(case)
    else:
        bipartite(case)


def schedules(case: Case) -> None:
    table = case.params["table"]
    for row in table:
        r = tuple(row["r"]) if row["kind"] == "tuple" else row["r"]
        points = row["L"]
        if row["kind"] == "list" and len(r) > points:
            assert parse_r(r, points, compat="official") == row["out"], row
            with pytest.raises(ParameterError, match=f"{len(r)} entries but the model has {points} points"):
                parse_r(r, points)
            continue
        assert parse_r(r, points) == row["out"], row
    case.check("n", torch.tensor([len(table)]))


def kth(case: Case) -> None:
    k, metric, x = case.params["k"], case.need("metric"), case.need("x")
    reducer = vt.reducers.create("tome_kth", k=k, compat="official")
    length = x.shape[1]
    state = vt.TokenState.initial(x, prefix=0)
    tm = reducer.decide(vt.Signals.of(KEY=metric.unsqueeze(1)), state)
    match = matching.every_kth(metric, k, drop_tail=True)
    assert torch.equal(tm.kept, match.order)
    assert torch.equal(match.order[0], torch.arange(k - 1, length // k * k, k))
    case.check("dst_idx", match.dst // k)
    check_merges(case, tm, x, state, whole=length // k * k)


def bipartite(case: Case) -> None:
    params, metric, x = case.params, case.need("metric"), case.need("x")
    prefix = int(params["class_token"]) + int(params["distill_token"])
    length = x.shape[1]
    reducer = vt.reducers.create("tome", r=params["r"])
    origin = case.given("source")
    places = x if origin is None else x.new_zeros(len(x), origin.shape[2], 1)
    state = vt.TokenState.initial(places, prefix=prefix)
    if origin is not None:
        state = state.changed(n=length, trail=(Moved(origin.argmax(dim=1)),))
    state = state.changed(size=case.given("size"))
    effective = max(min(params["r"], (length - prefix) // 2), 0)
    assert effective == params["effective_r"]
    tm = reducer.decide(vt.Signals.of(KEY=metric.unsqueeze(1)), state)
    # The reducer says None for identity; the golden then has no indices.
    assert (tm is None) == (effective == 0)
    tm = vt.TokenMap.identity(x) if tm is None else tm
    if case.has("src_idx"):
        match = matching.even_odd(metric, params["r"], prefix)
        check_indices(case, "", match, tm, length, prefix)
    check_merges(case, tm, x, state)


def check_indices(case: Case, where: str, match: matching.Match, tm: TokenMap, length: int, prefix: int) -> None:
    """Compares a match with indices into the even (A) and odd (B) positions, and the map with the match."""
    case.check(f"{where}src_idx", match.src // 2)
    case.check(f"{where}dst_idx", match.dst // 2)
    assert bool((match.src % 2 == 0).all())
    assert bool((match.dst % 2 == 1).all())
    into_b = (length - prefix) // 2 if prefix % 2 == 0 else (length - prefix + 1) // 2
    staying, odd = match.order[:, : match.order.shape[1] - into_b], match.order[:, match.order.shape[1] - into_b :]
    assert bool((staying % 2 == 0).all())
    assert bool((odd[:, 1:] - odd[:, :-1] == 2).all())
    # The class token is A's first, so the golden counts it among the unmerged.
    lead = torch.zeros(len(staying), int(prefix > 0), dtype=torch.int64)
    case.check(f"{where}unm_idx", torch.cat((lead, staying // 2), dim=1))
    assert torch.equal(tm.assign, TokenMap.merge(match.src, match.dst, match.order, prefix).assign)


def check_merges(case: Case, tm: TokenMap, x: Tensor, state: Any, whole: int | None = None) -> None:
    """Compares every merge mode, the weighted average, the sizes, the source matrix and the unmerge."""
    unweighted = x.new_ones(x.shape[:2])
    for mode in ("sum", "mean", "amax"):
        case.check(f"merge_{mode}", TokenMap(tm.assign, tm.K, weight=unweighted, mode=mode).reduce(x))
    reduced, after = vt.apply(tm, x, state)
    case.check("wavg_x", reduced)
    size = torch.ones(*reduced.shape[:2], 1) if after.size is None else after.size
    case.check("wavg_size", size, exact=True)
    if case.has("source"):
        case.check("source", one_hot(after.origin, tm.K))
        source = case.given("source")
        source = torch.eye(x.shape[1]).expand(len(x), -1, -1) if source is None else source
        case.check("source", TokenMap(tm.assign, tm.K, mode="amax").reduce(source))
    if case.has("unmerge_of_wavg_x"):
        case.check("unmerge_of_wavg_x", tm.restore(reduced)[:, :whole])


def one_hot(origin: Tensor, slots: int) -> Tensor:
    """(B, K, N0) 0/1: which current token holds which original one."""
    return (origin.unsqueeze(1) == torch.arange(slots).view(1, -1, 1)).float()


def run_model(case: Case) -> None:
    """model_*: a patched timm ViT, layer by layer."""
    params, x = case.params, case.need("x")
    r = tuple(params["r"]) if params.get("r_kind") == "tuple" else params["r"]
    assert parse_r(r, params["depth"]) == params["parsed_r"]
    model = build(case)
    with torch.no_grad():
        case.check("baseline_logits", model(x))
    red = vt.patch(model, "tome", r=r, prop_attn=params["prop_attn"], trace=True)
    prefix = 2 if params.get("distilled") else 1
    run = watch(red, model, x, lambda _, signals: signals.KEY.mean(dim=1))
    case.check("logits", run.output)
    check_layers(case, run)
    assert red.tokens == red.plan.tokens == params["tokens_per_layer"]
    for layer, tm in run.maps.items():
        metric = run.metric[layer]
        match = matching.even_odd(metric, params["parsed_r"][layer], prefix)
        check_indices(case, f"layer{layer}.", match, tm, metric.shape[1], prefix)
    vt.unpatch(model)
    with torch.no_grad():
        case.check("baseline_logits", model(x))
