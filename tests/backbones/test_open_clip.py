"""open_clip's vision towers: exactness, pools, feature maps, LoRA, timm trunks, refusals."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")

from open_clip import transformer as oc  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP, convert_weights_to_lp  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402

import visiontok as vt  # noqa: E402
from visiontok.backbones.open_clip_blocks import PatchedAttention  # noqa: E402
from visiontok.core.blocks import Tap  # noqa: E402
from visiontok.core.patching import subclass  # noqa: E402
from visiontok.core.reducer import Reducer  # noqa: E402
from visiontok.core.runtime import state_of  # noqa: E402
from visiontok.core.signals import Signal, Site  # noqa: E402
from visiontok.errors import IncompatibleError  # noqa: E402

CUSTOM: Any = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
VISION: Any = {"layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT: Any = {"context_length": 16, "vocab_size": 64, "width": 48, "heads": 3, "layers": 3}
KEYS: list[Tensor] = []


@dataclass(frozen=True)
class Listens(Reducer):
    """Asks for everything and then leaves every token alone: what runs is our attention, on the host's tokens."""

    needs = (Signal.KEY, Signal.QUERY, Signal.ATTN_PREFIX, Signal.ATTN, Signal.GRID)
    early: bool = False

    @property
    def site(self) -> Site:  # type: ignore[override]
        return Site.PRE if self.early else Site.MID

    @property
    def look(self) -> str:  # type: ignore[override]
        return "ahead" if self.early else "behind"

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> None:
        q, k = signals.QUERY, signals.KEY
        expected = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        torch.testing.assert_close(signals.ATTN, expected)
        torch.testing.assert_close(signals.ATTN_PREFIX, expected[:, :, :1])
        assert signals.GRID == (4, 4)
        KEYS.append(k)


def tower(seed: int = 0, tokens_first: bool = False, layers: int = 3, **options: Any) -> Any:
    torch.manual_seed(seed)
    width = options.pop("output_dim", 24)
    model: Any = oc.VisionTransformer(32, 8, 48, layers, 3, 2.0, output_dim=width, **options)
    if tokens_first:
        stack = oc.Transformer(48, layers, 3, 2.0, batch_first=False)
        stack.load_state_dict(model.transformer.state_dict())
        model.transformer = stack
    # These start at zero or one, where a factor or bias that is left out goes unseen.
    for name, p in model.named_parameters():
        if p.dim() == 1 or "head_scale" in name:
            p.data.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


VARIANTS: dict[str, dict[str, Any]] = {
    "cls": {"ls_init_value": 0.1},
    "custom": {"pool_type": "avg", **CUSTOM},
    "coca": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True},
    "none": {"pool_type": "none", "final_ln_after_pool": True, "output_tokens": True},
    "tokens_first": {"tokens_first": True, "pool_type": "avg"},
}


