"""Runs PiToMe's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

import math
from typing import Any

import models_blip2
import models_clip_hf
import models_open_clip
import torch
from golden_case import Case
from golden_models import build, check_layers, fields, watch
from golden_tome import check_indices, one_hot
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal
from visiontok.core.tokens import TokenMap
from visiontok.ops import matching
from visiontok.reducers.pitome import PiToMe

ATOL32 = 3e-4

# Names of the released patches in the golden files, and of the presets that follow them.
PRESETS = {name: name for name in ("deit", "mae", "clip", "blip", "blip2")} | {"aug": "augreg", "clip_hf": "llava"}
# Patches of models that visiontok does not reduce (text encoders).
NO_PRESET = {"bert"}


def run_op(case: Case) -> None:
    """op_*: a table of counts and margins, or one merge."""
    if "r_table" in case.params:
        tables(case)
    else:
        merge(case)


def tables(case: Case) -> None:
    rows = case.params["r_table"]
    for length, ratio, removed in rows:
        assert Budget(ratio=ratio).removed(length) == removed == math.floor(length - length * ratio)
    seen = set()
    for key, margins in case.params["margins"].items():
        patch, _, depth = key.rpartition("_L")
        if patch in NO_PRESET:
            continue
        seen.add(patch)
        reducer = PiToMe(preset=PRESETS[patch])
        # The layer of a point before a block counts the blocks already run.
        first = reducer.layers(int(depth)).start
        got = [reducer.margin_at(Where(first + i, int(depth))) for i in range(int(depth))]
        assert got == margins, key
    assert seen == set(PRESETS)
    case.check("n", torch.tensor([len(rows)]))


def merge(case: Case) -> None:
    params, metric, x = case.params, case.need("metric"), case.need("x")
    prefix, kind = int(params["class_token"]), params["kind"]
    reducer = PiToMe(ratio=params["ratio"], kind=kind, margin=params["margin"], alpha=params["alpha"])
    where = Where(0, 1)
    state = vt.TokenState.initial(x, prefix=prefix, depth=1).changed(size=case.given("size"))
    removed = reducer.removed(state.items, Budget(ratio=params["ratio"]), where, prefix)
    assert removed == params["removed"]
    tm = reducer.decide(vt.Signals.of(KEY=metric.unsqueeze(1)), state)
    assert tm is not None
    match = reducer.match(metric, removed, where, prefix)
    assert torch.equal(tm.assign, TokenMap.merge(match.src, match.dst, match.order, prefix).assign)
    if kind == "bsm":
        check_indices(case, "", match, tm, x.shape[1], prefix)
    else:
        golden = {name.removeprefix("out."): t.long() for name, t in case.tensors.items() if name.endswith("_idx")}
        check_split(case, "", reducer, metric, where, prefix, removed)
        check_positions(case, "", match, golden, prefix)
    check_merges(case, tm, match, x, state)


def check_split(case: Case, at: str, reducer: PiToMe, metric: Tensor, where: Where, prefix: int, removed: int) -> None:
    """Compares the energies and the sets that they decide."""
    rows = matching.unit(metric[:, prefix:])
    energy = reducer.energy(rows, where)
    if case.has(f"{at}energy"):
        case.check(f"{at}energy", energy)
    ranked = energy.argsort(dim=-1, descending=True, stable=True)
    kind = reducer.kind_at(where)
    movable = ranked if kind == "bsm_pitome" else ranked[:, : 2 * removed]
    a, b = matching.halves(movable) if kind == "text" else matching.alternate(movable)
    case.check(f"{at}a_idx", a)
    case.check(f"{at}b_idx", b)
    if kind != "bsm_pitome":
        case.check(f"{at}protected_idx", ranked[:, 2 * removed :])


def check_positions(case: Case, at: str, match: matching.Match, golden: dict[str, Tensor], prefix: int) -> None:
    """Compares a match with what the golden index lists say together."""
    a, b = golden["a_idx"], golden["b_idx"]
    if "src_idx" in golden:
        src, stay = a.gather(1, golden["src_idx"]), a.gather(1, golden["unm_idx"])
    else:
        src, stay = a, golden["protected_idx"]
    dst = b.gather(1, golden["dst_idx"])
    want = matching.Match(src, dst, torch.cat((stay, b), dim=1))
    for name, got, expected in zip(match._fields, match, want):
        assert torch.equal(got, expected + prefix), f"{case.id} {at}{name}"
    inverse = torch.zeros(len(b), int(b.max()) + 1 if b.numel() else 1, dtype=torch.int64)
    inverse.scatter_(1, b, torch.arange(b.shape[1]).expand_as(b))
    case.check(f"{at}dst_idx", inverse.gather(1, match.dst - prefix))
    if "src_idx" in golden:
        inverse = torch.zeros(len(a), a.shape[1] + b.shape[1], dtype=torch.int64)
        inverse.scatter_(1, a, torch.arange(a.shape[1]).expand_as(a))
        case.check(f"{at}src_idx", inverse.gather(1, match.src - prefix))
        unmerged = match.order[:, : golden["unm_idx"].shape[1]]
        case.check(f"{at}unm_idx", inverse.gather(1, unmerged - prefix))


def check_merges(case: Case, tm: TokenMap, match: matching.Match, x: Tensor, state: Any) -> None:
    unweighted = x.new_ones(x.shape[:2])
    for mode in ("sum", "mean", "amax"):
        case.check(f"merge_{mode}", TokenMap(tm.assign, tm.K, weight=unweighted, mode=mode).reduce(x))
    if case.has("merge_prune"):
        kept = unweighted.scatter(1, match.src, 0.0)
        case.check("merge_prune", TokenMap(tm.assign, tm.K, weight=kept).reduce(x))
    mask = case.given("attention_mask")
    if mask is not None:
        state = state.changed(carry={"mask": mask > 0}, carry_rules={"mask": "any"})
    reduced, after = vt.apply(tm, x, state)
    case.check("wavg_x", reduced)
    case.check("wavg_size", torch.ones(*reduced.shape[:2], 1) if after.size is None else after.size, exact=True)
    case.check("source", one_hot(after.origin, tm.K))
    if mask is not None:
        case.check("attention_mask", after.carry["mask"].float(), exact=True)
        case.check("attention_mask", TokenMap(tm.assign, tm.K, mode="amax").reduce(mask), exact=True)


def run_model(case: Case) -> None:
    """model_*: a patched timm ViT, layer by layer."""
    if case.params["patch"] == "clip_hf":
        run_clip_hf(case)
        return
    if case.params["patch"] == "clip":
        run_open_clip(case)
        return
    params, x = case.params, case.need("x")
    model: Any = models_blip2.build(case) if params["patch"] == "blip2" else build(case)
    features = case.has("y")
    forward = model.forward_features if features else model
    baseline, output = ("baseline", "y") if features else ("baseline_logits", "logits")
    with torch.no_grad():
        case.check(baseline, forward(x))
    options: dict[str, Any] = {"preset": PRESETS[params["patch"]], "ratio": params["ratio"]}
    if params.get("entry") == "forward_features":
        options["skip_last"] = False
    red = vt.patch(model, "pitome", trace=True, **options)
    reducer = red.reducers[0]
    assert isinstance(reducer, PiToMe)
    run = watch(red, model.forward_features if features else model, x, read_metric)
    case.check(output, run.output)
    check_layers(case, run)
    assert red.tokens == red.plan.tokens == params["tokens_per_layer"]
    depth = params["depth"]
    places = [Where(i, depth) for i in reducer.layers(depth)]
    assert [reducer.kind_at(where) for where in places] == params["kinds"]
    assert [reducer.margin_at(where) for where in places] == params["margins"]
    for layer in run.maps:
        check_layer(case, reducer, layer, run.metric[layer], depth)
    vt.unpatch(model)


def run_clip_hf(case: Case) -> None:
    """model_*: a patched transformers CLIP vision tower, as LLaVA reads it."""
    model, x = models_clip_hf.build(case), case.need("pixel_values")
    case.check("baseline_penultimate", models_clip_hf.features(model, x)[-2])
    red = vt.patch(model, "pitome", preset=PRESETS["clip_hf"], ratio=case.params["ratio"], trace=True)
    reducer = red.reducers[0]
    assert isinstance(reducer, PiToMe)
    run = watch(red, lambda x: models_clip_hf.features(model, x)[-1], x, read_metric)
    steps = {step.layer: step for step in red.trace}
    models_clip_hf.check_features(case, models_clip_hf.features(model, x), red.trace[-1].origin)
    assert [red.plan.length, *red.plan.tokens] == case.params["tokens_per_layer"]
    depth = case.params["num_hidden_layers"]
    places = [Where(i, depth) for i in reducer.layers(depth)]
    assert [reducer.kind_at(where) for where in places] == case.params["kinds"]
    assert [reducer.margin_at(where) for where in places] == case.params["margins"]
    for block, where in enumerate(places):
        metric, tm = run.metric[where.layer], steps[where.layer].map
        removed = reducer.removed(metric.shape[1] - 1, Budget(ratio=case.params["ratio"]), where, 1)
        match = reducer.match(metric, removed, where, 1)
        if reducer.kind_at(where) == "bsm":
            check_indices(case, f"layer{block}.", match, tm, metric.shape[1], 1)
        else:
            golden = fields(case, block, "a_idx", "b_idx", "protected_idx", "dst_idx")
            check_split(case, f"layer{block}.", reducer, metric, where, 1, removed)
            check_positions(case, f"layer{block}.", match, golden, 1)
    vt.unpatch(model)


def run_open_clip(case: Case) -> None:
    """model_*: a patched open_clip transformer; the file keeps tokens before the batch."""
    model, x = models_open_clip.build(case), case.need("x").transpose(0, 1)
    with torch.no_grad():
        case.check("baseline", model.transformer(x).transpose(0, 1))
    red = vt.patch(model, "pitome", preset=PRESETS["clip"], ratio=case.params["ratio"], trace=True)
    reducer = red.reducers[0]
    assert isinstance(reducer, PiToMe)
    run = watch(red, model.transformer, x, read_metric)
    case.check("y", run.output.transpose(0, 1))
    check_layers(case, run)
    assert red.tokens == red.plan.tokens
    depth = case.params["layers"]
    places = [Where(i, depth) for i in reducer.layers(depth)]
    assert [reducer.kind_at(where) for where in places] == case.params["kinds"]
    assert [reducer.margin_at(where) for where in places] == case.params["margins"]
    for layer in run.maps:
        check_layer(case, reducer, layer, run.metric[layer], depth)
    vt.unpatch(model)


def read_metric(reducer: Any, signals: Any) -> Tensor:
    """What a preset compares: head-averaged keys or hidden states."""
    return signals.KEY.mean(dim=1) if reducer.needs == (Signal.KEY,) else signals.HIDDEN


def check_layer(case: Case, reducer: PiToMe, layer: int, metric: Tensor, depth: int) -> None:
    at, where, prefix = f"layer{layer}.", Where(layer, depth), 1
    removed = reducer.removed(metric.shape[1] - prefix, Budget(ratio=case.params["ratio"]), where, prefix)
    match = reducer.match(metric, removed, where, prefix)
    golden = fields(case, layer, "a_idx", "b_idx", "protected_idx", "dst_idx", "src_idx", "unm_idx")
    check_split(case, at, reducer, metric, where, prefix, removed)
    check_positions(case, at, match, golden, prefix)
