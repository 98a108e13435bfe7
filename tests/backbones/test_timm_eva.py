"""timm's Eva in all its variants: exactness, rotary rows that follow tokens, heads, feature maps, refusals."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.layers import pos_embed_sincos as tables
from timm.layers.attention import AttentionRope
from timm.models import eva
from torch import Tensor, nn

import visiontok as vt
from visiontok.backbones.timm_eva import rotary_steps
from visiontok.core.reducer import Reducer
from visiontok.core.signals import Signal
from visiontok.errors import IncompatibleError

DEPTH = 4
SMALL = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 5}
GRID = (3, 5)
ROPE = {"use_rot_pos_emb": True}
HALF = {"rope_rotate_half": True}
XY = {"rope_grid_indexing": "xy"}
MIXED = {**ROPE, "attn_type": "rope", "rope_type": "mixed", "rope_temperature": 10.0}
DINO = {**ROPE, **HALF, "rope_type": "dinov3", "rope_temperature": 100, "num_reg_tokens": 4, "use_abs_pos_emb": False}

VARIANTS: dict[str, dict[str, Any]] = {
    "absolute": {},
    "absolute, token": {"global_pool": "token"},
    "separate bias": {"init_values": 0.3},
    "post norm": {"use_post_norm": True, "global_pool": "token"},
    "eva02": {**ROPE, "ref_feat_shape": 2, "swiglu_mlp": True, "qkv_fused": False, "scale_mlp": True,
              "scale_attn_inner": True, "global_pool": "token"},
    "registers only": {**ROPE, "class_token": False, "num_reg_tokens": 1, "use_abs_pos_emb": False, "init_values": 0.3},
    "half": {**ROPE, **HALF, "qkv_bias": False},
    "perception": {**ROPE, **XY, "attn_type": "rope", "global_pool": "map", "use_pre_transformer_norm": True,
                   "ref_feat_shape": (2, 7), "rope_grid_offset": 1.0},
    "perception, no prefix": {**ROPE, **XY, "attn_type": "rope", "global_pool": "map", "class_token": False},
    "mixed": MIXED,
    "mixed, xy": {**MIXED, **XY, "no_embed_class": True, "global_pool": "token"},
    "dinov3": {**DINO, "dynamic_img_size": True, "use_fc_norm": False, "init_values": 0.3},
    "mrope": {**ROPE, "rope_type": "mrope", "rope_mrope_section": (2, 3, 3)},
    "sapiens2": {**DINO, "attn_type": "rope", "qkv_fused": False, "num_heads": 4, "num_kv_heads": (4, 2, 2, 4),
                 "qk_norm": True, "attn_only_layer_scale": True, "init_values": 1.0, "norm_layer": RmsNorm,
                 "global_pool": "token"},
}  # fmt: skip
FEW = [(name, "gather") for name in ("eva02", "mixed")]
TURNED = [name for name, options in VARIANTS.items() if "use_rot_pos_emb" in options]


@dataclass(frozen=True)
class Listens(Reducer):
    """Asks for everything and then leaves every token alone: what runs is our attention, on the host's tokens."""

    needs = (Signal.KEY, Signal.QUERY, Signal.ATTN, Signal.GRID)

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> None:
        q, k = signals.QUERY, signals.KEY
        torch.testing.assert_close(signals.ATTN, (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1))
        assert signals.GRID == GRID


def small(**options: Any) -> Any:
    if not set(options) <= set(inspect.signature(eva.Eva).parameters):
        pytest.skip("this timm has fewer options")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = eva.Eva(**{**SMALL, **options})
        for name, parameter in model.named_parameters():
            if not name.startswith("rope"):
                nn.init.normal_(parameter, std=0.3)
    return model.eval().double()


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> Any:
    return small(**VARIANTS[request.param])


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def run(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def table_of(model: Any, grid: tuple[int, int]) -> Tensor:
    """(1 | depth, 1 | H, N, 2 D): the host's own table."""
    fixed = getattr(model.rope, "feat_shape", None) is not None
    rows = model.rope.get_embed() if fixed else model.rope.get_embed(shape=grid)
    return rows.view(*[1] * (4 - rows.dim()), *rows.shape).double()


def ropes(model: Any, x: Tensor) -> list[Tensor]:
    """(B, 1 | H, N, 2 D) what every attention was given."""
    seen: list[Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, args, given: seen.append(given["rope"]), with_kwargs=True)
        for block in model.blocks
    ]
    run(model, x)
    for hook in hooks:
        hook.remove()
    return [rope.view(*[1] * (4 - rope.dim()), *rope.shape) for rope in seen]


