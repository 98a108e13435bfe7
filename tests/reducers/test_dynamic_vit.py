"""DynamicViT: the predictor and its key names, the counts, the gradient that reaches it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Build, Where
from visiontok.core.signals import Site
from visiontok.errors import IncompatibleError, ParameterError
from visiontok.reducers.dynamic_vit import Predictor

# Typed loosely: a decision may be None.
create: Any = vt.reducers.create


def setup(n: int, prefix: int = 1, dim: int = 12) -> tuple[Tensor, Any, Any, Any]:
    noise = torch.Generator().manual_seed(n)
    x = torch.randn(2, n + prefix, dim, generator=noise, dtype=torch.float64)
    torch.manual_seed(1)
    module = Predictor(dim).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    state = vt.TokenState.initial(x, prefix, layer=3, depth=12)
    return x, module, state, vt.Signals.of(HIDDEN=x, MODULE=module)


def naive(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """(n, 2) log probabilities of one sample, from the official keys."""

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = F.gelu(linear(y * weights["in_conv.0.weight"] + weights["in_conv.0.bias"], "in_conv.1"))
    half = x.shape[1] // 2
    y = torch.stack([torch.cat((row[:half], y[:, half:].sum(0) / len(y))) for row in y])
    y = F.gelu(linear(F.gelu(linear(y, "out_conv.0")), "out_conv.2"))
    return linear(y, "out_conv.4").log_softmax(-1)


@pytest.mark.parametrize(("n", "prefix", "dim"), [(9, 1, 12), (5, 0, 8), (1, 2, 9), (12, 5, 14)])
def test_scores_and_order_equal_the_formula(n: int, prefix: int, dim: int) -> None:
    x, module, state, signals = setup(n, prefix, dim)
    reducer: Any = create("dynamic_vit", r=n // 2)
    with torch.no_grad():
        score = reducer.score(signals, state)
        tm = reducer.decide(signals, state, n // 2)
    for b in range(2):
        want = naive(x[b, prefix:], module.state_dict())[:, 0]
        torch.testing.assert_close(score[b], want)
        if tm is not None:
            order = sorted(range(n), key=lambda j: -float(want[j]))[: n - n // 2]
            assert tm.kept[b].tolist() == [*range(prefix), *(prefix + j for j in order)]


def test_padding_changes_nothing() -> None:
    x, module, state, signals = setup(9)
    reducer: Any = create("dynamic_vit")
    longer = torch.cat((x, torch.full_like(x[:, :3], 7.0)), dim=1)
    size = torch.ones(2, 13, 1, dtype=torch.float64)
    size[:, 10:] = 0
    padded = vt.TokenState.initial(longer, layer=3, depth=12).changed(size=size, padded=True)
    found = reducer.score(vt.Signals.of(HIDDEN=longer, MODULE=module), padded)
    torch.testing.assert_close(found[:, :9], reducer.score(signals, state))
    assert found[:, 9:].isneginf().all()


def test_training_changes_no_value_and_reaches_the_predictor() -> None:
    x, module, state, signals = setup(9)
    reducer = create("dynamic_vit")
    tm = reducer.decide(signals, state, 4)
    y, _ = vt.apply(tm, x, state)
    with torch.no_grad():
        still = reducer.decide(signals, state, 4)
        assert torch.equal(y, vt.apply(still, x, state)[0])
    assert torch.equal(tm.assign, still.assign)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
    # The derivative of x_j * (1 + p_j - p_j) by p_j is x_j.
    score = reducer.score(signals, state)
    chance = score.exp()
    kept = tm.kept[:, 1:] - 1
    want = torch.autograd.grad(
        (chance.gather(1, kept) * 2 * y[:, 1:].detach().square().sum(-1)).sum(), module.out_conv[4].bias
    )
    torch.testing.assert_close(module.out_conv[4].bias.grad, want[0])


def test_counts() -> None:
    reducer = create("dynamic_vit", base_rate=0.7)
    n, counts = 196, []
    for layer, budget in reducer.budgets(12).items():
        n -= reducer.removed(n, budget, Where(layer, 12, start=196), 1)
        counts.append(n)
    assert counts == [137, 96, 67]
    current = create("dynamic_vit", keep_rate=0.5)
    assert 65 - current.removed(65, current.budgets(12)[3], Where(3, 12), 1) == 32
    assert list(create("dynamic_vit", pruning_loc=[5, 2], keep=0.5).layers(12)) == [2, 5]
    kept = create("dynamic_vit", sort=True, keep=4)
    x, _, state, signals = setup(9)
    assert kept.decide(signals, state, 5).kept.diff(dim=1).gt(0).all()


@pytest.mark.parametrize("bad", [{"base_rate": 0.0}, {"pruning_loc": 3}, {"pruning_loc": [0]}, {"keep_rate": 2},
                                 {"base_rate": 0.5, "keep_rate": 0.5}])  # fmt: skip
def test_bad_parameters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        create("dynamic_vit", **bad)


def test_no_predictor() -> None:
    x, _, state, _ = setup(4)
    with pytest.raises(IncompatibleError, match="has no predictor"):
        create("dynamic_vit").decide(vt.Signals.of(HIDDEN=x, MODULE=None), state, 1)
    build = Build(site=Site.PRE, layer=3, depth=12, width=8, heads=2, before=9, after=9)
    assert create("dynamic_vit").modules(build) is None


def test_official_checkpoints_load_into_a_patched_model() -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model: Any = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    official = {f"score_predictor.{stage}.{key}": torch.randn_like(value) * 0.3
                for stage in range(3) for key, value in Predictor(16).state_dict().items()}  # fmt: skip
    with torch.no_grad(), vt.patched(model, "dynamic_vit", base_rate=0.7) as red:
        red.load_learned(official)
        model(x)
        assert red.tokens == red.plan.tokens == [12, 8, 6, 6]
        for stage in range(3):
            found = model.blocks[stage].visiontok.state_dict()
            assert len(found) == 10
            for key, value in found.items():
                # The child is named by method and layer.
                assert torch.equal(value, official[f"score_predictor.{stage}.{key.partition('.')[2]}"]), key
