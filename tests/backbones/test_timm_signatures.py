"""V3: the forwards of timm that the backbone wraps or calls. A new signature fails here, by name, before any math."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
from timm.layers import Attention, AttentionPoolLatent, LayerScale
from timm.models import beit, cait, deit
from timm.models import vision_transformer as tv
from timm.models import vision_transformer_relpos as relpos

# The form of timm 1.0.17 to 1.0.x without is_causal, and the one of 1.0.31.
PLAIN = "(self, x, attn_mask=None)"
CAUSAL = "(self, x, attn_mask=None, is_causal=False)"
TAKEN = (
    "(self, x, indices=None, return_prefix_tokens=False, norm=False, stop_early=False, output_fmt='NCHW', "
    "intermediates_only=False, output_dict=False, attn_mask=None"
)
SHARED = "(self, x, shared_rel_pos=None)"
MAPS = (
    "(self, x, indices=None, return_prefix_tokens=False, norm=False, stop_early=False, output_fmt='NCHW', "
    "intermediates_only=False)"
)

EXPECTED: list[tuple[Any, tuple[str, ...]]] = [
    (tv.Block.forward, (PLAIN, CAUSAL)),
    (tv.ResPostBlock.forward, (PLAIN, CAUSAL)),
    (tv.ParallelThingsBlock.forward, (PLAIN, CAUSAL)),
    (tv.ParallelScalingBlock.forward, (PLAIN, CAUSAL)),
    (Attention.forward, (PLAIN, CAUSAL)),
    (tv.VisionTransformer.forward, (PLAIN, CAUSAL)),
    (tv.VisionTransformer.forward_features, (PLAIN, CAUSAL)),
    (tv.VisionTransformer.forward_intermediates, (TAKEN + ")", TAKEN + ", is_causal=False)")),
    (
        tv.VisionTransformer.get_intermediate_layers,
        ("(self, x, n=1, reshape=False, return_prefix_tokens=False, norm=False, attn_mask=None)",),
    ),
    (tv.VisionTransformer.pool, ("(self, x, pool_type=None)",)),
    (tv.VisionTransformer.forward_head, ("(self, x, pre_logits=False)",)),
    (tv.VisionTransformer._pos_embed, ("(self, x)",)),
    (deit.VisionTransformerDistilled.forward_head, ("(self, x, pre_logits=False)",)),
    (deit.VisionTransformerDistilled._pos_embed, ("(self, x)",)),
    (AttentionPoolLatent.forward, (PLAIN,)),
    (LayerScale.forward, ("(self, x)",)),
    (relpos.RelPosBlock.forward, (SHARED,)),
    (relpos.ResPostRelPosBlock.forward, (SHARED,)),
    (relpos.RelPosAttention.forward, (SHARED,)),
    (relpos.VisionTransformerRelPos.forward_intermediates, (MAPS,)),
    (relpos.VisionTransformerRelPos.forward_head, ("(self, x, pre_logits=False)",)),
    (beit.Block.forward, (SHARED.replace("pos", "pos_bias"),)),
    (beit.Attention.forward, (SHARED.replace("pos", "pos_bias"),)),
    (beit.Beit.forward_intermediates, (MAPS,)),
    (beit.Beit.forward_head, ("(self, x, pre_logits=False)",)),
    (cait.LayerScaleBlock.forward, ("(self, x)",)),
    (cait.TalkingHeadAttn.forward, ("(self, x)",)),
    (cait.LayerScaleBlockClassAttn.forward, ("(self, x, x_cls)",)),
    (cait.ClassAttn.forward, ("(self, x)",)),
    (cait.Cait.forward_intermediates, (MAPS.replace(" return_prefix_tokens=False,", ""),)),
    (cait.Cait.forward_head, ("(self, x, pre_logits=False)",)),
]
if hasattr(cait.Cait, "forward_cls"):
    EXPECTED += [(cait.Cait.forward_cls, ("(self, x)",))]
if hasattr(tv, "DiffAttention"):
    EXPECTED += [(tv.DiffAttention.forward, (CAUSAL,)), (tv.DiffParallelScalingBlock.forward, (CAUSAL,))]


def bare(function: Any) -> str:
    """The signature without annotations."""
    signature = inspect.signature(function)
    none = inspect.Parameter.empty
    parameters = [p.replace(annotation=none) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=none))


@pytest.mark.parametrize(("function", "known"), EXPECTED, ids=[f.__qualname__ for f, _ in EXPECTED])
def test_v3_signature_is_known(function: Any, known: tuple[str, ...]) -> None:
    found = bare(function)
    assert found in known, (
        f"timm {timm.__version__} changed {function.__module__}.{function.__qualname__}: {found} is none of {known}. "
        "Read its body, adapt its backbone in visiontok/backbones, then add the signature here."
    )


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: tv.Block(8, 2), {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}),
        (lambda: tv.ResPostBlock(8, 2), {"attn", "norm1", "drop_path1", "mlp", "norm2", "drop_path2"}),
        (lambda: tv.ParallelThingsBlock(8, 2), {"attns", "ffns"}),
        (lambda: tv.ParallelThingsBlock(8, 2).attns[0], {"norm", "attn", "ls", "drop_path"}),
    ],
    ids=["Block", "ResPostBlock", "ParallelThingsBlock", "ParallelThingsBlock.attns"],
)
def test_v3_parts_of_a_block_are_known(make: Any, parts: set[str]) -> None:
    found = {name for name, _ in make().named_children()}
    assert found == parts, (
        f"timm {timm.__version__}: parts differ by {found ^ parts}; adapt visiontok/backbones/timm_vit.py."
    )


def test_v3_parts_of_attention_are_known() -> None:
    found = {name for name, _ in Attention(8, 2).named_children()}
    known = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
    assert found in (known, known | {"gate"}), (
        f"timm {timm.__version__}: Attention has {found ^ known} beyond what is run."
    )