def places(grid: tuple[int, int]) -> Tensor:
    return torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1).reshape(-1, 2).double()


# ---- exactness


def test_zero_reduction_and_unpatching_are_bit_equal(model: Any, image: Tensor) -> None:
    before, names = run(model, image), list(model.state_dict())
    for name in ("tome", "expedite"):
        with vt.patched(model, name, r=0):
            assert torch.equal(run(model, image), before)
            assert torch.equal(model.forward_head(model.forward_features(image)), before)
            assert list(model.state_dict()) == names
    assert torch.equal(run(model, image), before)
    assert not any("_visiontok" in vars(module) for module in model.modules())


@pytest.mark.parametrize("how", ["train", "unfused", pytest.param("checkpointed", marks=pytest.mark.full)])
def test_our_attention_equals_the_hosts(model: Any, image: Tensor, how: str) -> None:
    model.train(how != "unfused")
    model.set_grad_checkpointing(how == "checkpointed")
    for block in model.blocks:
        block.attn.fused_attn &= how != "unfused"
    before = model(image)
    with vt.patched(model, Listens(r=1)):
        torch.testing.assert_close(model(image), before, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif("gated" not in inspect.signature(AttentionRope).parameters, reason="this timm has no gates")
def test_gates_and_a_bias_of_its_own(image: Tensor) -> None:
    for attn_type in ("eva", "rope"):
        model = small(**ROPE)
        for block in model.blocks:
            kind = AttentionRope if attn_type == "rope" else eva.EvaAttention
            extra = {} if attn_type == "rope" else {"qkv_bias_separate": True}
            block.attn = kind(32, 2, gated=True, norm_layer=nn.LayerNorm, scale_norm=True, **extra).double()
            for parameter in block.attn.parameters():
                nn.init.normal_(parameter, std=0.3)
        before = run(model.eval(), image)
        with vt.patched(model, Listens(r=1)):
            torch.testing.assert_close(run(model, image), before, rtol=1e-11, atol=1e-11)


@pytest.mark.full
def test_samples_do_not_depend_on_their_batch(model: Any, image: Tensor) -> None:
    with vt.patched(model, "tome", r=3) as red:
        together = run(model, image)
        assert red.tokens == red.plan.tokens
        for i in range(2):
            torch.testing.assert_close(run(model, image[i : i + 1]), together[i : i + 1], rtol=1e-11, atol=1e-11)


def test_checkpointed_gradients_are_the_same(image: Tensor) -> None:
    found: list[dict[str, Any]] = []
    for on in (False, True):
        model = small(**MIXED).train()
        model.set_grad_checkpointing(on)
        with vt.patched(model, "tome", r=3):
            model(image).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert found[0]["rope.freqs"].abs().sum() > 0
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


# ---- rotary rows

ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{kind} {indexing}": ("Cat", {
            "dim": 16, "in_pixels": kind == "pixel", "grid_type": kind, "grid_indexing": indexing, "rotate_half": half,
            "ref_feat_shape": ref, "max_res": 5, "normalize_coords": "max" if half else "separate",
            "grid_offset": 0.5, "temperature": 50.0,
        })
        for kind in ("index", "pixel", "centered")
        for indexing, half, ref in (("ij", False, None), ("xy", True, (7, 2)))
    },
    **{
        f"dinov3 {over}": ("DinoV3", {
            "dim": 16, "grid_indexing": indexing, "normalize_coords": over, "rotate_half": half,
        })
        for indexing, over, half in (("ij", "separate", True), ("xy", "min", False), ("xy", "max", True))
    },
    **{
        f"mixed {indexing}": ("Mixed", {"dim": 32, "depth": 3, "num_heads": 2, "grid_indexing": indexing})
        for indexing in ("ij", "xy")
    },
    "mrope": ("MRope", {"dim": 16, "mrope_section": (2, 3, 2)}),
}  # fmt: skip


