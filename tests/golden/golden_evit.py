"""Runs EViT's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from golden_case import Case
from torch import Tensor, nn

import visiontok as vt


def build_plain(case: Case) -> Any:
    """The timm ViT that `params` describes, with the weights of the file, in the dtype of the images."""
    from timm.models.vision_transformer import VisionTransformer

    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes")
    model = VisionTransformer(**{name: case.params[name] for name in names}).to(case.need("image").dtype)
    model.load_state_dict(case.weights(), strict=True)
    return model.eval()


@contextlib.contextmanager
def blocks_of(model: Any) -> Iterator[list[Tensor]]:
    """Collects what every block returns."""
    after: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: after.append(call[-1].detach())) for block in model.blocks]
    try:
        yield after
    finally:
        for hook in hooks:
            hook.remove()


def build_block(case: Case, dim: int, heads: int) -> Any:
    """The timm block of an op file."""
    from timm.models.vision_transformer import Block

    norm: Any = functools.partial(nn.LayerNorm, eps=case.params["eps"])
    made = Block(
        dim, heads, mlp_ratio=case.params["mlp_ratio"], qkv_bias="attn.qkv.bias" in case.weights(), norm_layer=norm
    )
    block = made.to(case.need("x").dtype)
    block.load_state_dict(case.weights(), strict=True)
    return block.eval()


def run_op(case: Case) -> None:
    """op_complement_idx: what is not kept; op_block_*: one block with a reduction inside."""
    if case.given("x") is not None:
        with torch.no_grad():
            run_block(case)
    else:
        complement(case)


def complement(case: Case) -> None:
    """The ascending indices that a map does not keep."""
    (name,) = (name for name in case.tensors if name.startswith("out."))
    index = case.need("idx")
    # The length is not in `params`: what is kept and what is not make up all tokens.
    length = index.shape[1] + case.tensors[name].shape[1]
    case.check(name.removeprefix("out."), dropped(vt.TokenMap.keep(index, length)))


def dropped(tm: Any) -> Tensor:
    """(B, N - K) tokens that do not keep a slot for themselves, ascending."""
    alone = torch.zeros_like(tm.assign, dtype=torch.bool).scatter(1, tm.kept, True)
    return torch.stack([(~row).nonzero().squeeze(1) for row in alone])


def run_block(case: Case) -> None:
    params, x = case.params, case.need("x")
    block: Any = build_block(case, params["dim"], params["heads"])
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, params["heads"], -1)).permute(2, 0, 3, 1, 4).unbind(0)
    attention = (q @ k.transpose(-2, -1) * block.attn.scale).softmax(dim=-1)
    branch = block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
    case.check("attn_branch", branch)
    given = {"keep_rate": params["keep_rate"]} if params["tokens"] is None else {"left_tokens": params["tokens"]}
    reducer: Any = vt.reducers.create("evit", fuse_token=params["fuse_token"], **given)
    x = x + branch
    state = vt.TokenState.initial(x, layer=3, depth=12)
    signals = vt.Signals.of(ATTN_PREFIX=attention[:, :, :1])
    tm = reducer.decide(signals, state)
    if tm is None:
        assert params["left_tokens"] == x.shape[1] - 1
    else:
        score, _ = reducer.ranked(signals, state)
        left = params["left_tokens"]
        check_index(case, "idx", tm, left)
        if case.has("cls_attn"):
            case.check("cls_attn", score)
        if case.has("compl"):
            rest = (tm.assign[:, 1:] == 1 + left) if params["fuse_token"] else (tm.assign[:, 1:] < 0)
            case.check("compl", torch.stack([row.nonzero().squeeze(1) for row in rest]))
        x, _ = vt.apply(tm, x, state)
    case.check("x", x + block.mlp(block.norm2(x)))


def check_index(case: Case, name: str, tm: Any, left: int) -> None:
    """Kept tokens in order of their slots, counted from the first patch."""
    case.check(name, tm.kept[:, 1 : 1 + left] - 1)


def run_model(case: Case) -> None:
    """model_*: a patched timm ViT."""
    model, x, params = build_plain(case), case.need("image"), case.params
    with torch.no_grad():
        case.check("logits_unreduced", model(x))
    red = vt.patch(model, "evit", keep_rate=params["keep_rate"], fuse_token=params["fuse_token"], trace=True)
    with torch.no_grad(), blocks_of(model) as after:
        case.check("cls_feature", model.forward_features(x)[:, 0])
        case.check("logits", model(x))
    for block, y in enumerate(after[: params["depth"]]):
        case.check(f"tokens_after_block{block}", y)
    assert red.tokens == red.plan.tokens == params["tokens_after_each_block"]
    for j, step in enumerate(red.trace):
        case.check(f"idx{j}", step.map.kept[:, 1 : step.map.K - params["fuse_token"]] - 1)
