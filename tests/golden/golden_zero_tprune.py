"""Runs Zero-TPrune's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import torch
from golden_case import Case
from golden_evit import blocks_of, build_plain
from torch import Tensor

import visiontok as vt
from visiontok.ops.attention import Votes


def run_op(case: Case) -> None:
    """op_*: one pruning layer, step by step and as a whole; op_wpr_iterations*: the votes alone."""
    if case.given("key") is None:
        iterations(case)
        return
    params, attention, key = case.params, case.need("attn"), case.need("key")
    batch, length = attention.shape[0], attention.shape[-1]
    fields = fields_of(params)
    schedule = {1: (params["retention"], params["iters"], params["r"])}
    reducer: Any = vt.reducers.create("zero_tprune", schedule=schedule, **fields)
    votes = Votes.of(attention)
    first, live, second = stages(reducer, votes, key, params["iters"], params["r"])
    case.check("imp_pre", first.score)
    group_a, best = reducer.similarity(key, first.score, 1)
    case.check("groupA", group_a)
    case.check("best_sim", best)
    case.check("kept_s", rows(live))
    case.check("imp", second.score.gather(1, rows(live)))
    case.check("var", second.variance)
    case.check("head_ok", second.used)
    state = vt.TokenState.initial(attention.new_zeros(batch, length, 4), prefix=1, layer=1, depth=4)
    tm = reducer.decide(vt.Signals.of(ATTN_VOTE=Votes.of(attention), KEY=key), state)
    case.check("kept", torch.arange(length).expand(batch, -1) if tm is None else tm.kept)


def fields_of(params: dict[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in ("boost", "feat", "v_min", "v_max") if name in params}


def iterations(case: Case) -> None:
    """Importance, or each head's signal, after as many votes as the last number in a tensor's name says."""
    attention = case.need("attn")
    live = torch.ones(len(attention), attention.shape[-1], dtype=attention.dtype)
    for name in [name.removeprefix("out.") for name in case.tensors if name.startswith("out.")]:
        want, turns = case.tensors[f"out.{name}"], int(re.findall(r"\d+", name)[-1])
        fields = fields_of(case.params) | ({"boost": False} if "uni" in name else {})
        reducer: Any = vt.reducers.create("zero_tprune", **fields)
        found = reducer.importance(Votes.of(attention), live, live.shape[1], 1, turns)
        if want.dim() == 3:
            # A signal is not negative: of one head alone it is the importance.
            heads = attention.flatten(0, 1).unsqueeze(1)
            lone = live.repeat_interleave(attention.shape[1], 0)
            case.check(name, reducer.importance(Votes.of(heads), lone, live.shape[1], 1, turns).score.view_as(want))
        elif want.shape == live.shape:
            case.check(name, found.score)
        else:
            case.check(name, found.variance if want.is_floating_point() else found.used)


def stages(reducer: Any, votes: Votes, key: Tensor, turns: int, r: int) -> tuple[Any, Tensor, Any]:
    """Importance of all tokens, who is live after the S-stage, importance of those."""
    batch, _, length = votes.shape
    live = torch.ones(batch, length, dtype=votes.dtype)
    first = reducer.importance(votes, live, length, 1)
    r = min(r, (length - 1) // 2)
    live = live.scatter(1, reducer.redundant(key, first.score, r, 1), 0.0)
    return first, live, reducer.importance(votes, live, length - r, 1, turns)


def rows(live: Tensor) -> Tensor:
    """(B, K) the live tokens of each sample, ascending."""
    return torch.stack([row.nonzero().squeeze(1) for row in live])


def run_model(case: Case) -> None:
    """model_*: a patched timm ViT; the golden numbers the block whose attention is used, we the layer after it."""
    model, x = build_plain(case), case.need("image")
    schedule = {int(block) + 1: tuple(row) for block, row in case.params["schedule"].items()}
    with torch.no_grad():
        case.check("logits_unreduced", model(x))
    red = vt.patch(model, "zero_tprune", schedule=schedule, trace=True, **fields_of(case.params))
    cls: Any = type(red.reducers[0])
    decide, importance = cls.decide, {}

    def spy(self: Any, signals: Any, state: Any, budget: int | None = None) -> Any:
        _, turns, r = schedule[state.layer]
        _, live, found = stages(self, signals.ATTN_VOTE, signals.KEY, turns, r)
        importance[state.layer] = found.score.gather(1, rows(live))
        return decide(self, signals, state, budget)

    # Also where nothing leaves, for the importance.
    asked = mock.patch.object(cls, "always", True)
    with torch.no_grad(), asked, mock.patch.object(cls, "decide", spy), blocks_of(model) as after:
        case.check("logits", model(x))
    assert [y.shape[1] for y in after] == case.params["lens"] == red.tokens
    for block, y in enumerate(after):
        case.check(f"tokens_after_block{block}", y)
    steps = {step.layer: step for step in red.trace}
    source = torch.arange(red.plan.length).expand(len(x), -1)
    for layer in sorted(schedule):
        step = steps.get(layer)
        kept = torch.arange(source.shape[1]).expand_as(source) if step is None else step.map.kept
        source = source if step is None else rows(step.origin >= 0)
        case.check(f"kept{layer - 1}", kept)
        case.check(f"source{layer - 1}", source)
    for layer, score in importance.items():
        case.check(f"imp{layer - 1}", score)