@pytest.mark.skipif(not hasattr(tables, "_build_grid"), reason="this timm has fewer options")
@pytest.mark.parametrize(("kind", "options"), ROTARY.values(), ids=ROTARY)
@pytest.mark.parametrize("grid", [(3, 7), (6, 2)])
def test_steps_take_every_row_to_every_other(kind: str, options: dict[str, Any], grid: tuple[int, int]) -> None:
    rope = getattr(tables, f"RotaryEmbedding{kind}")(**options)
    rows = rope.get_embed(shape=grid)
    away = (places(grid)[None] - places(grid)[:, None]).float()
    for layer in range(3 if rows.dim() == 4 else 1):
        sin, cos = (rows[layer] if rows.dim() == 4 else rows).detach().chunk(2, dim=-1)
        steps = rotary_steps(rope, grid, layer).detach()
        angle = torch.einsum("ija,a...d->...ijd", away, steps)
        turned = sin[..., :, None, :] * angle.cos() + cos[..., :, None, :] * angle.sin()
        torch.testing.assert_close(turned, sin[..., None, :, :].expand_as(turned), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "rule"), [*((name, "mean") for name in TURNED), *FEW])
def test_rows_follow_their_tokens(name: str, rule: str, image: Tensor) -> None:
    model = small(**VARIANTS[name])
    table, prefix = table_of(model, GRID), model.num_prefix_tokens
    with vt.patched(model, "tome", r=3, positions=rule, trace=True) as red:
        given = ropes(model, image)
        origins = [step.origin.long() for step in red.trace]
        anchors = [step.map.kept for step in red.trace]
    assert torch.equal(given[0], table[:1].to(given[0].dtype))
    where, index = places(GRID), torch.arange(15 + prefix).expand(2, -1)
    for layer in range(1, DEPTH):
        index = index.gather(1, anchors[layer - 1])
        sin, cos = table[layer if table.shape[0] > 1 else 0].chunk(2, dim=-1)
        steps = rotary_steps(model.rope, GRID, layer).double()
        steps = steps.view(2, -1, steps.shape[-1])
        for b in range(2):
            for slot in range(given[layer].shape[2]):
                row = given[layer][b if given[layer].shape[0] > 1 else 0, :, slot]
                members = (origins[layer - 1][b, prefix:] == slot + prefix).nonzero().flatten()
                first = int(index[b, slot + prefix]) - prefix
                assert first in members
                own = torch.cat((sin[:, first], cos[:, first]), dim=-1)
                if rule == "gather" or len(members) == 1:
                    assert torch.equal(row, own.to(row.dtype))
                    continue
                away = where[members].mean(dim=0) - where[first]
                angle = torch.atan2(sin[:, first], cos[:, first]) + (away[:, None, None] * steps).sum(dim=0)
                torch.testing.assert_close(row.double(), torch.cat((angle.sin(), angle.cos()), -1), rtol=0, atol=1e-5)


def test_the_grid_of_a_dynamic_input_counts(image: Tensor) -> None:
    model = small(**VARIANTS["dinov3"])
    with vt.patched(model, "tome", r=3, trace=True) as red:
        given = ropes(model, image.transpose(2, 3))
        assert {step.grid for step in red.trace} == {(5, 3)}
        alone = [(step.origin[:, 5:, None] == step.origin[:, None, 5:]).sum(dim=2) == 1 for step in red.trace]
    rows = table_of(model, (5, 3))[0, 0]
    for layer, (single, step) in enumerate(zip(alone[:-1], red.trace)):
        for b in range(2):
            slots = step.origin[b, 5:][single[b]].long() - 5
            assert torch.equal(given[layer + 1][b, 0][slots], rows[single[b]].to(given[0].dtype))