def flat(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_reduction_and_unpatching_are_bit_equal(variant: str, image: Tensor) -> None:
    model = tower(**VARIANTS[variant])
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad():
        before, features = flat(model(image)), model.forward_intermediates(image)["image_intermediates"]
        names = list(model.state_dict())
        red = vt.patch(model, "tome", r=0)
        after, again = flat(model(image)), model.forward_intermediates(image)["image_intermediates"]
        assert list(model.state_dict()) == names
        red.unpatch()
    assert all(map(torch.equal, before + features, after + again))
    assert all(state_of(y) is None for y in after + again)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("_visiontok" in vars(module) for module in model.modules())


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("variant", ["cls", "custom", "tokens_first"])
def test_our_attention_equals_the_hosts_and_its_signals_are_right(variant: str, early: bool, image: Tensor) -> None:
    model = tower(**VARIANTS[variant]).train(early)
    before = model(image)
    with vt.patched(model, Listens(r=1, early=early)):
        torch.testing.assert_close(model(image), before, rtol=1e-12, atol=1e-12)


def test_a_merge_and_the_block_after_it_by_hand(image: Tensor) -> None:
    model = tower(layers=2)
    seen: list[Tensor] = []
    model.transformer.resblocks[0].register_forward_pre_hook(lambda *call: seen.append(call[-1][0]))
    model.transformer.resblocks[1].register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad(), vt.patched(model, "tome", r=[5], trace=True) as red:
        model(image)
        assign = red.trace[0].map.assign
    with torch.no_grad():
        x, sizes = seen[0], torch.ones(3, 17, dtype=torch.float64)
        for index, block in enumerate(model.transformer.resblocks):
            h = block.ln_1(x)
            qkv = h @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
            q, k, v = (part.view(3, -1, 3, 16).transpose(1, 2) for part in qkv.split(48, dim=-1))
            logits = q @ k.transpose(-2, -1) / 4 + sizes.log()[:, None, None]
            weights = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
            y = (weights @ v).transpose(1, 2).reshape(3, -1, 48)
            x = x + y @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
            if index == 0:
                merged, counts = torch.zeros(3, 12, 48, dtype=torch.float64), torch.zeros(3, 12, dtype=torch.float64)
                for b in range(3):
                    for n in range(17):
                        merged[b, assign[b, n]] += x[b, n]
                        counts[b, assign[b, n]] += 1
                x, sizes = merged / counts.unsqueeze(-1), counts
            x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(seen[1], x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"attentional_pool": True},
        {"attentional_pool": "parallel", "output_dim": 48},
        {"attentional_pool": "cascade", "output_dim": 48},
    ],
    ids=str,
)
def test_pools_count_the_members_of_a_token(options: dict[str, Any], image: Tensor) -> None:
    pooler: Any = {"attn_pooler_heads": 2, "attn_pooler_queries": 5} if "attentional_pool" in options else {}
    model = tower(**options, **pooler)
    with torch.no_grad():
        with vt.patched(model, "tome", r=4):
            pooled = model(image)
        # The host's own pool over copies of every token.
        with vt.patched(model, "tome", r=4, restore="gather"):
            copied = model(image)
    torch.testing.assert_close(pooled, copied, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens_first", [False, True])
def test_feature_maps_are_whole_and_sequences_ragged(tokens_first: bool, image: Tensor) -> None:
    model = tower(tokens_first=tokens_first)
    with torch.no_grad(), vt.patched(model, "tome", r=4, trace=True) as red:
        maps = model.forward_intermediates(image, output_extra_tokens=True, normalize_intermediates=True)
        ragged = model.forward_intermediates(image, [0, 2], output_fmt="NLC", normalize_intermediates=True)
        assert [step.tokens for step in red.trace] == [13, 9, 5]
        slots = [step.origin[:, 1:].long() - 1 for step in red.trace]
        pooled = model(image)
    assert [y.shape[1] for y in ragged["image_intermediates"]] == [12, 4]
    for index, layer in enumerate([0, 2]):
        whole = maps["image_intermediates"][layer]
        assert whole.shape == (3, 48, 4, 4)
        expected = ragged["image_intermediates"][index].gather(1, slots[layer].unsqueeze(-1).expand(-1, -1, 48))
        assert torch.equal(whole.flatten(2).transpose(1, 2), expected)
    assert [y.shape for y in maps["image_intermediates_prefix"]] == [(3, 1, 48)] * 3
    torch.testing.assert_close(maps["image_features"], pooled)
    with torch.no_grad(), vt.patched(model, "tome", r=4, restore="gather"):
        full = model.forward_intermediates(image, 2, True, output_fmt="NLC", intermediates_only=True)
    assert [y.shape for y in full["image_intermediates"]] == [(3, 16, 48)] * 2


def test_patch_dropout_leaves_no_grid(image: Tensor) -> None:
    model = tower(patch_dropout=0.5).train()
    with vt.patched(model, "tome", r=2) as red:
        model(image)
        assert red.tokens == [7, 5, 3]


def test_cosine_attention_by_hand() -> None:
    # The host's own forward cannot run it in every version, so there is nothing to compare a whole model with.
    torch.manual_seed(0)
    attn: Any = oc.Attention(48, 3, scaled_cosine=True).double()
    nn.init.uniform_(attn.logit_scale, 1.0, 6.0)
    x, bias = torch.randn(2, 7, 48).double(), torch.randn(2, 1, 1, 7).double()
    q, k, v = (part.view(2, 7, 3, 16).transpose(1, 2) for part in (x @ attn.in_proj_weight.T).split(48, dim=-1))
    cosine = (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).transpose(-2, -1)
    weights = (cosine * attn.logit_scale.clamp(max=math.log(100)).exp() + bias).softmax(dim=-1)
    expected = attn.out_proj((weights @ v).transpose(1, 2).reshape(2, 7, 48))
    attn.__class__ = subclass(PatchedAttention, oc.Attention)
    torch.testing.assert_close(attn(x, tap=Tap(), bias=bias), expected)


@pytest.mark.parametrize("targets", [["attn"], ["c_fc", "out_proj"]], ids=str)
def test_lora_counts_in_attention_and_signals(targets: list[str], image: Tensor) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(tower(), config).double().eval()
    names = list(model.state_dict())
    before = model(image)
    block = model.base_model.model.transformer.resblocks[0]
    inputs: list[Tensor] = []
    handle = block.ln_1.register_forward_hook(lambda *call: inputs.append(call[-1]))
    for early in (False, True):
        KEYS.clear()
        inputs.clear()
        with vt.patched(model, Listens(r=1, early=early)):
            torch.testing.assert_close(model(image), before, rtol=1e-11, atol=1e-11)
        core = getattr(block.attn, "base_layer", block.attn)
        weight = core.in_proj_weight
        if "attn" in targets:
            weight = weight + block.attn.get_delta_weight("default")
        expected = inputs[0] @ weight[48:96].T + core.in_proj_bias[48:96]
        torch.testing.assert_close(KEYS[0], expected.view(3, 17, 3, 16).transpose(1, 2))
    handle.remove()
    with vt.patched(model, "tome", r=3):
        model(image).square().sum().backward()
        assert list(model.state_dict()) == names
    # torch reads the weights of out_proj past any adapter around it alone, patched or not.
    dead = {n for n, p in model.named_parameters() if "lora" in n and p.grad is None}
    assert all("out_proj" in n for n in dead)
    assert len(dead) < len([n for n in names if "lora" in n])


def test_a_whole_clip_in_one_call(tmp_path: Path, image: Tensor) -> None:
    (tmp_path / "tiny-clip.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(tmp_path)
    model, _, _ = open_clip.create_model_and_transforms("tiny-clip", pretrained=None)
    model.eval()
    with torch.no_grad():
        before = model.encode_image(image.float())
        red = vt.patch(model, "tome", r=4)
        assert red.model is model.visual
        reduced = model.encode_image(image.float())
        assert red.tokens == red.plan.tokens == [13, 9, 5]
        assert not torch.allclose(reduced, before)
        assert torch.equal(copy.deepcopy(model).encode_image(image.float()), reduced)
        assert torch.equal(pickle.loads(pickle.dumps(model)).encode_image(image.float()), reduced)
        vt.unpatch(model)
        assert torch.equal(model.encode_image(image.float()), before)


def test_a_siglip_tower_of_timm_inside_open_clip(image: Tensor) -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    text: Any = {**TEXT, "no_causal_mask": True, "pool_type": "last"}
    model: Any = CustomTextCLIP(48, VISION, text).eval()
    model.visual = TimmModel("test_vit", 48, pool="avg", proj="none").eval()
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    model.visual.trunk = timm_vit.VisionTransformer(**size, class_token=False, global_pool="map").eval()
    ids = torch.randint(1, 60, (3, 16))
    with torch.no_grad():
        before = model(image.float(), ids)
        both = vt.patch(model, "tome", r=0, tower="both")
        assert [type(r.model).__name__ for r in both.values()] == ["VisionTransformer", "TextTransformer"]
        assert all(map(torch.equal, before, model(image.float(), ids)))
        both["visual"].set(r=4)
        after = model(image.float(), ids)
        assert both["visual"].tokens == [12, 8, 4]
        assert not torch.allclose(after[0], before[0])
        assert torch.equal(after[1], before[1])
        features = model.forward_intermediates(image.float())["image_intermediates"]
        assert [y.shape for y in features] == [(3, 48, 4, 4)] * 3
        vt.unpatch(model)
        assert all(map(torch.equal, before, model(image.float(), ids)))


def test_half_precision_models_stay_close_to_full_ones(image: Tensor) -> None:
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.06)):
        torch.manual_seed(0)
        model: Any = CLIP(24, VISION, TEXT, cast_dtype=dtype).eval()
        low = copy.deepcopy(model)
        convert_weights_to_lp(low, dtype)
        with torch.no_grad(), vt.patched(model, "topk", r=2), vt.patched(low, "topk", r=2):
            full, half = model.encode_image(image.float()), low.encode_image(image.to(dtype))
            with torch.autocast("cpu", torch.bfloat16):
                mixed = model.encode_image(image.float())
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), full, rtol=0, atol=tolerance * float(full.abs().max()))
        torch.testing.assert_close(mixed.float(), full, rtol=0, atol=0.06 * float(full.abs().max()))


