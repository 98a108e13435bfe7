"""timm's relative-position ViTs: tables that follow merged tokens, by loops; pools, maps, grids, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from loop_attention import attention, caught, image, lively, pair_bias, run, unfused
from timm.models import vision_transformer_relpos as host
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Reducer
from visiontok.core.runtime import state_of
from visiontok.core.signals import Signal
from visiontok.errors import IncompatibleError

DIM, HEADS, DEPTH = 24, 2, 3
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}


def made(**options: Any) -> Any:
    return lively(host.VisionTransformerRelPos(**{**SMALL, "init_values": 0.1, **options}))


VARIANTS: dict[str, Callable[[], Any]] = {
    "mlp": lambda: made(),
    "table, class token": lambda: made(rel_pos_type="bias", class_token=True, global_pool="token", qk_norm=True),
    "swin mlp, both pools": lambda: made(rel_pos_type="mlp-swin", class_token=True, fc_norm=True),
    "shared": lambda: made(shared_rel_pos=True, rel_pos_dim=8),
    "shared, post-norm, unfused": lambda: unfused(
        made(shared_rel_pos=True, rel_pos_type="bias", block_fn=host.ResPostRelPosBlock)
    ),
    "unfused": lambda: unfused(made(class_token=True)),
}


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> Any:
    return VARIANTS[request.param]()


@dataclass(frozen=True)
class Listens(Reducer):
    """Asks for keys and votes and then leaves every token alone: what runs is our attention, on the host's tokens."""

    needs = (Signal.KEY, Signal.ATTN_VOTE)
    seen = []

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> None:
        assert signals.KEY.shape[2] == state.n
        self.seen.append((state.grid, signals.ATTN_VOTE.map))


@torch.no_grad()
def test_nothing_removed_is_the_host(model: Any) -> None:
    x = image()
    before = run(model, x)
    with vt.patched(model, "tome", r=0):
        assert torch.equal(run(model, x), before)
        assert torch.equal(model.forward_head(model.forward_features(x)), before)
    Listens.seen.clear()
    with vt.patched(model, Listens(r=1)):
        torch.testing.assert_close(run(model, x), before, rtol=1e-11, atol=1e-11)
    assert [grid for grid, _ in Listens.seen] == [(4, 4)] * DEPTH
    with vt.patched(model, "tome", r=2) as red:
        assert torch.isfinite(run(model, x)).all()
        assert red.tokens == red.plan.tokens
    assert torch.equal(run(model, x), before)


@pytest.mark.parametrize(("reducer", "rule"), [("tome", "mean"), ("tome", "gather"), ("random", "mean")])
def test_the_block_after_a_map_equals_loops(model: Any, reducer: str, rule: str) -> None:
    x, block = image(), model.blocks[1]
    shared = model.shared_rel_pos
    table = (block.attn.rel_pos if shared is None else shared).get_bias().detach()[0]
    with vt.patched(model, reducer, r=[5], positions=rule, trace=True) as red:
        given, found = caught(model, block.attn, x)
        (step,) = red.trace
    assert given.shape[1] == table.shape[1] - 5
    q, k, v = block.attn.qkv(given).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).detach()
    q, k = block.attn.q_norm(q).detach(), block.attn.k_norm(k).detach()
    for b in range(2):
        bias = pair_bias(table, step, rule, b)
        size = None if step.size is None else step.size[b, :, 0]
        assert (size is None) == (reducer == "random")
        mixed = attention(q[b], k[b], v[b], (DIM // HEADS) ** -0.5, bias, size).transpose(0, 1).flatten(1)
        torch.testing.assert_close(found[b], block.attn.proj(mixed), rtol=1e-10, atol=1e-10)


def test_signals_have_the_bias_of_the_tokens_at_hand() -> None:
    model, x = VARIANTS["table, class token"](), image()
    Listens.seen.clear()
    with vt.patched(model, [vt.reducers.create("random", r=[3]), Listens(r={1: 1})], trace=True) as red:
        run(model, x)
        (step,) = red.trace
        given, _ = caught(model, model.blocks[1].attn, x)
        attn = model.blocks[1].attn
        q, k, _ = attn._visiontok_qkv(given)
    table = attn.rel_pos.get_bias()[0]
    kept = step.map.kept
    for b in range(2):
        logits = q[b] @ k[b].mT * attn.scale + table[:, kept[b]][:, :, kept[b]]
        torch.testing.assert_close(Listens.seen[0][1][b], logits.softmax(dim=-1), rtol=1e-11, atol=1e-11)


def test_the_average_counts_members(model: Any) -> None:
    x = image()
    with vt.patched(model, "tome", r=3):
        features = model.forward_features(x)
        found = model.forward_head(features, pre_logits=True)
        full = state_of(features).restore(features)
        whole = run(model, x)
    torch.testing.assert_close(found, model.forward_head(full.clone(), pre_logits=True), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(whole, model.head(found), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_feature_maps_have_the_hosts_form(model: Any) -> None:
    x, lead = image(), bool(model.num_prefix_tokens)
    calls: list[dict[str, Any]] = [{}, {"indices": 1, "intermediates_only": True}, {"norm": True, "stop_early": True}]
    calls += [{"return_prefix_tokens": True}] * lead
    for options in calls:
        for fmt in ("NCHW", "NLC"):
            before = shapes(model.forward_intermediates(x, output_fmt=fmt, **options))
            with vt.patched(model, "tome", r=0):
                assert shapes(model.forward_intermediates(x, output_fmt=fmt, **options)) == before
            with vt.patched(model, "tome", r=2, restore="gather"):
                assert shapes(model.forward_intermediates(x, output_fmt=fmt, **options)) == before
    with vt.patched(model, "tome", r=2):
        rows = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert [y.shape[1] for y in rows] == [14, 12, 10]


def shapes(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else [shapes(item) for item in value]


def test_the_grid_after_set_input_size() -> None:
    model = VARIANTS["shared"]()
    Listens.seen.clear()
    with vt.patched(model, [Listens(r=[1]), vt.reducers.create("tome", r=[0, 2])]) as red:
        # As many patches as before, in another shape.
        model.set_input_size((16, 64))
        assert torch.isfinite(run(model, image((16, 64)))).all()
        assert Listens.seen[0][0] == (2, 8)
        assert red.tokens == [16, 14, 14]


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointed in (False, True):
        model = made(shared_rel_pos=True, rel_pos_type="bias").train()
        model.set_grad_checkpointing(checkpointed)
        with vt.patched(model, "tome", r=2):
            model(image()).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-9, atol=1e-11)
    assert grads[0]["shared_rel_pos.relative_position_bias_table"].abs().sum() > 0


class OwnAttention(host.RelPosAttention):
    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return -super().forward(x, shared_rel_pos)


class OwnBlock(host.RelPosBlock):
    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return -super().forward(x, shared_rel_pos)


@pytest.mark.parametrize(("own", "where"), [(OwnBlock, r"blocks\.1"), (OwnAttention, r"blocks\.1\.attn")])
def test_a_forward_of_its_own_is_refused_by_name(own: type, where: str) -> None:
    model = VARIANTS["mlp"]()
    (model.blocks[1] if own is OwnBlock else model.blocks[1].attn).__class__ = own
    before = run(model, image())
    with pytest.raises(IncompatibleError, match=rf"{where} is a {own.__name__}, whose forward is none .*RelPosBlock"):
        vt.patch(model, "random", r=2)
    assert torch.equal(run(model, image()), before)
