"""Vision encoders of transformers: bit-equal at r=0, equal to the method by hand, outputs and consumers."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import tiny
from torch import Tensor
from torch.utils._pytree import tree_leaves

import visiontok as vt
from visiontok import backbones
from visiontok.backbones.hf_vit import clip_vision_keys
from visiontok.errors import IncompatibleError, ParameterError
from visiontok.ops.attention import fold_bias

BEIT = {"use_mask_token": False, "drop_path_rate": 0.0}
BIASED = {**BEIT, "use_relative_position_bias": True}
SHARED = {**BEIT, "use_shared_relative_position_bias": True}
CLIP = {"vision_config": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "image_size": 32}}
CLIP["vision_config"] |= {"num_attention_heads": 3, "patch_size": 8, "projection_dim": 16}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 600, "max_position_embeddings": 77, "projection_dim": 16}

# package, configuration, model, options
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "vit": ("vit", "ViTConfig", "ViTModel", {}),
    "vit_dense": ("vit", "ViTConfig", "ViTForMaskedImageModeling", {"encoder_stride": 8}),
    "msn": ("vit_msn", "ViTMSNConfig", "ViTMSNModel", {}),
    "deit": ("deit", "DeiTConfig", "DeiTModel", {}),
    "mae": ("vit_mae", "ViTMAEConfig", "ViTMAEModel", {"mask_ratio": 0.5, "decoder_hidden_size": 32}),
    "ijepa": ("ijepa", "IJepaConfig", "IJepaForImageClassification", {}),
    "dinov2": ("dinov2", "Dinov2Config", "Dinov2ForImageClassification", {"mlp_ratio": 2}),
    "dinov2_maps": ("dinov2", "Dinov2Config", "Dinov2Backbone", {"mlp_ratio": 2, "out_indices": [2, 4]}),
    "registers": ("dinov2_with_registers", "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"mlp_ratio": 2}),
    "dinov3": ("dinov3_vit", "DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 4}),
    "dinov3_maps": ("dinov3_vit", "DINOv3ViTConfig", "DINOv3ViTBackbone", {"num_register_tokens": 4}),
    "clip": ("clip", "CLIPVisionConfig", "CLIPVisionModel", {"projection_dim": 16}),
    "clip_mean": ("clip", "CLIPConfig", "CLIPForImageClassification", {**CLIP, "text_config": TEXT}),
    "metaclip": ("metaclip_2", "MetaClip2VisionConfig", "MetaClip2VisionModel", {}),
    "siglip": ("siglip", "SiglipVisionConfig", "SiglipVisionModel", {}),
    "siglip2": ("siglip2", "Siglip2VisionConfig", "Siglip2VisionModel", {"num_patches": 36}),
    "beit": ("beit", "BeitConfig", "BeitModel", BIASED),
    "beit_shared": ("beit", "BeitConfig", "BeitForImageClassification", SHARED),
    "beit_maps": ("beit", "BeitConfig", "BeitBackbone", {**BIASED, "add_fpn": False}),
}  # fmt: skip


@functools.cache
def _model(name: str, impl: str) -> Any:
    package, config, model, options = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny(package, config, model, **options, attn_implementation=impl)


def make(name: str, impl: str = "sdpa") -> Any:
    """A copy that a test may change."""
    return copy.deepcopy(_model(name, impl))


def inputs(name: str, batch: int = 2, side: int = 32) -> dict[str, Tensor]:
    """Random inputs; of SigLIP 2 with one padded image."""
    noise = torch.Generator().manual_seed(1)
    if name == "siglip2":
        mask = torch.ones(batch, 20, dtype=torch.int64)
        mask[0, 15:] = 0
        shapes = torch.tensor([[3, 5]] + [[4, 5]] * (batch - 1))
        pixels = torch.randn(batch, 20, 192, generator=noise)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    given = {"pixel_values": torch.randn(batch, 3, side, side, generator=noise)}
    return given | ({"noise": torch.rand(batch, 16, generator=noise)} if name == "mae" else {})


def double(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in tree.items()}


def run(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return model(**given, **options)


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def layers(model: Any) -> list[Any]:
    backbone = backbones.find(model)
    assert backbone is not None
    return [block.module for block in backbone.blocks(model)]


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_without_a_budget_every_bit_is_the_hosts(name: str, impl: str) -> None:
    model, given = make(name, impl), inputs(name)
    keys = list(model.state_dict())
    want = run(model, given, output_hidden_states=True)
    with vt.patched(model, "tome", r=0) as red:
        got = run(model, given, output_hidden_states=True)
        assert list(model.state_dict()) == keys
        assert red.plan.length == red.tokens[0] or name == "siglip2"
    assert got.keys() == want.keys()
    assert all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(want), strict=True))
    with vt.patched(model, "tome", r=3):
        less = tensors(run(model, given, output_hidden_states=True))
    assert not any(hasattr(y, "_visiontok_state") or hasattr(y, "_visiontok_grid") for y in less)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(less, tensors(want)))
    again = run(model, given, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(want), strict=True))


# ---- one step of ToMe by hand


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def turned(x: Tensor, coords: Tensor, inv_freq: Tensor, lead: int) -> Tensor:
    """DINOv3's rotation of (B, H, N, d) for patches at normalised (y, x)."""
    angle = (2 * math.pi * coords.unsqueeze(-1) * inv_freq).flatten(2).tile(2).unsqueeze(1)
    first, second = x[:, :, lead:].chunk(2, dim=-1)
    patches = x[:, :, lead:] * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()
    return torch.cat((x[:, :, :lead], patches), dim=2)