def test_checkpointing_gives_the_same_gradients(image: Tensor) -> None:
    model = tower(attentional_pool=True, attn_pooler_heads=2).train()
    grads: list[list[Tensor]] = []
    with vt.patched(model, "tome", r=4):
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            model(image).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert grads[0]
    for plain, checked in zip(*grads):
        torch.testing.assert_close(plain, checked, rtol=1e-12, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"attentional_pool": "parallel", "output_dim": 48}], ids=str)
def test_it_compiles_in_one_graph_and_exports(options: dict[str, Any], image: Tensor) -> None:
    model = tower(layers=2, **options, **(dict[str, Any](attn_pooler_heads=2) if options else {}))
    with torch.no_grad(), vt.patched(model, "tome", r=4):
        expected = model(image)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: model(x), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(image), expected)
        exported = torch.export.export(model, (image,), strict=False)
        torch.testing.assert_close(exported.module()(image), expected)


def test_what_is_not_open_clips_own_is_refused() -> None:
    class Block(oc.ResidualAttentionBlock):
        def attention(self, *args: Any, **kwargs: Any) -> Any:
            return super().attention(*args, **kwargs)

    class Tower(oc.VisionTransformer):
        def _global_pool(self, x: Tensor) -> Any:
            return super()._global_pool(x)

    class Pooler(oc.AttentionalPooler):
        def forward(self, x: Tensor) -> Tensor:
            return x

    cross = oc.ResidualAttentionBlock(48, 3, is_cross_attention=True)
    for block, said in ((Block(48, 3), r"resblocks\.1 is a Block"), (cross, "without cross-attention")):
        model = tower()
        model.transformer.resblocks[1] = block
        with pytest.raises(IncompatibleError, match=said):
            vt.patch(model, "tome", r=2)
    for attn, said in ((nn.MultiheadAttention(48, 3, kdim=24, vdim=24, batch_first=True), "no joint projection"),
                       (nn.MultiheadAttention(48, 3, add_bias_kv=True, batch_first=True), "adds a key"),
                       (nn.Identity(), r"resblocks\.2\.attn: it is a Identity")):  # fmt: skip
        model = tower()
        model.transformer.resblocks[2].attn = attn
        with pytest.raises(IncompatibleError, match=said):
            vt.patch(model, "tome", r=2)
    model = tower(attentional_pool=True, attn_pooler_heads=2)
    model.attn_pool.__class__ = Pooler
    with pytest.raises(IncompatibleError, match="attn_pool is a Pooler"):
        vt.patch(model, "tome", r=2)
    with pytest.raises(IncompatibleError, match="Tower embeds or pools"):
        vt.patch(Tower(32, 8, 48, 2, 3, 2.0), "tome", r=2)
    model = tower()
    model.transformer = oc.MultimodalTransformer(48, 2, 3)
    with pytest.raises(IncompatibleError, match="transformer is a MultimodalTransformer"):
        vt.patch(model, "tome", r=2)


