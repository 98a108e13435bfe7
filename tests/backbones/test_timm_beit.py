"""timm's Beit: own, shared and no bias tables that follow merged tokens, by loops; averages, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_attention import attention, caught, image, lively, pair_bias, run, unfused
from timm.models import beit as host
from torch import Tensor

import visiontok as vt
from visiontok.core.runtime import state_of
from visiontok.errors import IncompatibleError

DIM, HEADS, DEPTH = 24, 2, 3
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}


def made(**options: Any) -> Any:
    return lively(host.Beit(**{**SMALL, **options}))


def separate(model: Any) -> Any:
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    return model


VARIANTS: dict[str, Callable[[], Any]] = {
    "own tables": lambda: made(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "shared table, class token": lambda: made(use_shared_rel_pos_bias=True, global_pool="token"),
    "both tables, swiglu, unfused": lambda: unfused(
        made(use_rel_pos_bias=True, use_shared_rel_pos_bias=True, swiglu_mlp=True, scale_mlp=True, init_values=0.1)
    ),
    "no table": lambda: made(),
    "no q and v bias": lambda: made(use_rel_pos_bias=True, qkv_bias=False),
    "bias apart": lambda: separate(made(use_rel_pos_bias=True)),
}


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> Any:
    return VARIANTS[request.param]()


@torch.no_grad()
def test_nothing_removed_is_the_host(model: Any) -> None:
    x = image()
    before = run(model, x)
    with vt.patched(model, "tome", r=0):
        assert torch.equal(run(model, x), before)
        assert torch.equal(model.forward_head(model.forward_features(x)), before)
    with vt.patched(model, "tome", r=2) as red:
        assert torch.isfinite(run(model, x)).all()
        assert red.tokens == red.plan.tokens == [15, 13, 11]
    assert torch.equal(run(model, x), before)


@pytest.mark.parametrize(("reducer", "rule"), [("tome", "mean"), ("tome", "gather"), ("random", "mean")])
def test_the_block_after_a_map_equals_loops(model: Any, reducer: str, rule: str) -> None:
    x, attn = image(), model.blocks[1].attn
    table = torch.zeros(HEADS, 17, 17, dtype=torch.float64)
    if attn.relative_position_bias_table is not None:
        table = table + attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1).detach()
    if model.rel_pos_bias is not None:
        table = table + model.rel_pos_bias().detach()
    with vt.patched(model, reducer, r=[5], positions=rule, trace=True) as red:
        given, found = caught(model, attn, x)
        (step,) = red.trace
    q, k, v = (given @ attn.qkv.weight.T).detach().chunk(3, dim=-1)
    if attn.q_bias is not None:
        q, v = q + attn.q_bias.detach(), v + attn.v_bias.detach()
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    for b in range(2):
        size = None if step.size is None else step.size[b, :, 0]
        mixed = attention(q[b], k[b], v[b], (DIM // HEADS) ** -0.5, pair_bias(table, step, rule, b), size)
        torch.testing.assert_close(found[b], attn.proj(mixed.transpose(0, 1).flatten(1)), rtol=1e-10, atol=1e-10)


def test_blocks_after_the_only_merge_equal_the_hosts_on_their_members() -> None:
    # Without tables a merged token weighs as much as its members, in attention and in the average.
    model, x = VARIANTS["no table"](), image()
    with vt.patched(model, "tome", r=[4]):
        found = run(model, x)
        merged = model.forward_intermediates(x, indices=[0], output_fmt="NLC", intermediates_only=True, norm=False)
        assert merged[0].shape[1] == 12
        features = model.forward_features(x)
        full = state_of(features).restore(features)
        _, after = caught(model, model.blocks[0], x)
        state = state_of(features)
    y = state.restore(after)
    with torch.no_grad():
        for block in model.blocks[1:]:
            y = block(y)
        torch.testing.assert_close(full, model.norm(y), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, model.forward_head(model.norm(y)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_feature_maps_have_the_hosts_form() -> None:
    model, x = VARIANTS["own tables"](), image()
    before = model.forward_intermediates(x, return_prefix_tokens=True)
    with vt.patched(model, "tome", r=2):
        after = model.forward_intermediates(x, return_prefix_tokens=True)
    assert after[0].shape[1] == 11
    assert [(y.shape, lead.shape) for y, lead in after[1]] == [(y.shape, lead.shape) for y, lead in before[1]]


class OwnBlock(host.Block):
    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return -super().forward(x, shared_rel_pos_bias)


class OwnAttention(host.Attention):
    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return -super().forward(x, shared_rel_pos_bias)


@pytest.mark.parametrize(("own", "where"), [(OwnBlock, r"blocks\.2"), (OwnAttention, r"blocks\.2\.attn")])
def test_a_forward_of_its_own_is_refused_by_name(own: type, where: str) -> None:
    model = VARIANTS["own tables"]()
    (model.blocks[2] if own is OwnBlock else model.blocks[2].attn).__class__ = own
    with pytest.raises(IncompatibleError, match=rf"{where} is a {own.__name__}, whose forward is none"):
        vt.patch(model, "tome", r=2)
    assert type(model) is host.Beit