def by_hand(model: Any, x: Tensor, reducer: Any, size: Tensor, kind: str, rule: str, lead: int) -> tuple[Tensor, Any]:
    """The output of a model of two layers of which the first merges, from embeddings x and sizes (B, N, 1)."""
    table = layers(model)
    members = [[[j] for j in range(x.shape[1])] for _ in x]
    anchors = [list(range(x.shape[1])) for _ in x]
    cells = torch.tensor([[i // 4, i % 4] for i in range(16)], dtype=x.dtype)
    for index, layer in enumerate(table):
        attn = layer.self_attn if kind == "clip" else layer.attention
        names = {"dino": ("norm1", "norm2"), "clip": ("layer_norm1", "layer_norm2")}
        first, second = names.get(kind, ("layernorm_before", "layernorm_after"))
        normed = getattr(layer, first)(x)
        q, k, v = (split(part(normed), 3) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        if rule and kind == "dino":
            places = [[anchors[b][i : i + 1] if rule == "gather" else m for i, m in enumerate(members[b])] for b in
                      range(len(x))]  # fmt: skip
            where = [[cells[[j - lead for j in group]].mean(dim=0) for group in row[lead:]] for row in places]
            coords = (torch.stack([torch.stack(row) for row in where]) + 0.5) / 4 * 2 - 1
            q, k = (turned(part, coords, model.rope_embeddings.inv_freq.double(), lead) for part in (q, k))
        logits = q @ k.mT / math.sqrt(q.shape[-1]) + size.log().view(len(x), 1, 1, -1)
        if kind == "beit":
            full = layer.relative_position_bias((4, 4))[0]
            for b, row in enumerate(members):
                for i, mine in enumerate(row):
                    for j, other in enumerate(row):
                        pairs = full[:, mine][:, :, other].mean(dim=(1, 2))
                        pairs = full[:, anchors[b][i], anchors[b][j]] if rule == "gather" else pairs
                        logits[b, :, i, j] += pairs
        y = (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        y = (attn.out_proj if kind == "clip" else attn.o_proj)(y)
        gain = {"dino": lambda n, of: getattr(of, f"layer_scale{n}").lambda1,
                "beit": lambda n, of: getattr(of, f"lambda_{n}")}.get(kind, lambda n, of: 1)  # fmt: skip
        x = x + y * gain(1, layer)
        if index == 0:
            state = vt.TokenState.initial(x, prefix=lead).changed(size=size, padded=bool((size == 0).any()))
            tm = reducer.decide(vt.Signals.of(KEY=k), state)
            merged = [[[i for i, s in enumerate(row) if s == slot] for slot in range(tm.K)] for row in
                      tm.assign.tolist()]  # fmt: skip
            share = [[size[b, g] / size[b, g].sum().clamp_min(1e-300) for g in row] for b, row in enumerate(merged)]
            x = torch.stack([torch.stack([(x[b, g] * w).sum(0) for g, w in zip(row, share[b])]) for b, row in
                             enumerate(merged)])  # fmt: skip
            size = torch.stack([torch.stack([size[b, g].sum(0) for g in row]) for b, row in enumerate(merged)])
            members, anchors = merged, tm.kept.tolist()
        x = x + layer.mlp(getattr(layer, second)(x)) * gain(2, layer)
    return x, size


@pytest.mark.parametrize(
    ("name", "kind", "rule"),
    [("vit", "vit", ""), ("dinov2", "dino", ""), ("clip", "clip", ""), ("siglip2", "clip", "")]
    + [("dinov3", "dino", "mean"), ("dinov3", "dino", "gather"), ("beit", "beit", "mean"), ("beit", "beit", "gather")],
)
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_one_merge_equals_the_method_by_hand(name: str, kind: str, rule: str, impl: str) -> None:
    model, given = make(name, impl).double(), double(inputs(name))
    encoder = model.dinov2 if name == "dinov2" else model
    stack = layers(model)
    container = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and m[0] is stack[0])
    del container[2:]
    options = {"positions": rule} if rule else {}
    reducer = vt.reducers.create("tome", r=[5, 0], **options)
    backbone: Any = backbones.find(model)
    with torch.no_grad():
        if name == "siglip2":
            x = encoder.embeddings(given["pixel_values"], given["spatial_shapes"])
            size = given["pixel_attention_mask"].double().unsqueeze(-1)
        else:
            x = encoder.embeddings(given["pixel_values"])
            x = encoder.pre_layrnorm(x) if kind == "clip" else x
            size = x.new_ones(*x.shape[:2], 1)
        budget = vt.reducers.create("tome", r=5)
        want, sizes = by_hand(encoder, x, budget, size, kind, rule, backbone.prefix(model))
    with vt.patched(model, reducer, trace=True) as red:
        got = run(model, given, output_hidden_states=True).hidden_states[-1]
        assert red.tokens == [x.shape[1] - 5] * 2
        torch.testing.assert_close(red.trace[0].size.double(), sizes, rtol=0, atol=0)
    live = sizes > 0
    assert live.all() == (name != "siglip2")
    # Some eager functions take the softmax, and DINOv3 its coordinates, in fp32.
    limit = 1e-6 if impl == "eager" or name == "dinov3" else 1e-9
    torch.testing.assert_close(got * live, want * live, rtol=limit, atol=limit)


# ---- attention that takes no mask


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_folded_bias_is_the_bias(dtype: torch.dtype, limit: float) -> None:
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, 20, generator=noise, dtype=torch.float64).to(dtype) for _ in range(3))
    bias = torch.randint(1, 200, (2, 1, 1, 11), generator=noise).double().log()
    bias[0, ..., 3] = -math.inf
    folded = fold_bias(q, k, v, bias.float() if dtype != torch.float64 else bias, 0.2)
    assert {tuple(part.shape) for part in folded} == {(2, 3, 11, 24)}
    assert all(part.isfinite().all() and part.dtype == dtype for part in folded)
    got = F.scaled_dot_product_attention(*(part.double() for part in folded), scale=0.2)[..., :20]
    want = F.scaled_dot_product_attention(*(p.double() for p in (q, k, v)), attn_mask=bias, scale=0.2)
    assert (got - want).abs().max() < limit
    with pytest.raises(ParameterError, match="one value per key"):
        fold_bias(q, k, v, bias.expand(-1, -1, 11, -1), 0.2)


def flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """A kernel that takes no mask."""
    if mask is not None:
        raise ValueError("this attention takes no mask")
    return F.scaled_dot_product_attention(q, k, v, scale=options["scaling"]).transpose(1, 2), None


@pytest.fixture
def stub() -> Iterator[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["flash_stub"] = flash
    yield "flash_stub"
    del ALL_ATTENTION_FUNCTIONS["flash_stub"]


@pytest.mark.parametrize("name", ["vit", "clip", "dinov3"])
def test_kernels_without_masks_get_the_bias_folded_in(name: str, stub: str) -> None:
    model, given = make(name), inputs(name)
    with vt.patched(model, "tome", r=3):
        want = run(model, given).last_hidden_state
        model.config._attn_implementation = stub
        got = run(model, given).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_kernels_without_masks_cannot_take_a_bias_per_pair(stub: str) -> None:
    model = make("beit")
    model.config._attn_implementation = stub
    with pytest.raises(IncompatibleError, match=r"layers\.0 has a relative position bias.*flash_stub"):
        vt.patch(model, "tome", r=3)


# ---- what comes out


def test_hidden_states_are_what_the_layers_returned_or_full_length() -> None:
    from transformers.utils import output_capturing

    model, given = make("vit"), inputs("vit")
    seen: list[Tensor] = []
    with vt.patched(model, "tome", r=3) as red:
        hooks = [layer.register_forward_hook(lambda *call: seen.append(call[-1].clone())) for layer in layers(model)]
        got = run(model, given, output_hidden_states=True)
        assert [h.shape[1] for h in got.hidden_states] == [17, *red.tokens]
        assert all(torch.equal(a, b) for a, b in zip(got.hidden_states[1:], seen, strict=True))
        if hasattr(output_capturing, "selected_hidden_states"):
            some = run(model, given, output_hidden_states=[1, -1]).hidden_states
            assert [h is None for h in some] == [True, False, True, True, False]
        as_tuple = run(model, given, return_dict=False)
        assert torch.equal(as_tuple[0], got.last_hidden_state)
    for hook in hooks:
        hook.remove()
    for mode in ("gather", "zero"):
        with vt.patched(model, "topk", r=3, restore=mode, trace=True) as red:
            full = run(model, given, output_hidden_states=True)
            dropped = red.trace[0].origin < 0
        assert {h.shape[1] for h in (*full.hidden_states, full.last_hidden_state)} == {17}
        gone = full.hidden_states[red.trace[0].layer + 1][dropped]
        assert len(gone) == 6
        assert bool(gone.any()) == (mode == "gather")


def test_attentions_are_the_maps_that_were_used() -> None:
    model, given = make("vit", "eager"), inputs("vit")
    with vt.patched(model, "tome", r=3):
        got = run(model, given, output_attentions=True)
    assert [tuple(a.shape) for a in got.attentions] == [(2, 3, n, n) for n in (17, 14, 11, 8)]
    for attention in got.attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:3]))


