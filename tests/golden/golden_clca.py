"""Runs CLCA's golden files: the wrapped models layer by layer, its heads, ATS variant and DPC-KNN."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from clca_dpcknn import run_dpcknn
from golden_case import Case
from torch import Tensor, nn

import visiontok as vt
from visiontok.core.runtime import Stage
from visiontok.reducers.ats import selection
from visiontok.reducers.clca import AggregationHead, split_official

_INNER = {"EViT": "evit", "TopK": "topk", "ToMe": "tome", "ATS": "ats_v2", "SiT": "sit", "PatchMerger": "patch_merger",
          "DPCKNN": "dpc_knn", "DyViT": "dynamic_vit", "DynamicViT": "dynamic_vit", "ViT": "identity"}  # fmt: skip


def run_op(case: Case) -> None:
    """op_clahead_*, op_dpcknn_*, op_atsv2_*."""
    if "ifa_dws_conv_groups" in case.params:
        head(case)
    elif "cluster_num" in case.params:
        run_dpcknn(case)
    else:
        sampling(case)


def head(case: Case) -> None:
    params, cls = case.params, case.need("inter_cls")
    module = AggregationHead(params["C"], params["L"], params["num_classes"], params["ifa_dws_conv_groups"])
    module.to(cls.dtype).load_state_dict(case.weights(), strict=True)
    with torch.no_grad():
        case.check("logits", module.eval()(cls))


def sampling(case: Case) -> None:
    attention, value, mask = case.need("attn"), case.need("v"), case.given("mask")
    count, length = case.params["sample_count"], attention.shape[-1]
    state = vt.TokenState.initial(torch.zeros(len(attention), length, 1))
    live = torch.ones(len(attention), length) if mask is None else mask.float()
    if mask is not None:
        state = state.changed(size=live.unsqueeze(-1), padded=True)
    signals = vt.Signals.of(ATTN_PREFIX=attention[:, :, :1], VALUE=value)
    reducer: Any = vt.reducers.create("ats_v2", compat="official")
    if count < length - 1:
        tm = reducer.decide(signals, state, budget=length - 1 - count)
    else:
        # As many samples as tokens is no reduction by plan, but the released code samples all the same.
        tm = selection(reducer.sample(signals, state, count), length - 1, state, {})
    ids = tm.kept.masked_fill(~tm.live, 0) if tm.live is not None else tm.kept
    width = case.tensors["out.ids"].shape[1]
    assert not bool(ids[:, width:].any())
    case.check("ids", ids[:, :width])
    case.check("mask", (tm.live if tm.live is not None else torch.ones_like(ids, dtype=torch.bool))[:, :width])
    rows = attention.gather(2, ids[:, None, :width, None].expand(-1, attention.shape[1], -1, length))
    case.check("attn_rows", rows)


def run_model(case: Case) -> None:
    """model_*: a timm ViT with a wrapped reducer, block by block."""
    params, x = case.params, case.need("image")
    model: Any = build(case)
    red = vt.patch(model, reducer(case), trace=True)
    count = params["num_clr"] if params["clc"] else 0
    host, learned = split_official(case.weights(), count, not params.get("no_embed_class"))
    learned |= {"tsm" + k.removeprefix("cluster_layers"): host.pop(k) for k in list(host) if cut(case, k, "SiT")}
    learned |= {k: host.pop(k) for k in list(host) if k.startswith(("cluster_layers.", "score_predictor."))}
    missing, unexpected = model.load_state_dict(host, strict=False)
    assert not unexpected
    unused = ("norm.", "head.") if params["ifa_head"] else ()
    assert all("visiontok" in name.split(".") or name.startswith(unused) for name in missing)
    assert set(red.load_learned(learned)) == set(learned)
    before: list[Tensor] = []
    after: list[Tensor] = []
    sizes: list[Tensor] = []
    stacked: list[Tensor] = []
    leave = Stage.leave

    def spy(self: Any, x: Tensor, state: Any, offered: Any) -> Tensor:
        after.append(x)
        sizes.append(torch.ones_like(x[:, :, :1]) if state.size is None else state.size)
        return leave(self, x, state, offered)

    def read(self: Any, module: Any, memo: Any) -> Any:
        stacked.append(torch.stack(memo["clca.cls"], dim=-1))
        return module(stacked[-1])

    hooks = [block.register_forward_pre_hook(lambda _, given: before.append(given[0])) for block in model.blocks]
    part = type(red.reducers[0].parts()[-1])
    with torch.no_grad(), mock.patch.object(Stage, "leave", spy), mock.patch.object(part, "readout", read):
        logits = model(x)
    for hook in hooks:
        hook.remove()
    if count:
        carriers: Any = model.blocks[0].visiontok["clca_0"]
        before[0] = torch.cat((before[0], carriers().expand(len(x), -1, -1)), dim=1)
    case.check("logits", logits)
    if case.has("inter_cls"):
        case.check("inter_cls", stacked[0])
    for k in range(params["depth"]):
        case.check(f"tokens_before_block{k}", before[k])
        case.check(f"tokens_after_block{k}", after[k])
        assert [before[k].shape[1], after[k].shape[1]] == params["tokens_in_out"][k]
        if case.has(f"size{k}"):
            case.check(f"size{k}", sizes[k].view_as(case.tensors[f"out.size{k}"]), exact=True)
    decisions(case, red)


def decisions(case: Case, red: Any) -> None:
    """What the wrapped reducer chose at each of its blocks."""
    made = {step.layer: step for step in red.trace if step.map.extra is None}
    for block, step in made.items():
        tm = step.map
        if case.has(f"idx{block}"):
            width = case.tensors[f"out.idx{block}"].shape[1]
            index = torch.cat((tm.kept[:, 1:] - 1, -torch.ones_like(tm.kept[:, :1])), dim=1)[:, :width]
            if case.params["model"] in ("EViT", "TopK"):
                # The fused token is written as -1, and TopK writes one although it has none.
                index[:, -1] = -1
            case.check(f"idx{block}", index)
        if case.has(f"sample_ids{block}"):
            live = torch.ones_like(tm.kept, dtype=torch.bool) if tm.live is None else tm.live
            case.check(f"sample_ids{block}", tm.kept.masked_fill(~live, 0))
            case.check(f"mask{block}", live)


def cut(case: Case, name: str, kind: str) -> bool:
    return case.params["model"].removesuffix("ViT") in (kind, f"{kind}ViT") and name.startswith("cluster_layers.")


def build(case: Case) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    params = case.params
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes")
    options = {name: params[name] for name in (*names, "no_embed_class", "init_values") if name in params}
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    return VisionTransformer(**options, norm_layer=norm).to(case.need("image").dtype).eval()


def reducer(case: Case) -> Any:
    """The wrapped reducer with the counts that the official rate stands for."""
    params = case.params
    flags = ("clc", "clc_include_gap", "clc_recover_at_last", "clc_pool_cls", "clc_pool_clr", "num_clr", "ifa_head",
             "ifa_dws_conv_groups")  # fmt: skip
    options = {flag: params[flag] for flag in flags} | {"compat": "official"}
    blocks = reduction_blocks(params)
    patches = (params["img_size"] // params["patch_size"]) ** 2
    given_rates = params["keep_rate"]
    rates = given_rates * (len(blocks) if len(given_rates) == 1 else 1)
    name = next(_INNER[n] for n in (params["model"], params["model"].removesuffix("ViT")) if n in _INNER)
    # One rate is compounded; several are, officially, counts.
    absolute = [int(patches * rate ** (i + 1)) if len(given_rates) == 1 else int(rate) for i, rate in enumerate(rates)]
    given: dict[str, Any] = {}
    if name in ("evit", "topk"):
        given["keep_rate"] = dict(zip(blocks, rates))
    elif name == "tome":
        given["r"] = {k: a - b for k, a, b in zip(blocks, [patches, *absolute], absolute)}
    elif name in ("sit", "patch_merger", "dpc_knn"):
        given["keep"] = dict(zip(blocks, absolute))
        given |= {"k_neighbors": params["k_neighbors"], "equal_weight": params["equal_weight"], "compat": "official"} \
            if name == "dpc_knn" else {}  # fmt: skip
    elif name == "ats_v2":
        counts = [n + 1 for n in absolute] if len(given_rates) == 1 else absolute
        given |= {"keep": dict(zip(blocks, counts)), "compat": "official"}
    elif name == "dynamic_vit":
        given |= {"keep": dict(zip(blocks, predicted(params, blocks, rates, options))), "compat": "official"}
    return vt.reducers.create(
        "clca", inner=(name, given), reduction_loc=tuple(blocks), aside=name == "dpc_knn", **options
    )


def reduction_blocks(params: dict[str, Any]) -> list[int]:
    """Where the model reduces, or would: the plain ViT has blocks of its own, whatever its parameters say."""
    blocks, recoveries = params["reduction_loc"], params["recovery_layers"]
    if set(blocks) <= set(recoveries):
        return list(blocks)
    return recoveries[:-1] if params["clc_recover_at_last"] else list(recoveries)


def predicted(params: dict[str, Any], blocks: list[int], rates: list[float], options: dict[str, Any]) -> list[int]:
    """Tokens that DynamicViT keeps before each of its blocks, the class token not counted."""
    if not params["clc"]:
        start = (params["img_size"] // params["patch_size"]) ** 2
        alone = len(params["keep_rate"]) == 1
        return [int(start * (rate ** (i + 1) if alone else rate)) for i, rate in enumerate(rates)]
    # Of what came out of the block before, with what returned after it.
    lengths = [row[1] for row in params["tokens_in_out"]]
    probe: Any = vt.reducers.create("clca", inner="identity", reduction_loc=tuple(blocks), **options)
    now = [lengths[k - 1] + probe.returning(k - 1, params["depth"]) - 1 for k in blocks]
    return [int((n - 1) * rates[0]) for n in now]
