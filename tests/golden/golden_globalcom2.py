"""Runs GlobalCom2's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

from typing import Any

import models_llava
import torch
from golden_case import Case
from torch import Tensor

import visiontok as vt
from visiontok.core.pictures import lay_out
from visiontok.core.visual import Crops


def create(share: float, temperature: float = 10.0) -> Any:
    return vt.reducers.create("globalcom2", retention_ratio=share, temperature=temperature, compat="official")


def signals_of(score: Tensor, crops: Crops) -> Any:
    """Signals whose raw class logits are the given scores (R, n), as one head of one channel; class token first."""
    key = torch.cat((torch.zeros_like(score[:, :1]), score), dim=1)[:, None, None, :, None]
    return vt.Signals.of(QUERY_PREFIX=torch.ones_like(key[:, :, :, :1]), KEY=key, CROPS=crops)


def with_class(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:, :1]), x), dim=1)


def run_op(case: Case) -> None:
    """op_scales_*: shares of crops; op_thumbnail_*: one image; op_crops_*: the crops of one image with newlines."""
    if case.given("crop_scores") is not None:
        run_crops(case)
    elif case.given("base_cls_scores") is not None:
        run_scales(case)
    else:
        run_thumbnail(case)


def run_scales(case: Case) -> None:
    score, params = case.need("base_cls_scores"), case.params
    side = round(len(score) ** 0.5)
    rows, columns = params["num_patch_height"], params["num_patch_width"]
    reducer = create(params["base_scale"], params["temperature"])
    crops = Crops(rows, columns, (side, side), (rows * side, columns * side))
    case.check("scales", reducer.scales(score, crops, params["base_scale"]))
    if case.has("region_sums"):
        grid = score.double().view(side, side)
        down, across = bounds(side, rows), bounds(side, columns)
        sums = [grid[a:b, c:d].sum() for a, b in down for c, d in across]
        case.check("region_sums", torch.stack(sums))


def bounds(side: int, parts: int) -> list[tuple[int, int]]:
    """Ends of equal parts of a side, the last of which has the remainder."""
    size = side // parts
    return [(i * size, side if i == parts - 1 else (i + 1) * size) for i in range(parts)]


def run_thumbnail(case: Case) -> None:
    score, x = case.need("scores").unsqueeze(0), with_class(case.need("features").unsqueeze(0))
    side = round(score.shape[1] ** 0.5)
    state = vt.TokenState.initial(x, layer=4, depth=4)
    signals = signals_of(score, Crops(0, 0, (side, side), (side, side), False))
    tm = create(case.params["scale"]).decide(signals, state)
    case.check("indices", tm.kept[0] - 1)
    case.check("features", vt.apply(tm, x, state)[0][0])


def run_crops(case: Case) -> None:
    params = case.params
    side, (width, height) = params["side"], params["original_size_wh"]
    crops = Crops(params["num_patch_height"], params["num_patch_width"], (side, side), (height, width))
    reducer = create(params["base_scale"], params["temperature"])
    score = torch.cat((case.need("base_scores").unsqueeze(0), case.need("crop_scores")))
    inside = case.need("crop_features")
    x = with_class(torch.cat((torch.zeros_like(inside[:1]), inside)))
    state = vt.TokenState.initial(x, layer=4, depth=4)
    signals = signals_of(score, crops)
    tm = reducer.decide(signals, state)
    check_choice(case, reducer, signals, state, tm)
    combined, outer, valid = reducer.combined(reducer.scores(signals, state), crops)
    case.check("combined_scores_concat", combined[valid])
    case.check("global_scores_concat", outer[valid])
    values, _ = vt.apply(tm, x, state)
    features, newline = placed(tm, values, crops, case.need("image_newline"))
    case.check("features", features)
    case.check("is_newline", newline)


def check_choice(case: Case, reducer: Any, signals: Any, state: Any, tm: Any) -> None:
    """Shares, counts and places in the crops' lists of valid tokens."""
    crops, score = signals.CROPS, reducer.scores(signals, state)
    case.check("scales", reducer.scales(score[0], crops, case.params.get("base_scale", reducer.retention_ratio)))
    _, _, valid = reducer.combined(score, crops)
    counts = tm.counts[1:].tolist()
    case.check("valid_per_crop", valid.sum(dim=1))
    case.check("kept_per_crop", tm.counts[1:])
    case.check("kept_local_indices_concat", torch.cat([tm.kept[1 + i, :k] - 1 for i, k in enumerate(counts)]))


def placed(tm: Any, values: Tensor, crops: Crops, newline: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of the crops over the whole canvas, row by row with newlines, and which of them are newlines."""
    n = crops.side[0] * crops.side[1]
    kept = [(i, j) for i in range(crops.number) for j in range(int(tm.counts[1 + i]))]
    bank = {i * n + int(tm.kept[1 + i, j]) - 1: values[1 + i, j] for i, j in kept}
    order = [cell for cell in lay_out(crops, True).tolist() if cell < 0 or cell in bank]
    rows = [newline if cell < 0 else bank[cell] for cell in order]
    return torch.stack(rows), torch.tensor([cell < 0 for cell in order])


def run_model(case: Case) -> None:
    """A patched LLaVA-NeXT and one image."""
    model = models_llava.build(case)
    ((suffix, call),) = models_llava.calls(case, model)
    reducer = create(case.params["retention_ratio"], case.params["temperature"])
    vt.patch(model, reducer)
    shown = models_llava.check_run(case, model, suffix, call, reducer)
    (asked,) = shown.asked
    crops = asked.signals.CROPS
    assert (crops.columns, crops.rows) == (case.params["num_patch_width"], case.params["num_patch_height"])
    case.check("cls_logits_last_layer", asked.reducer.scores(asked.signals, asked.state))
    case.check("thumbnail_indices", asked.map.kept[0, : int(asked.map.counts[0])] - 1)
    # Kept in double precision by the file, but a function of the tower's fp32 logits.
    case.tensors["out.scales"] = case.tensors["out.scales"].float()
    check_choice(case, asked.reducer, asked.signals, asked.state, asked.map)
    (features,) = shown.features
    case.check("image_features", features)
    newline = model.model.image_newline
    found = (features == newline).all(dim=1)
    case.check("is_newline", found)
    # The released code rounds what it takes from the crops to half precision, the language model's input follows.
    first = int((call["input_ids"][0] == models_llava.placeholder(case)).nonzero()[0])
    half = shown.embeds.clone()
    start = first + int(asked.map.counts[0])
    stop = first + len(features)
    half[start:stop] = half[start:stop].half().to(half.dtype)
    models_llava.close(case, "inputs_embeds_official_half", half, 1e-3)