@pytest.mark.parametrize("name", ["vit", "clip", "dinov3", "beit", "beit_shared"])
def test_other_image_sizes_keep_their_grid_and_positions(name: str) -> None:
    model = make(name)
    given = {"pixel_values": torch.randn(1, 3, 24, 48)}
    options = {"output_hidden_states": True}
    options |= {} if name == "dinov3" else {"interpolate_pos_encoding": True}
    want = run(model, given, **options).hidden_states[-1]
    # Tokens that are not merged in the last layer have seen what they see in the host.
    with vt.patched(model, "tome", r=[0, 0, 0, 2], trace=True) as red:
        got = run(model, given, **options).hidden_states[-1]
        (step,) = red.trace
    assert step.grid == (3, 6)
    assert got.shape[1] == red.plan.prefix + 18 - 2
    alone = [slot for slot in step.origin[0].tolist() if step.size[0, slot, 0] == 1]
    places = [i for i, slot in enumerate(step.origin[0].tolist()) if slot in alone]
    assert len(alone) >= 14
    torch.testing.assert_close(got[0, alone], want[0, places], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "ijepa", "clip_mean", "siglip", "beit_shared", "siglip2"])
@pytest.mark.parametrize("proportional", [True, False])
def test_consumers_see_each_token_as_often_as_it_has_members(name: str, proportional: bool) -> None:
    model, given = make(name).double(), double(inputs(name))
    if name == "siglip2":
        given["pixel_attention_mask"][:] = 1
        given["spatial_shapes"][:] = torch.tensor([4, 5])
    options = {"r": 3, "prop_attn": proportional}
    encoder = next(m for m in model.modules() if hasattr(m, "embeddings"))
    with vt.patched(model, "tome", **options):
        got = run(model, given)
    with vt.patched(encoder, "tome", **options, restore="gather"):
        full = run(encoder, given).last_hidden_state
    with torch.no_grad():
        if name in ("siglip", "siglip2"):
            want, found = model.head(full), got.pooler_output
        elif name == "beit_shared":
            want, found = model.classifier(encoder.pooler(full)), got.logits
        else:
            lead = {"dinov2": 1, "clip_mean": 1}.get(name, 0)
            mean = full[:, lead:].mean(dim=1)
            want = model.classifier(torch.cat((full[:, 0], mean), dim=1) if name == "dinov2" else mean)
            found = got.logits
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_dense_consumers_see_restored_tokens() -> None:
    for name, shape in (("dinov2_maps", (2, 48, 4, 4)), ("beit_maps", (2, 48, 4, 4)), ("dinov3_maps", (2, 48, 4, 4))):
        with vt.patched(make(name), "tome", r=3) as red:
            maps = run(red.model, inputs(name)).feature_maps
        assert {tuple(y.shape) for y in maps} == {shape}
        assert len(maps[-1].flatten(2)[0].unique(dim=1).T) == 16 - 4 * 3
    with vt.patched(make("vit_dense"), "tome", r=3) as red:
        assert run(red.model, inputs("vit")).reconstruction.shape == (2, 3, 32, 32)
    package, config, _, options = MODELS["mae"]
    model = tiny(package, config, "ViTMAEForPreTraining", **options)
    with vt.patched(model, "tome", r=2) as red:
        assert run(red.model, inputs("mae")).logits.shape == (2, 16, 192)
        assert red.tokens == [7, 5, 3, 2]