@pytest.mark.parametrize("options", [DINO, MIXED], ids=["axial", "mixed"])
def test_patch_dropout_in_training_has_rows_of_its_own(options: Any, image: Tensor) -> None:
    model = small(**options, patch_drop_rate=0.3).train()
    with vt.patched(model, "tome", r=2, positions="gather") as red:
        model(image).sum().backward()
        assert red.tokens == [n + 10 + model.num_prefix_tokens for n in (-2, -4, -6, -8)]
        red.set(positions="mean")
        with pytest.raises(IncompatibleError, match="positions='gather'"):
            model(image)
        model.eval()
        run(model, image)


def test_coordinates_moved_in_training_stay_with_their_tokens(image: Tensor) -> None:
    model = small(**DINO, rope_shift_coords=0.5, rope_jitter_coords=1.5).train()
    with vt.patched(model, "random", r=3, trace=True) as red:
        given = ropes(model, image)
    for layer, step in enumerate(red.trace[:-1]):
        kept = (step.origin[0, 5:] >= 0).nonzero().flatten()
        assert torch.equal(given[layer + 1][0, 0], given[0][0, 0][kept])


# ---- the patch


@pytest.mark.parametrize("name", ["eva02", "mixed, xy"])
def test_copies_have_a_rope_of_their_own(name: str, image: Tensor) -> None:
    model = small(**VARIANTS[name])
    with vt.patched(model, "tome", r=3):
        after = run(model, image)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), vt.detached(model)):
            assert all(block._visiontok.aid is other.rope for block in other.blocks)
            assert other.rope is not model.rope
            assert torch.equal(run(other, image), after)
        low = copy.deepcopy(model).bfloat16()
        assert run(low, image.bfloat16()).isfinite().all()


@pytest.mark.full
@pytest.mark.parametrize("name", ["eva02", "mixed, xy", "dinov3"])
def test_compiled_without_a_break(name: str, image: Tensor) -> None:
    model = small(**VARIANTS[name])
    with vt.patched(model, "tome", r=3):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(run(compiled, image), run(model, image))


def test_pools_count_members(image: Tensor) -> None:
    for options in ({"global_pool": "avg"}, {"global_pool": "avgmax"}, {"global_pool": "max"}, VARIANTS["perception"],
                    VARIANTS["perception, no prefix"]):  # fmt: skip
        model = small(**options)
        with vt.patched(model, "tome", r=3, restore="gather"):
            expected = run(model, image)
        with vt.patched(model, "tome", r=3):
            torch.testing.assert_close(run(model, image), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("name", ["eva02", "perception, no prefix", "dinov3"])
@torch.no_grad()
def test_intermediates(name: str, fmt: str, image: Tensor) -> None:
    model = small(**VARIANTS[name])
    prefix = model.num_prefix_tokens
    for options in ({}, {"indices": [0, 2], "norm": True}, {"indices": 2, "stop_early": True},
                    {"intermediates_only": True, **({"return_prefix_tokens": True} if prefix else {})}):  # fmt: skip
        before = leaves(model.forward_intermediates(image, output_fmt=fmt, **options))
        with vt.patched(model, "tome", r=0, restore="gather"):
            same = leaves(model.forward_intermediates(image, output_fmt=fmt, **options))
        with vt.patched(model, "tome", r=3, restore="gather"):
            full = leaves(model.forward_intermediates(image, output_fmt=fmt, **options))
        with vt.patched(model, "tome", r=3):
            short = leaves(model.forward_intermediates(image, output_fmt=fmt, **options))
        assert all(torch.equal(a, b) for a, b in zip(same, before))
        assert [y.shape for y in full] == [y.shape for y in before]
        assert len(short) == len(before)
    with vt.patched(model, "tome", r=3, trace=True) as red:
        rows = model.forward_intermediates(image, output_fmt="NLC", intermediates_only=True)
        dense = model.forward_intermediates(image, intermediates_only=True)
    for y, field, step in zip(rows, dense, red.trace):
        slot = step.origin[:, prefix:].long() - prefix
        assert torch.equal(field.flatten(2).mT, y.gather(1, slot.unsqueeze(-1).expand(-1, -1, y.shape[2])))


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for item in value for leaf in leaves(item)]