def test_a_convolutional_tower_is_refused() -> None:
    vision: Any = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8}
    model = CLIP(24, vision, TEXT)
    with pytest.raises(vt.errors.VisionTokError, match="no visual tower|convolutional"):
        vt.patch(model, "tome", r=2, tower="visual")


def test_a_mask_from_outside_is_refused_where_tokens_merge(image: Tensor) -> None:
    model = tower()
    x, mask = model._embeds(image), torch.zeros(17, 17, dtype=torch.float64)
    said = pytest.raises(IncompatibleError, match="block 1: attn_mask was given")
    with vt.patched(model, "tome", r={1: 2}), said:
        model.transformer(x, attn_mask=mask)


def test_v3_signatures_are_known() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(oc.ResidualAttentionBlock.forward) == ["self", "q_x", "k_x", "v_x", "attn_mask"]
    assert names(oc.CustomResidualAttentionBlock.forward) == ["self", "x", "attn_mask"]
    assert names(oc.Attention.forward) == ["self", "x", "attn_mask"]
    assert names(oc.AttentionalPooler.forward) == ["self", "x"]
    assert names(oc.Transformer.forward) == ["self", "x", "attn_mask"]
    stack = ["self", "x", "attn_mask", "indices", "stop_early"]
    assert names(oc.Transformer.forward_intermediates) == stack
    features = ["self", "x", "indices", "stop_early", "normalize_intermediates", "intermediates_only", "output_fmt"]
    assert names(oc.VisionTransformer.forward_intermediates) == [*features, "output_extra_tokens"]
    for name in ("_embeds", "_pool", "_global_pool", "forward"):
        assert names(getattr(oc.VisionTransformer, name)) == ["self", "x"]