def test_padding_never_reaches_live_tokens() -> None:
    model, given = make("siglip2").double(), double(inputs("siglip2"))
    other = {**given, "pixel_values": given["pixel_values"].clone()}
    with vt.patched(model, "random", r=3, seed=0):
        want = run(model, given).pooler_output
        other["pixel_values"][0, 15:] += 1e3
        got = run(model, other).pooler_output
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_padding_may_be_given_and_other_masks_may_not() -> None:
    model, given = make("vit").double(), double(inputs("vit"))
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[:, 9:] = 0
    want = run(model, given, attention_mask=mask).last_hidden_state
    with vt.patched(model, "tome", r=0):
        assert torch.equal(run(model, given, attention_mask=mask).last_hidden_state, want)
    other = {"pixel_values": given["pixel_values"].clone()}
    other["pixel_values"][:, :, 16:] += 1e3
    with vt.patched(model, "random", r=[0, 2, 2, 0], seed=0) as red:
        first, second = (run(model, x, attention_mask=mask).pooler_output for x in (given, other))
        assert red.tokens == [17, 15, 13, 13]
        square = mask[:, None, None].bool().expand(-1, -1, 17, -1)
        with pytest.raises(IncompatibleError, match=r"shape \(2, 1, 17, 17\)"):
            run(model, given, attention_mask=square)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)
    shared = make("beit_shared")
    with vt.patched(shared.beit, "tome", r=3), pytest.raises(IncompatibleError, match="shared position bias"):
        run(shared.beit, inputs("vit"), attention_mask=mask)


def test_layers_with_a_forward_of_their_own_are_refused() -> None:
    model = make("vit")

    class Strange(type(model.layers[1])):
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
            return hidden_states

    model.layers[1].__class__ = Strange
    with pytest.raises(IncompatibleError, match=r"layers\.1 is a Strange with a forward of its own"):
        vt.patch(model, "tome", r=3)


def test_old_clip_keys_lose_their_lead() -> None:
    one, position = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    state = {"vision_model.a.b": one, "vision_model.embeddings.position_ids": position, "text_model.a": one}
    assert clip_vision_keys(state) == {"a.b": one}