@pytest.mark.skipif("attn_mask" not in inspect.signature(eva.Eva.forward).parameters, reason="this timm takes none")
def test_masks_are_the_hosts_until_tokens_move(image: Tensor) -> None:
    model = small(**ROPE)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    for given in ({"attn_mask": mask}, {"is_causal": True}):
        before = model(image, **given)
        with vt.patched(model, "tome", r=0):
            assert torch.equal(model(image, **given), before)
        with vt.patched(model, "tome", r=2), pytest.raises(IncompatibleError, match=next(iter(given))):
            model(image, **given)


# ---- refusals


def test_what_has_a_forward_or_a_table_of_its_own_is_refused(image: Tensor) -> None:
    class Other(eva.EvaBlock):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return x

    class Spiral(tables.RotaryEmbeddingCat):
        def get_embed(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().get_embed(*args, **kwargs).flip(0)

    class Named(tables.RotaryEmbeddingCat):
        pass

    class Quiet(eva.EvaBlock):
        pass

    for place, cls, message in (("blocks.1", Other, "blocks.1 is a Other"), ("rope", Spiral, "rope is a Spiral")):
        model = small(**ROPE)
        model.get_submodule(place).__class__ = cls
        with pytest.raises(IncompatibleError, match=message):
            vt.patch(model, "tome", r=2)
    model = small(**ROPE)
    model.rope.__class__, model.blocks[0].__class__ = Named, Quiet
    with vt.patched(model, "tome", r=2):
        run(model, image)


def test_an_attention_with_its_own_forward_offers_no_keys(image: Tensor) -> None:
    class Loud(eva.EvaAttention):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(x, *args, **kwargs)

    model = small(**ROPE)
    model.blocks[2].attn.__class__ = Loud
    with pytest.raises(IncompatibleError, match="KEY"):
        vt.patch(model, "tome", r=2)
    with vt.patched(model, "random", r=2):
        run(model, image)


# ---- every name of timm


def configurations() -> list[str]:
    return timm.list_models(module="eva")


def tiny(name: str) -> Any:
    options = {**SMALL, "img_size": 32, "depth": 2}
    return timm.create_model(name, **options, **({"num_kv_heads": (2, 1)} if "sapiens2" in name else {})).eval()


def test_every_name_of_timm_runs() -> None:
    assert len(configurations()) >= 30
    image, met = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)), set()
    for name in configurations():
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = tiny(name)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.1)
            known = (str(model), model.global_pool, str(vars(model.rope) if model.rope is not None else None))
            if known in met:
                continue
            met.add(known)
            before = model(image)
            with vt.patched(model, "tome", r=0):
                assert torch.equal(model(image), before), name
            with vt.patched(model, "tome", r=3) as red:
                after = model(image)
            assert torch.equal(model(image), before), name
        lead = model.num_prefix_tokens
        assert red.tokens == red.plan.tokens == [13 + lead, 10 + lead], name
        assert after.shape == before.shape, name
        assert after.isfinite().all(), name
        assert not torch.equal(after, before), name


# ---- V3

TABLE = "rope=None, attn_mask=None"
KNOWN = {
    eva.EvaBlock.forward: (f"(self, x, {TABLE})", f"(self, x, {TABLE}, is_causal=False)"),
    eva.EvaBlockPostNorm.forward: (f"(self, x, {TABLE})", f"(self, x, {TABLE}, is_causal=False)"),
    eva.EvaAttention.forward: (f"(self, x, {TABLE})", f"(self, x, {TABLE}, is_causal=False)"),
    AttentionRope.forward: (f"(self, x, {TABLE})", f"(self, x, {TABLE}, is_causal=False)"),
    eva.Eva._pos_embed: ("(self, x)",),
    eva.Eva.pool: ("(self, x, pool_type=None)",),
    eva.Eva.forward_head: ("(self, x, pre_logits=False)",),
}


@pytest.mark.parametrize("function", KNOWN, ids=lambda f: f.__qualname__)
def test_v3_signatures_are_known(function: Any) -> None:
    empty = inspect.Parameter.empty
    signature = inspect.signature(function)
    plain = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    found = str(signature.replace(parameters=plain, return_annotation=empty))
    assert found in KNOWN[function], f"timm {timm.__version__} changed {function.__qualname__}: {found}"
