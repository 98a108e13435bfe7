"""timm's VisionTransformer in all its variants: exactness, heads, feature maps, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models import deit
from timm.models import vision_transformer as tv
from torch import Tensor, nn

import visiontok as vt
from visiontok.core.reducer import Reducer
from visiontok.core.runtime import state_of
from visiontok.core.signals import Signal
from visiontok.errors import IncompatibleError

DIM, HEADS, DEPTH = 24, 2, 4
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
GAP = {"class_token": False, "global_pool": "avg"}


@dataclass(frozen=True)
class Listens(Reducer):
    """Asks for the keys and then leaves every token alone: what runs is our attention, on the host's tokens."""

    needs = (Signal.KEY, Signal.GRID)

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> None:
        assert signals.KEY.shape[2] == state.n
        assert signals.GRID[0] * signals.GRID[1] == state.items


def vit(cls: type = tv.VisionTransformer, change: Callable[[Any], None] | None = None, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = cls(**{**SMALL, **options})
        for parameter in model.parameters():
            # timm starts biases, tokens and norms at constants, where many mistakes would not show.
            nn.init.normal_(parameter, std=0.3) if parameter.dim() < 3 else nn.init.normal_(parameter)
        if change is not None:
            change(model)
    return model.eval().double()


def attention(**options: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for block in model.blocks:
            block.attn = Attention(DIM, num_heads=HEADS, qkv_bias=True, norm_layer=nn.LayerNorm, **options)

    return change


def unfused(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def checkpointed(model: Any) -> None:
    model.set_grad_checkpointing(True)


VARIANTS: dict[str, Callable[[], Any]] = {
    "class token": lambda: vit(),
    "no class token": lambda: vit(**GAP),
    "distilled": lambda: vit(deit.VisionTransformerDistilled),
    **{f"{n} registers": lambda n=n: vit(reg_tokens=n) for n in range(1, 6)},
    "4 registers, no class token": lambda: vit(**GAP, reg_tokens=4, no_embed_class=True),
    "LayerScale": lambda: vit(init_values=0.1),
    "qk_norm": lambda: vit(qk_norm=True),
    "scale_norm": lambda: vit(scale_attn_norm=True, scale_mlp_norm=True),
    "gated": lambda: vit(change=attention(gated=True)),
    "gated, scale_norm": lambda: vit(change=attention(gated=True, scale_norm=True, qk_norm=True)),
    "attn_head_dim": lambda: vit(change=attention(attn_head_dim=20)),
    "one head": lambda: vit(num_heads=1),
    "unfused": lambda: vit(change=unfused),
    "unfused, gated": lambda: vit(change=lambda m: (attention(gated=True)(m), unfused(m))),
    "unfused map": lambda: vit(class_token=False, global_pool="map", change=unfused),
    "checkpointing": lambda: vit(change=checkpointed),
    "dynamic size": lambda: vit(dynamic_img_size=True),
    "pre_norm": lambda: vit(pre_norm=True),
    "no positions": lambda: vit(pos_embed="none"),
    "no final norm": lambda: vit(final_norm=False),
    "fc_norm": lambda: vit(fc_norm=True),
    "average": lambda: vit(global_pool="avg"),
    "average with prefix": lambda: vit(global_pool="avg", pool_include_prefix=True),
    "avgmax": lambda: vit(global_pool="avgmax"),
    "max": lambda: vit(global_pool="max"),
    "max with prefix": lambda: vit(global_pool="max", pool_include_prefix=True),
    "map": lambda: vit(global_pool="map"),
    "map with prefix": lambda: vit(global_pool="map", pool_include_prefix=True),
    "prr token": lambda: vit(global_pool="prr"),
    "prr average": lambda: vit(class_token=False, global_pool="prr"),
    "no pool": lambda: vit(global_pool=""),
    "ResPost": lambda: vit(block_fn=tv.ResPostBlock, init_values=0.1),
    "ParallelThings": lambda: vit(block_fn=tv.ParallelThingsBlock, init_values=0.1),
    "ParallelScaling": lambda: vit(block_fn=tv.ParallelScalingBlock, init_values=0.1),
    "ParallelScaling, apart": lambda: vit(
        block_fn=tv.ParallelScalingBlock, qkv_bias=False, qk_norm=True, change=unfused
    ),
}
if hasattr(tv, "DiffAttention"):
    VARIANTS["Diff"] = lambda: vit(attn_layer="diff", qk_norm=True, scale_attn_norm=True)
    VARIANTS["Diff, unfused, ParallelThings"] = lambda: vit(
        attn_layer="diff", block_fn=tv.ParallelThingsBlock, change=unfused
    )
    VARIANTS["DiffParallelScaling"] = lambda: vit(block_fn=tv.DiffParallelScalingBlock, init_values=0.1)


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> Any:
    return VARIANTS[request.param]()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def run(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def after_block(model: Any, index: int, x: Tensor) -> Tensor:
    caught: list[Tensor] = []
    handle = model.blocks[index].register_forward_hook(lambda _, args, out: caught.append(out))
    run(model, x)
    handle.remove()
    return caught[0]


def rest(model: Any, x: Tensor, first: int = 1) -> Tensor:
    with torch.no_grad():
        for block in model.blocks[first:]:
            x = block(x)
        return model.forward_head(model.norm(x))


def test_zero_reduction_and_unpatching_are_bit_equal(model: Any, image: Tensor) -> None:
    before = run(model, image)
    with vt.patched(model, "tome", r=0):
        assert torch.equal(run(model, image), before)
        assert torch.equal(model.forward_head(model.forward_features(image)), before)
    with vt.patched(model, "tome", r=2):
        reduced = run(model, image)
        assert torch.isfinite(reduced).all()
        assert not torch.equal(reduced, before) or model.global_pool == ""
    assert torch.equal(run(model, image), before)


def test_our_attention_equals_the_hosts(model: Any, image: Tensor) -> None:
    before = run(model, image)
    with vt.patched(model, Listens(r=1)) as red:
        torch.testing.assert_close(run(model, image), before, rtol=1e-12, atol=1e-12)
        assert red.tokens == [16 + model.num_prefix_tokens] * DEPTH


def test_merged_tokens_weigh_as_much_as_their_members(model: Any, image: Tensor) -> None:
    # Merging in block 0 only: all later attention, and the pool, must equal the host's on the restored tokens.
    with vt.patched(model, "tome", r=[4]) as red:
        found = run(model, image)
        merged = after_block(model, 0, image)
        assert merged.shape[1] == red.tokens[0] == 12 + model.num_prefix_tokens
        full = state_of(merged).restore(merged)
    if model.global_pool == "":
        assert found.shape[1] == merged.shape[1]
        return
    torch.testing.assert_close(found, rest(model, full), rtol=1e-9, atol=1e-9)


def test_dropped_tokens_are_simply_gone(model: Any, image: Tensor) -> None:
    with vt.patched(model, "random", r=[4]):
        found = run(model, image)
        kept = after_block(model, 0, image)
    assert kept.shape[1] == 12 + model.num_prefix_tokens
    torch.testing.assert_close(found, rest(model, kept.clone()), rtol=1e-9, atol=1e-9)


def test_prefix_tokens_stay_in_place(model: Any, image: Tensor) -> None:
    prefix = model.num_prefix_tokens
    for reducer in ("tome", "pitome", "random"):
        with vt.patched(model, reducer, keep=0.5, trace=True) as red:
            run(model, image)
            assert red.plan.prefix == prefix
            assert red.tokens == red.plan.tokens
            assert len(red.trace) >= 3
            for step in red.trace:
                assert torch.equal(step.origin[:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(2, -1))
                assert not ((step.origin[:, prefix:] >= 0) & (step.origin[:, prefix:] < prefix)).any()


def test_features_then_head_by_hand(model: Any, image: Tensor) -> None:
    with vt.patched(model, "tome", r=2) as red:
        whole = run(model, image)
        features = model.forward_features(image)
        assert features.shape == (2, 8 + model.num_prefix_tokens, DIM)
        assert torch.equal(model.forward_head(features), whole)
        assert red.tokens[-1] == features.shape[1]


def test_training_step_with_checkpointing_has_the_same_gradients(image: Tensor) -> None:
    grads = []
    for change in (None, checkpointed):
        model = vit(init_values=0.1, change=change).train()
        with vt.patched(model, "tome", r=2):
            (model(image).square().sum() + model(image.flip(0)).square().sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-10, atol=1e-12)


# ---- pools


@pytest.mark.parametrize("kind", ["avg", "avgmax", "max", "token", ""])
def test_pool_type_given_by_hand(image: Tensor, kind: str) -> None:
    model = vit()
    with vt.patched(model, "tome", r=3):
        features = model.forward_features(image)
        full = state_of(features).restore(features)
        pooled = model.pool(features, kind)
    expected = model.pool(features.clone() if kind in ("", "token") else full, kind)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


def test_the_pool_is_weighted_only_where_sizes_say_so(image: Tensor) -> None:
    model = vit(**GAP)
    with vt.patched(model, "tome", r=3):
        features = model.forward_features(image)
        weighted = model.pool(features)
        assert not torch.allclose(weighted, model.pool(features.clone()))
    with vt.patched(model, "random", r=3):
        features = model.forward_features(image)
        torch.testing.assert_close(model.pool(features), features.mean(dim=1))


def test_reset_classifier_while_patched(image: Tensor) -> None:
    model = vit()
    plain = vt.detached(model)
    red = vt.patch(model, "tome", r=2)
    torch.manual_seed(3)
    model.reset_classifier(7, "avg")
    assert run(model, image).shape == (2, 7)
    merged = model.forward_features(image)
    with torch.no_grad():
        by_hand = model.head(model.fc_norm(state_of(merged).restore(merged)[:, 1:].mean(dim=1)))
    torch.testing.assert_close(run(model, image), by_hand, rtol=1e-10, atol=1e-10)
    head = model.head
    red.unpatch()
    assert model.head is head
    plain.reset_classifier(7, "avg")
    plain.head = head
    assert torch.equal(run(model, image), run(plain, image))


def test_removing_the_attention_pool_while_patched(image: Tensor) -> None:
    model = vit(global_pool="map")
    with vt.patched(model, "tome", r=2):
        run(model, image)
        model.reset_classifier(3, "token")
        assert run(model, image).shape == (2, 3)


# ---- sizes and grids


@dataclass(frozen=True)
class Grids(Reducer):
    """Notes the grid that it is offered, and drops as many tokens as it is told."""

    seen = []
    needs = (Signal.GRID, Signal.HIDDEN)

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> Any:
        self.seen.append(signals.GRID)
        index = torch.arange(state.prefix, state.n - (budget or 0)).expand(state.batch, -1)
        return vt.TokenMap.keep(index, state.n, state.prefix)


@pytest.fixture
def grids() -> list[Any]:
    Grids.seen.clear()
    return Grids.seen


@pytest.mark.parametrize(
    ("options", "size", "grid"),
    [
        ({}, (32, 32), (4, 4)),
        ({"img_size": (32, 48)}, (32, 48), (4, 6)),
        ({"dynamic_img_size": True}, (32, 48), (4, 6)),
        ({"dynamic_img_size": True, "pre_norm": True}, (16, 64), (2, 8)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True, "reg_tokens": 2}, (30, 41), (4, 6)),
        ({"dynamic_img_size": True, **GAP}, (8, 8), (1, 1)),
    ],
)
def test_the_grid_follows_the_input(grids: list[Any], options: Any, size: Any, grid: Any) -> None:
    model, x = vit(**options), torch.randn(2, 3, *size, dtype=torch.float64)
    before = run(model, x)
    items = grid[0] * grid[1]
    with vt.patched(model, Grids(r=[1]), trace=True) as red:
        run(model, x)
        removed = min(1, items - 1)
        assert grids == [grid] * removed
        assert red.tokens == [items - removed + model.num_prefix_tokens] * DEPTH
        assert all(step.grid == grid for step in red.trace)
        assert red.report((3, *size)).tokens_in == items + model.num_prefix_tokens
    with vt.patched(model, "tome", r=2, restore="gather"):
        assert model.forward_features(x).shape[1] == items + model.num_prefix_tokens
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [tuple(y.shape) for y in maps] == [(2, DIM, *grid)] * DEPTH
    assert torch.equal(run(model, x), before)


def test_the_grid_after_set_input_size(grids: list[Any]) -> None:
    model = vit()
    with vt.patched(model, Grids(r=[1])) as red:
        # As many patches as before, in another shape.
        model.set_input_size((16, 64))
        run(model, torch.randn(2, 3, 16, 64, dtype=torch.float64))
        model.set_input_size((48, 48))
        run(model, torch.randn(2, 3, 48, 48, dtype=torch.float64))
        assert grids == [(2, 8), (6, 6)]
        assert red.tokens[-1] == 36


def test_a_grid_that_is_gone_is_a_clear_error(image: Tensor) -> None:
    with (
        vt.patched(vit(), Grids(r=2)) as red,
        pytest.raises(IncompatibleError, match="the 14 tokens at layer 1 form no grid .*grid-based reducer first"),
    ):
        run(red.model, image)


# ---- feature maps

FEATURES: list[dict[str, Any]] = [
    {},
    {"indices": 2},
    {"indices": [0, 2]},
    {"indices": [1], "stop_early": True},
    {"norm": True},
    {"return_prefix_tokens": True},
    {"intermediates_only": True},
    {"output_dict": True},
    {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True, "indices": [3]},
    {"return_prefix_tokens": True, "norm": True, "stop_early": True, "indices": [0, 1]},
]
MODELS: dict[str, Callable[[], Any]] = {
    "class token": VARIANTS["class token"],
    "no prefix": VARIANTS["no class token"],
    "registers": VARIANTS["4 registers, no class token"],
    "no final norm": VARIANTS["no final norm"],
}


def flat(value: Any) -> list[tuple[str, Tensor]]:
    """Leaves of a forward_intermediates result with their places."""
    if isinstance(value, Tensor):
        return [("", value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(f"{type(value).__name__}.{key}{place}", leaf) for key, item in items for place, leaf in flat(item)]


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("which", list(MODELS))
@torch.no_grad()
def test_intermediates_without_reduction_are_the_hosts(image: Tensor, which: str, fmt: str) -> None:
    model = MODELS[which]()
    for options in FEATURES:
        before = flat(model.forward_intermediates(image, output_fmt=fmt, **options))
        for restore in (None, "gather", "zero"):
            with vt.patched(model, "tome", r=0, restore=restore):
                after = flat(model.forward_intermediates(image, output_fmt=fmt, **options))
            assert [place for place, _ in after] == [place for place, _ in before], options
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(after, before)), options


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("which", list(MODELS))
@torch.no_grad()
def test_restored_intermediates_have_the_hosts_form(image: Tensor, which: str, fmt: str) -> None:
    model = MODELS[which]()
    for options in FEATURES:
        before = flat(model.forward_intermediates(image, output_fmt=fmt, **options))
        for reducer, restore in (("tome", "gather"), ("random", "gather"), ("random", "zero")):
            with vt.patched(model, reducer, r=2, restore=restore):
                after = flat(model.forward_intermediates(image, output_fmt=fmt, **options))
            assert [(place, y.shape) for place, y in after] == [(place, y.shape) for place, y in before], options


@pytest.mark.parametrize("reducer", ["tome", "random"])
@pytest.mark.parametrize("which", list(MODELS))
@torch.no_grad()
def test_dense_maps_hold_the_value_of_each_patchs_slot(image: Tensor, which: str, reducer: str) -> None:
    model = MODELS[which]()
    prefix = model.num_prefix_tokens
    with vt.patched(model, reducer, r=2, trace=True) as red:
        short = model.forward_intermediates(image, output_fmt="NLC", intermediates_only=True)
        origins = [step.origin.long() for step in red.trace]
        dense = model.forward_intermediates(image, intermediates_only=True)
        taken = model.get_intermediate_layers(image, n=DEPTH, reshape=True)
        rows = model.get_intermediate_layers(image, n=DEPTH)
    assert [y.shape[1] for y in short] == [14, 12, 10, 8]
    for layer in range(DEPTH):
        assert torch.equal(taken[layer], dense[layer])
        assert torch.equal(rows[layer], short[layer])
        for b in range(2):
            for patch in range(16):
                slot = int(origins[layer][b, prefix + patch])
                value = dense[layer][b, :, patch // 4, patch % 4]
                if slot >= 0:
                    assert torch.equal(value, short[layer][b, slot - prefix])
                else:
                    assert (short[layer][b] == value).all(dim=1).any()


@torch.no_grad()
def test_zero_restore_blanks_what_was_dropped(image: Tensor) -> None:
    model = vit()
    with vt.patched(model, "random", r=2, restore="zero", trace=True) as red:
        features = model.forward_features(image)
        (dense,) = model.forward_intermediates(image, indices=[DEPTH - 1], norm=True, intermediates_only=True)
        gone = red.trace[-1].origin < 0
    assert gone.sum(dim=1).tolist() == [8, 8]
    assert not features[gone].any()
    assert features[~gone].any(dim=1).all()
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), features[:, 1:])


@torch.no_grad()
def test_features_only_models(image: Tensor) -> None:
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, **{k: SMALL[k] for k in list(SMALL)[:5]})
    model = model.eval().double()
    before = model(image)
    with vt.patched(model, "tome", r=0):
        assert all(torch.equal(a, b) for a, b in zip(model(image), before))
    with vt.patched(model, "tome", r=2) as red:
        after = model(image)
        assert red.model is not model
        assert [y.shape for y in after] == [y.shape for y in before]
        assert not torch.equal(after[-1], before[-1])
    assert all(torch.equal(a, b) for a, b in zip(model(image), before))


# ---- masks


def test_masks_are_the_hosts_until_tokens_move(image: Tensor) -> None:
    model = vit()
    mask = torch.randn(1, 1, 17, 17, dtype=torch.float64)
    before = model.forward_features(image, attn_mask=mask)
    with vt.patched(model, "tome", r=0):
        assert torch.equal(model.forward_features(image, attn_mask=mask), before)
    with (
        vt.patched(model, "tome", r=[2]),
        pytest.raises(IncompatibleError, match="block 0: attn_mask was given but tokens are merged or dropped here"),
    ):
        model.forward_features(image, attn_mask=mask)
    for reducer in ("random", vt.reducers.ToMe(prop_attn=False)):
        # Without a bias the later blocks are idle, yet the mask is of another length by then.
        blocks = [model._pos_embed(model.patch_embed(image))]
        with vt.patched(model, reducer, r=[2]):
            blocks.append(model.blocks[0](blocks[0]))
            with pytest.raises(IncompatibleError, match="block 1: attn_mask was given"):
                model.blocks[1](blocks[1], attn_mask=mask)


@pytest.mark.skipif(not hasattr(tv, "resolve_self_attn_mask"), reason="this timm has no is_causal")
def test_causal_attention_is_the_hosts_until_tokens_move(image: Tensor) -> None:
    model = vit()
    before = model.forward_features(image, is_causal=True)
    with vt.patched(model, "tome", r=0):
        assert torch.equal(model.forward_features(image, is_causal=True), before)
    with vt.patched(model, "tome", r=2), pytest.raises(IncompatibleError, match="block 0: is_causal was given"):
        model.forward_features(image, is_causal=True)


# ---- refusals


class OwnAttention(Attention):
    def forward(self, x: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        return 2.0 * super().forward(x, attn_mask=attn_mask, **kwargs)


class QuietAttention(Attention):
    """A subclass that leaves forward alone."""


class OwnBlock(tv.Block):
    def forward(self, x: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        return -super().forward(x, attn_mask=attn_mask, **kwargs)


class QuietBlock(tv.Block):
    """A subclass that leaves forward alone."""


def test_an_attention_with_its_own_forward_offers_no_keys(image: Tensor) -> None:
    model = vit(attn_layer=OwnAttention)
    assert vt.supports("tome", model).missing == ("KEY",)
    with vt.patched(model, "random", r=[4]):
        found, kept = run(model, image), after_block(model, 0, image)
    torch.testing.assert_close(found, rest(model, kept.clone()), rtol=1e-9, atol=1e-9)


def test_one_strange_attention_is_enough(image: Tensor) -> None:
    model = vit()
    model.blocks[2].attn = OwnAttention(DIM, num_heads=HEADS).double()
    assert vt.supports("tome", model).missing == ("KEY",)
    assert vt.supports("random", model)


def test_a_block_with_its_own_forward_is_refused(image: Tensor) -> None:
    model = vit()
    model.blocks[1].__class__ = OwnBlock
    before = run(model, image)
    for reducer in ("tome", "random", "identity"):
        message = r"blocks\.1 is a OwnBlock with a forward of its own; visiontok runs the blocks Block, ResPostBlock"
        with pytest.raises(IncompatibleError, match=message):
            vt.patch(model, reducer)
    assert torch.equal(run(model, image), before)


# ---- parallel blocks, differential attention


@pytest.mark.parametrize("name", ["ParallelScaling", "DiffParallelScaling"])
@torch.no_grad()
def test_a_parallel_block_reduces_after_its_sum(image: Tensor, name: str) -> None:
    if name not in VARIANTS:
        pytest.skip("this timm has no differential attention")
    model = VARIANTS[name]()
    whole = after_block(model, 0, image)
    block = model.blocks[0]
    embedded = model._pos_embed(model.patch_embed(image))
    with vt.patched(model, "tome", r=[5], trace=True) as red:
        found = after_block(model, 0, image)
        (step,) = red.trace
        keys = block._visiontok_parts(embedded)[2]
    assert (step.layer, str(step.site), step.tokens) == (0, "MID", 12)
    torch.testing.assert_close(found, step.map.reduce(whole), rtol=1e-12, atol=1e-12)
    raw = block.in_proj(block.in_norm(embedded)).split(block.in_split, dim=-1)[2]
    assert torch.equal(keys, raw.unflatten(-1, (HEADS, -1)).transpose(1, 2))
    signals = vt.Signals.of(KEY=keys, HIDDEN=whole)
    alone = vt.reducers.ToMe(r=5).decide(signals, vt.TokenState.initial(whole, 1), 5)
    assert torch.equal(alone.assign, step.map.assign)


@pytest.mark.skipif(not hasattr(tv, "DiffAttention"), reason="this timm has no differential attention")
def test_differential_attention_offers_keys_but_no_rows(image: Tensor) -> None:
    model = vit(attn_layer="diff")
    assert vt.supports("tome", model)
    assert vt.supports("evit", model).missing == ("ATTN_PREFIX",)
    assert vt.supports("evit", vit(block_fn=tv.DiffParallelScalingBlock)).missing == ("ATTN_PREFIX",)
    assert vt.supports("evit", vit(block_fn=tv.ParallelScalingBlock))
    # Both halves of a head, side by side.
    x = torch.randn(2, 17, DIM, dtype=torch.float64)
    with vt.patched(model, "tome", r=2):
        attn = model.blocks[0].attn
        key = attn._visiontok_qkv(x)[1]
    assert torch.equal(key, attn.qkv(x)[..., DIM : 2 * DIM].unflatten(-1, (HEADS, -1)).transpose(1, 2))


def test_quiet_subclasses_work_like_their_base(image: Tensor) -> None:
    found = []
    for options in ({}, {"attn_layer": QuietAttention, "block_fn": QuietBlock}):
        model = vit(**options)
        with vt.patched(model, "tome", r=2):
            assert isinstance(model.blocks[0], options.get("block_fn", tv.Block))
            found.append(run(model, image))
    assert torch.equal(found[0], found[1])


def test_a_subclass_of_the_model_is_of_the_family(image: Tensor) -> None:
    class Mine(tv.VisionTransformer):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return 3.0 * super().forward(x, **kwargs)

    mine, base = vit(Mine), vit()
    with vt.patched(mine, "tome", r=2), vt.patched(base, "tome", r=2):
        torch.testing.assert_close(run(mine, image), 3.0 * run(base, image))


# ---- compute


@pytest.fixture(scope="module")
def deit_small() -> Any:
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224").eval()


@pytest.mark.parametrize(("r", "gmacs"), [(8, 3.42), (13, 2.70), (16, 2.29)])
def test_report_of_deit_small_is_the_papers(deit_small: Any, r: int, gmacs: float) -> None:
    with vt.patched(deit_small, "tome", r=r) as red:
        report = red.report()
    assert report.gmacs_before == pytest.approx(4.6, abs=0.05)
    assert report.gmacs_after == pytest.approx(gmacs, abs=0.01)
    assert report.tokens_in == 197
    assert report.tokens[:11] == [197 - r * (i + 1) for i in range(11)]
    assert report.tokens[11] == report.tokens[10] - min(r, (report.tokens[10] - 1) // 2)
    assert report.ideal_speedup == pytest.approx(report.gmacs_before / report.gmacs_after)
    assert sum(after for _, after in report.layers) < report.gmacs_after
    assert 0 < report.gmacs_matcher < 0.05
    for text in (f"model: {report.gmacs_before:.3f} -> {report.gmacs_after:.3f} GMACs", "matcher: 0.0"):
        assert text in str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_target_compute_is_met(dtype: torch.dtype) -> None:
    model = vit(img_size=64).to(dtype)
    with vt.patched(model, "tome", r=0) as red:
        full = red.report().gmacs_before
    with vt.patched(model, "tome", gflops=0.7 * full) as red:
        report = red.report()
    assert report.gmacs_before == full
    assert 0.67 * full < report.gmacs_after <= 0.7 * full


def test_report_leaves_model_and_notes_alone(image: Tensor) -> None:
    model = vit(global_pool="map")
    with vt.patched(model, "tome", r=2, trace=True) as red:
        reduced, tokens, trace = run(model, image), red.tokens, red.trace
        red.report((3, 32, 32))
        assert (red.tokens, red.trace) == (tokens, trace)
        assert torch.equal(run(model, image), reduced)
        assert all(not p.is_meta and p.requires_grad for p in model.parameters())
