"""Runs SiT's golden files: slimming and recalibration modules, LV-ViT with and without them, training losses."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from golden_case import Case
from torch import Tensor, nn

import visiontok as vt
from visiontok.models.lvvit import LVViT, load_official
from visiontok.reducers.sit import TokenSlimmingModule
from visiontok.training.frd import FeatureRecalibration, LayerTokens, ReverseTSM


def loaded(module: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    module = module.to(dtype)
    module.load_state_dict(weights, strict=True)
    return module.eval()


def run_op(case: Case) -> None:
    """op_tsm_*, op_rtsm_*: one module, told apart by its weights, which also say its sizes."""
    weights, x = case.weights(), case.need("x")
    with torch.no_grad():
        if "norm1.weight" in weights:
            kept, full = weights["mlp1.fc1.weight"].shape[1], weights["mlp1.fc2.weight"].shape[0]
            case.check("x", loaded(ReverseTSM(x.shape[2], kept, full), weights, x.dtype)(x))
        else:
            slimming(case, weights, x)


def slimming(case: Case, weights: dict[str, Tensor], x: Tensor) -> None:
    ratio = case.params.get("ratio", 0.5)
    module = loaded(TokenSlimmingModule(x.shape[2], len(weights["weight.3.bias"]), ratio), weights, x.dtype)
    case.check("logits", module.weight(x))
    case.check("assign", module(x))
    for prefix in (0, 1):
        tokens = torch.cat((x.new_full((len(x), prefix, x.shape[2]), 7.0), x), dim=1)
        state = vt.TokenState.initial(tokens, prefix=prefix)
        tm = vt.reducers.create("sit").decide(vt.Signals.of(HIDDEN=tokens, MODULE=module), state)
        y, after = vt.apply(tm, tokens, state)
        case.check("x", y[:, prefix:])
        assert torch.equal(y[:, :prefix], tokens[:, :prefix])
        assert after.size is None


def dense(case: Case) -> LVViT:
    """The model of the file, without slimming modules, with the dense part of its weights."""
    params = case.params
    names = (
        "img_size",
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "num_classes",
        "p_emb",
        "skip_lam",
    )
    model = LVViT(**{name: params[name] for name in names if name in params}, aux_head=True)
    load_official(model, case.weights(), drop=("tsm.",))
    return model.eval()


def run_model(case: Case) -> None:
    """model_*: the dense model, the slimmed one layer by layer, and the training losses."""
    params, weights = case.params, case.weights()
    model = dense(case)
    if not any(name.startswith("tsm.") for name in weights):
        with torch.no_grad(), LayerTokens(model) as layers:
            case.check("logits", model(case.need("image")))
        check_tokens(case, "layer_tokens", layers.tokens)
        return
    stages = tuple(params["stage_blocks"])
    red = vt.patch(model, "sit", stage_blocks=stages, keeping_ratio=params["keeping_ratio"])
    used = red.load_learned(weights)
    assert sorted(used) == sorted(name for name in weights if name.startswith("tsm."))
    ends = [end - 1 for end in accumulate(stages)][:-1]
    assert [red.plan.length - 1, *(red.plan.tokens[end] - 1 for end in ends)] == params["kept"]
    if params["training"]:
        training(case, model, red)
        return
    with torch.no_grad(), LayerTokens(model) as layers:
        case.check("logits", model(case.need("image")))
    check_tokens(case, "layer_tokens", layers.tokens)
    assert red.tokens == red.plan.tokens


def training(case: Case, model: LVViT, red: Any) -> None:
    image, teacher = case.need("image"), dense(case)
    frd = FeatureRecalibration.for_plan(red.plan, model.embed_dim)
    frd.load_state_dict({k: v for k, v in case.weights().items() if k.startswith("rtsm.")}, strict=True)
    model.train().patch_embed.eval()
    with LayerTokens(model) as mine, LayerTokens(teacher) as theirs:
        logits = model(image)
        with torch.no_grad():
            teacher_logits = teacher(image)
        labels = case.given("soft_labels")
        losses = frd(mine.tokens, theirs.tokens, logits, teacher_logits, labels)
    case.check("logits", logits)
    check_tokens(case, "layer_tokens", frd.recalibrated(mine.tokens))
    if case.has("teacher_logits"):
        case.check("teacher_logits", teacher_logits)
        check_tokens(case, "teacher_tokens", theirs.tokens)
    for name, loss in losses.items():
        if case.has(name):
            case.check(name, loss.reshape(1))


def check_tokens(case: Case, name: str, tokens: list[Tensor]) -> None:
    for layer, x in enumerate(tokens):
        case.check(f"{name}{layer}", x.detach())
