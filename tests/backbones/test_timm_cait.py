"""timm's CaiT: talking heads and class attention over merged tokens, by loops; maps, averages, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loop_attention import attention, caught, image, lively, run, unfused
from timm.models import cait as host
from torch import Tensor

import visiontok as vt
from visiontok.core.runtime import state_of
from visiontok.errors import IncompatibleError

pytestmark = pytest.mark.skipif(not hasattr(host.Cait, "forward_cls"), reason="refused: this Cait has no forward_cls")
DIM, HEADS, DEPTH = 24, 2, 3
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}


def made(**options: Any) -> Any:
    return lively(host.Cait(**{**SMALL, "init_values": 0.1, **options}))


def rest(model: Any, x: Tensor, first: int = 1) -> Tensor:
    """The host's model on full tokens behind some block."""
    with torch.no_grad():
        for block in model.blocks[first:]:
            x = block(x)
        return model.forward_head(model.norm(model.forward_cls(x)))


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"global_pool": ""}])
@torch.no_grad()
def test_nothing_removed_is_the_host(options: dict[str, Any]) -> None:
    model, x = made(**options), image()
    before = run(model, x)
    with vt.patched(model, "tome", r=0):
        assert torch.equal(run(model, x), before)
        assert torch.equal(model.forward_head(model.forward_features(x)), before)
    with vt.patched(model, "tome", r=2) as red:
        assert torch.isfinite(run(model, x)).all()
        assert red.tokens == red.plan.tokens == [14, 12, 10]
        assert state_of(model(x)) is None
    assert torch.equal(run(model, x), before)


@pytest.mark.parametrize("reducer", ["tome", "random"])
def test_talking_heads_after_a_map_equal_loops(reducer: str) -> None:
    model, x = made(), image()
    attn = model.blocks[1].attn
    with vt.patched(model, reducer, r=[5], trace=True) as red:
        given, found = caught(model, attn, x)
        (step,) = red.trace
    q, k, v = attn.qkv(given).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).detach()
    n, scale = given.shape[1], (DIM // HEADS) ** -0.5
    wl, bl, ww, bw = (t.detach() for t in (*attn.proj_l.parameters(), *attn.proj_w.parameters()))
    for b in range(2):
        size = [1.0] * n if step.size is None else step.size[b, :, 0].tolist()
        out = torch.zeros(n, HEADS, DIM // HEADS, dtype=torch.float64)
        for i in range(n):
            weight = torch.zeros(HEADS, n, dtype=torch.float64)
            for g in range(HEADS):
                logits = [
                    sum(float(wl[g, h] * scale * (q[b, h, i] @ k[b, h, j])) for h in range(HEADS))
                    + float(bl[g]) + math.log(size[j])
                    for j in range(n)
                ]  # fmt: skip
                total = sum(math.exp(a) for a in logits)
                weight[g] = torch.tensor([math.exp(a) / total for a in logits], dtype=torch.float64)
            for g in range(HEADS):
                for j in range(n):
                    share = sum(float(ww[g, h] * weight[h, j]) for h in range(HEADS)) + float(bw[g])
                    out[i, g] += share * v[b, g, j]
        torch.testing.assert_close(found[b], attn.proj(out.flatten(1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", [lambda m: m, unfused], ids=["fused", "unfused"])
@pytest.mark.parametrize("proportional", [True, False])
def test_class_attention_reads_a_merged_token_as_its_members(change: Any, proportional: bool) -> None:
    # Also where the trunk does not weigh by size: this is the read-out.
    model, x = change(made()), image()
    attn = model.blocks_token_only[0].attn
    with vt.patched(model, vt.reducers.ToMe(r=3, prop_attn=proportional), trace=True) as red:
        given, found = caught(model, attn, x)
        size = red.trace[-1].size
    assert given.shape[1] == 1 + 16 - 9
    for b in range(2):
        q = attn.q(given[b, :1]).unflatten(-1, (HEADS, -1)).transpose(0, 1).detach().expand(-1, given.shape[1], -1)
        k, v = (part(given[b]).unflatten(-1, (HEADS, -1)).transpose(0, 1).detach() for part in (attn.k, attn.v))
        counts = torch.cat((torch.ones(1, dtype=torch.float64), size[b, :, 0]))
        none = torch.zeros(HEADS, len(counts), len(counts), dtype=torch.float64)
        mixed = attention(q, k, v, (DIM // HEADS) ** -0.5, none, counts)[:, :1]
        torch.testing.assert_close(found[b], attn.proj(mixed.transpose(0, 1).flatten(1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_head_after_a_late_merge_equals_the_hosts_on_the_members(pool: str) -> None:
    # Talking heads have a bias after the softmax, which counts tokens, not members: so only behind the trunk.
    model, x = made(global_pool=pool), image()
    with vt.patched(model, "tome", r=[0, 0, 6], trace=True) as red:
        found = run(model, x)
        _, trunk = caught(model, model.blocks[2], x)
        origin = red.trace[0].origin.long()
    full = trunk.gather(1, origin.unsqueeze(-1).expand(-1, -1, DIM))
    torch.testing.assert_close(found, rest(model, full, first=DEPTH), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_features_and_maps_have_the_hosts_form() -> None:
    model, x = made(), image()
    whole, maps = model.forward_intermediates(x, norm=True)
    with vt.patched(model, "tome", r=0):
        same, again = model.forward_intermediates(x, norm=True)
        assert torch.equal(same, whole)
        assert all(torch.equal(a, b) for a, b in zip(again, maps))
    with vt.patched(model, "tome", r=2):
        short, dense = model.forward_intermediates(x)
        rows = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        assert short.shape[1] == model.forward_features(x).shape[1] == 11
        assert [y.shape for y in dense] == [y.shape for y in maps]
        assert [y.shape[1] for y in rows] == [14, 12, 10]
        assert all(state_of(y) is None for y in (short, *dense, *rows))
    with vt.patched(model, "random", r=2, restore="zero"):
        restored = model.forward_features(x)
        assert restored.shape == whole.shape
    with vt.patched(model, "random", r=2):
        # What fills the gaps is not attended to.
        torch.testing.assert_close(model.forward_features(x)[:, 0], restored[:, 0])


class OwnAttention(host.TalkingHeadAttn):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class OwnClassAttention(host.ClassAttn):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"attn_block": OwnAttention}, r"blocks\.0\.attn is a OwnAttention"),
        ({"attn_block_token_only": OwnClassAttention}, r"blocks_token_only\.0\.attn is a OwnClassAttention"),
    ],
)
def test_a_forward_of_its_own_is_refused_by_name(options: dict[str, Any], where: str) -> None:
    with pytest.raises(IncompatibleError, match=where):
        vt.patch(made(**options), "tome", r=2)
