"""Runs ATS's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from golden_case import Case
from golden_evit import blocks_of, build_plain
from torch import Tensor

import visiontok as vt


def run_op(case: Case) -> None:
    """op_*: the sampling of one block, or the softmax under a policy."""
    if case.given("logits") is not None:
        softmax_with_policy(case)
    else:
        sampling(case)


def softmax_with_policy(case: Case) -> None:
    """Ours is a mask of zero sizes; the released softmax adds `eps` and lets padding see itself."""
    logits, policy, eps = case.need("logits"), case.need("policy"), case.params["eps"]
    length = logits.shape[-1]
    x = logits.new_zeros(len(logits), length, 4)
    state = vt.TokenState.initial(x).changed(size=policy, padded=True)
    bias = state.key_bias(logits.dtype)
    ours = logits.softmax(dim=-1) if bias is None else (logits + bias).softmax(dim=-1)
    seen = policy.transpose(1, 2).unsqueeze(1).maximum(torch.eye(length, dtype=logits.dtype))
    weight = (logits - logits.amax(dim=-1, keepdim=True)).exp() * seen
    case.check("attn", (weight + eps / length) / (weight.sum(dim=-1, keepdim=True) + eps))
    live = policy.bool().view(len(policy), 1, length, 1).expand_as(ours)
    torch.testing.assert_close(ours[live], case.tensors["out.attn"][live], rtol=0, atol=2e-5)


def sampling(case: Case) -> None:
    attention, value, x = case.need("attn"), case.need("v"), case.need("x")
    batch, length, reference = len(x), x.shape[1], case.params["n_ref_tokens"]
    reducer: Any = vt.reducers.create("ats", compat="official", compact=False)
    # A later stage still remembers how many tokens there were, and, as here, may have no padding.
    state = vt.TokenState.initial(x, layer=3, depth=12).changed(n0=reference)
    signals = vt.Signals.of(ATTN_PREFIX=attention[:, :, :1], VALUE=value)
    sampled = reducer.sample(signals, state, reference - 1)
    case.check("sorted_scores", reducer.score(signals, state).gather(1, sampled.order))
    case.check("sorted_indices", sampled.order)
    # The released code pads the front with zeros where there are more samples than tokens.
    missing = case.tensors["out.normalized_cdf"].shape[1] - sampled.cdf.shape[1]
    case.check("normalized_cdf", torch.nn.functional.pad(sampled.cdf, (missing, 0)))
    case.check("ys", sampled.ys)
    case.check("picked_rank", sampled.picked)
    case.check("unique_rank", unique(sampled.kept))
    tm = reducer.decide(signals, state)
    y, after = vt.apply(tm, x, state)
    size: Any = after.size
    live = size > 0
    case.check("policy", live.to(case.tensors["out.policy"].dtype))
    case.check("original_index", tm.kept[:, 1:].masked_fill(~live[:, 1:, 0], -1))
    shown = live & torch.ones_like(y, dtype=torch.bool)
    case.check("x", y * shown)
    rows = attention.gather(2, tm.kept.view(batch, 1, -1, 1).expand(-1, attention.shape[1], -1, length))
    case.check("attn_rows", rows * live.view(batch, 1, -1, 1))


def unique(kept: Tensor) -> Tensor:
    """(B, n) kept ranks, ascending; n where there are no more."""
    batch, length = kept.shape
    return torch.where(kept, torch.arange(length), length).sort(dim=1).values


def as_sorted(case: Case, layer: int, order: Tensor, padding: Tensor) -> Tensor:
    """Our order, with the leading padding as the golden has it if it is the same set: its sort is not stable."""
    want, out = case.tensors[f"out.sorted_indices{layer}"], order.clone()
    for row, golden, count in zip(out, want, padding.tolist()):
        if torch.equal(row[:count].sort().values, golden[:count].sort().values):
            row[:count] = golden[:count]
    return out


def run_model(case: Case) -> None:
    """model_*: a patched timm ViT."""
    model, x, params = build_plain(case), case.need("image"), case.params
    with torch.no_grad():
        case.check("logits_unreduced", model(x))
    # The released softmax is smoothed by 1e-6, and by itself moves logits by about 1e-6.
    case.atol32 = 1e-4
    red = vt.patch(
        model, "ats", ats_blocks=params["ats_blocks"], compact=params["drop_tokens"], compat="official", trace=True
    )
    cls: Any = type(red.reducers[0])
    sample, seen, padding = cls.sample, {}, {}

    def spy(self: Any, signals: Any, state: Any, samples: int) -> Any:
        seen[state.layer] = found = sample(self, signals, state, samples)
        size = torch.ones(state.batch, state.n, 1) if state.size is None else state.size
        padding[state.layer] = (size[:, 1:, 0] == 0).sum(dim=1)
        return found

    with torch.no_grad(), mock.patch.object(cls, "sample", spy), blocks_of(model) as after:
        case.check("logits", model(x))
    assert [[layer, after[layer].shape[1]] for layer in params["ats_blocks"]] == params["lens"]
    for step in red.trace:
        layer, found = step.layer, seen[step.layer]
        live = torch.ones(step.map.assign.shape[0], step.tokens, 1) if step.size is None else (step.size > 0).float()
        case.check(f"policy{layer}", live)
        case.check(f"tokens_after_block{layer}", after[layer] * live)
        case.check(f"sorted_indices{layer}", as_sorted(case, layer, found.order, padding[layer]))
        case.check(f"unique_rank{layer}", unique(found.kept))
