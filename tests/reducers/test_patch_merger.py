"""PatchMerger against its softmax written token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.core.schedule import Budget
from visiontok.reducers.patch_merger import Merger


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merger(dim: int, count: int, scale: float = 1.0) -> Merger:
    module = Merger(dim, count, scale).double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i + 7))
    return module


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_entry(prefix: int, scale: float) -> None:
    x, module = draw(2, prefix + 9, 4, seed=1), merger(4, 3, scale)
    state = vt.TokenState.initial(x, prefix, layer=3, depth=12)
    tm = vt.reducers.create("patch_merger").decide(vt.Signals.of(HIDDEN=x, MODULE=module), state, budget=6)
    y, after = vt.apply(tm, x, state)
    assert after.size is None
    for b in range(2):
        normed = []
        for token in x[b, prefix:]:
            mean = float(token.mean())
            deviation = math.sqrt(float((token - mean).square().mean()) + 1e-5)
            normed.append((token - mean) / deviation * module.norm.weight + module.norm.bias)
        for k in range(3):
            raw = [math.exp(scale * float((module.queries[k] @ token).detach())) for token in normed]
            mixed = sum(w / sum(raw) * token for w, token in zip(raw, normed))
            torch.testing.assert_close(y[b, prefix + k], mixed, rtol=1e-10, atol=1e-10)
    assert torch.equal(y[:, :prefix], x[:, :prefix])


def test_gradients_reach_queries_norm_and_tokens() -> None:
    x, module = draw(1, 6, 3, seed=2).requires_grad_(), merger(3, 2)
    reducer = vt.reducers.create("patch_merger")

    def run(x: Tensor, *_: Tensor) -> Tensor:
        state = vt.TokenState.initial(x, 1, layer=3, depth=12)
        return vt.apply(reducer.decide(vt.Signals.of(HIDDEN=x, MODULE=module), state, budget=3), x, state)[0]

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))


def test_padding_is_not_read() -> None:
    x, module = draw(1, 1 + 8, 4, seed=3), merger(4, 3)
    size = torch.ones(1, 9, 1, dtype=torch.float64)
    size[0, 6:] = 0
    state = vt.TokenState.initial(x, 1, layer=3, depth=12).changed(size=size, padded=True)
    reducer = vt.reducers.create("patch_merger")
    padded = vt.apply(reducer.decide(vt.Signals.of(HIDDEN=x, MODULE=module), state, budget=5), x, state)[0]
    short = vt.TokenState.initial(x[:, :6], 1, layer=3, depth=12)
    alone = vt.apply(reducer.decide(vt.Signals.of(HIDDEN=x[:, :6], MODULE=module), short, budget=2), x[:, :6], short)[0]
    torch.testing.assert_close(padded, alone)


def test_official_counts_and_keys() -> None:
    reducer = vt.reducers.create("patch_merger", keep_rate=0.7)
    assert list(reducer.budgets(12)) == [3, 6, 9]
    assert reducer.official(2) == "cluster_layers.2."
    assert [reducer.removed(196, b, Where(layer, 12), 1) for layer, b in reducer.budgets(12).items()] == [
        196 - int(196 * 0.7**i) for i in (1, 2, 3)
    ]
    assert reducer.removed(3, Budget(ratio=0.1), Where(3, 12), 1) == 2
    assert set(merger(4, 3).state_dict()) == {"norm.weight", "norm.bias", "queries"}


def test_on_a_model_the_official_keys_load() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=24, num_heads=2).eval()
    before = model(torch.zeros(1, 3, 64, 64))
    with vt.patched(model, "patch_merger", keep=0.5) as red:
        assert red.plan.tokens == [1 + 8, 1 + 4, 1 + 2, 1 + 2]
        weights = {f"cluster_layers.{i}.queries": torch.full((8 >> i, 24), 0.1 * i) for i in range(3)}
        weights |= {f"cluster_layers.{i}.norm.{name}": torch.ones(24) for i in range(3) for name in ("weight", "bias")}
        red.load_learned(weights)
        assert torch.equal(next(iter(model.blocks[1].visiontok.values())).queries, weights["cluster_layers.1.queries"])
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
    assert torch.equal(model(torch.zeros(1, 3, 64, 64)), before)
