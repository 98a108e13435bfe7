"""DTEM: ToMe by a learned head in value, the paper's relaxation in gradient; and metrics of the family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visiontok as vt
from visiontok import backbones
from visiontok.core.reducer import Build
from visiontok.core.signals import Site
from visiontok.errors import ParameterError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(width: int = 6, heads: int = 2) -> Build:
    return Build(Site.MID, 0, 4, width, heads, 10, 8)


def head(reducer: Any) -> nn.Module:
    module = reducer.modules(build()).double()
    with torch.no_grad():
        module.weight.copy_(draw(*module.weight.shape, seed=8))
        module.bias.copy_(draw(*module.bias.shape, seed=9))
    return module


def metric_of(module: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    rows = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return rows @ module.weight.T + module.bias


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_values_are_those_of_tome_with_the_metric(prefix: int) -> None:
    x = draw(2, 11, 6)
    size = draw(2, 11, 1, seed=1).abs().ceil()
    state = vt.TokenState.initial(x, prefix).changed(size=size)
    reducer = vt.reducers.create("dtem")
    module = head(reducer)
    tome = vt.reducers.create("tome").decide(vt.Signals.of(KEY=metric_of(module, x).unsqueeze(1)), state, budget=3)
    expected, expected_state = vt.apply(tome, x, state)
    signals = vt.Signals.of(HIDDEN=x, MODULE=module)
    soft = reducer.decide(signals, state, budget=3)
    with torch.no_grad():
        hard = reducer.decide(vt.Signals.of(HIDDEN=x, MODULE=module), state, budget=3)
    assert (soft.soft is not None, hard.soft) == (True, None)
    for tm in (soft, hard):
        y, after = vt.apply(tm, x, state)
        assert torch.equal(tm.assign, tome.assign)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(after.size, expected_state.size)
    module.requires_grad_(False)
    assert reducer.decide(vt.Signals.of(HIDDEN=x, MODULE=module), state, budget=3).soft is None


def drawn_loops(even: Tensor, odd: Tensor, r: int, k2: int, tau1: float, tau2: float) -> Tensor:
    """The relaxation of one sample, entry by entry."""
    out = torch.zeros(len(even), len(odd), dtype=even.dtype)
    cosine = [[torch.cosine_similarity(a, b, dim=0) for b in odd] for a in even]
    near = [sorted(range(len(odd)), key=lambda j: -float(row[j].detach()))[:k2] for row in cosine]
    logits = {(i, j): cosine[i][j] / tau1 for i, row in enumerate(near) for j in row}
    total = dict.fromkeys(logits, torch.zeros((), dtype=even.dtype))
    for _ in range(r):
        norm = sum(torch.exp(value / tau2) for value in logits.values())
        chance = {pair: torch.exp(value / tau2) / norm for pair, value in logits.items()}
        total = {pair: total[pair] + chance[pair] for pair in total}
        for i, row in enumerate(near):
            left = (1 - sum(chance[i, j] for j in row)).clamp_min(torch.finfo(torch.float32).eps)
            logits |= {(i, j): logits[i, j] + left.log() for j in row}
    for i, row in enumerate(near):
        bound = max(float(sum(total[i, j].detach() for j in row)), 1.0)
        for j in row:
            out[i, j] = total[i, j] / bound
    return out


@pytest.mark.parametrize("r", [1, 3, 7])
def test_the_relaxation_against_loops(r: int) -> None:
    # More draws than tokens at last, so that the bound on a token's total acts.
    even, odd, weight = draw(2, 5, 4, seed=2).requires_grad_(), draw(2, 6, 4, seed=3), draw(2, 5, 6, seed=5)
    reducer: Any = vt.reducers.create("dtem", tau1=0.5, tau2=0.4)
    drawn = reducer.drawn(even, odd, r)
    expected = torch.stack([drawn_loops(even[b], odd[b], r, 3, 0.5, 0.4) for b in range(2)])
    torch.testing.assert_close(drawn, expected, rtol=1e-9, atol=1e-12)
    assert (drawn.sum(dim=2) <= 1 + 1e-12).all()
    ours, theirs = (torch.autograd.grad((value * weight).sum(), even)[0] for value in (drawn, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_the_gradient_is_that_of_the_soft_merge() -> None:
    x, state = draw(1, 9, 6, seed=4), vt.TokenState.initial(draw(1, 9, 6, seed=4), 1)
    reducer: Any = vt.reducers.create("dtem", tau1=0.5, tau2=0.5)
    module = head(reducer)
    y, _ = vt.apply(reducer.decide(vt.Signals.of(HIDDEN=x, MODULE=module), state, budget=2), x, state)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    ours = module.weight.grad.clone()
    module.zero_grad()
    # Destination j: (x_j + sum_i e_ij x_i) / (1 + sum_i e_ij) at the hard e, moved by the drawn one.
    with torch.no_grad():
        hard = reducer.decide(vt.Signals.of(HIDDEN=x, MODULE=module), state, budget=2)
    metric = metric_of(module, x)
    even, odd = list(range(2, 9, 2)), list(range(1, 9, 2))
    drawn = drawn_loops(metric[0, even], metric[0, odd], 2, 3, 0.5, 0.5)
    total = torch.zeros((), dtype=x.dtype)
    for slot, j in enumerate(odd, start=hard.K - len(odd)):
        share = [(float(hard.assign[0, i] == slot) + e - e.detach()) for i, e in zip(even, drawn[:, odd.index(j)])]
        value = (x[0, j] + sum(s * x[0, i] for s, i in zip(share, even))) / (1 + sum(share))
        total = total + (value * weight[0, slot]).sum()
    total.backward()
    torch.testing.assert_close(ours, module.weight.grad, rtol=1e-8, atol=1e-11)
    assert ours.abs().max() > 0


def test_the_head_sends_no_gradient_into_the_model() -> None:
    x = draw(1, 7, 6).requires_grad_()
    reducer = vt.reducers.create("dtem")
    tm = reducer.decide(vt.Signals.of(HIDDEN=x, MODULE=head(reducer)), vt.TokenState.initial(x, 1), budget=2)
    assert torch.autograd.grad(tm.soft.sum() + tm.mass.sum(), x, allow_unused=True)[0] is None
    state = vt.TokenState.initial(x, 1)
    fixed = vt.TokenMap(tm.assign, tm.K, soft=tm.soft.detach(), mass=tm.mass.detach())
    assert torch.autograd.gradcheck(lambda x: vt.apply(fixed, x, state)[0], x)


def test_the_size_of_the_head() -> None:
    sizes = {(384, 6): 64, (768, 12): 64, (1024, 16): 128}
    for (width, heads), dim in sizes.items():
        module: Any = vt.reducers.create("dtem").modules(build(width, heads))
        assert (module.in_features, module.out_features) == (width, dim)
    assert vt.reducers.create("dtem", feat_dim=5).modules(build()).out_features == 5


def test_heads_trained_by_dtem_serve_tome() -> None:
    model, inputs = backbones.registry.get("timm_vit")().examples()["cls"]
    model = copy.deepcopy(model).eval()
    with vt.patched(model, "dtem", r=2) as red:
        params = [p for name, p in model.named_parameters() if "visiontok" in name]
        optimizer = torch.optim.SGD(params, lr=0.1)
        loss = model(inputs).square().sum()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in params)
        assert any(p.grad.abs().max() > 0 for p in params)
        optimizer.step()
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            expected = model(inputs)
    with vt.patched(model, "tome", r=2, metric="learned") as red, torch.no_grad():
        assert not any(p.requires_grad for name, p in model.named_parameters() if "visiontok" in name)
        assert len(red.load_learned(trained)) == len(params)
        torch.testing.assert_close(model(inputs), expected)


METRICS = {
    "key": lambda q, k, v, x: k.mean(dim=1),
    "query": lambda q, k, v, x: q.mean(dim=1),
    "value": lambda q, k, v, x: v.mean(dim=1),
    "concat": lambda q, k, v, x: torch.cat(list(k.unbind(dim=1)), dim=-1),
    "hidden": lambda q, k, v, x: x,
}


@pytest.mark.parametrize("name", ["tome", "tofu", "atc", "atm", "tome_kth"])
@pytest.mark.parametrize("metric", [*METRICS, "learned"])
def test_the_family_compares_what_it_is_told(name: str, metric: str) -> None:
    x = draw(2, 10, 6)
    q, k, v = (draw(2, 3, 10, 2, seed=seed) for seed in (1, 2, 3))
    reducer: Any = vt.reducers.create(name, metric=metric)
    state = vt.TokenState.initial(x, 1, depth=4)
    offered: dict[str, Any] = {"HIDDEN": x, "QUERY": q, "KEY": k, "VALUE": v}
    offered = {str(signal): offered[str(signal)] for signal in reducer.needs}
    if metric == "learned":
        offered["MODULE"] = head(reducer)
        rows = metric_of(offered["MODULE"], x).detach()
    else:
        rows = METRICS[metric](q, k, v, x)
    ours = reducer.decide(vt.Signals.of(**offered), state, budget=3)
    theirs = vt.reducers.create(name).decide(vt.Signals.of(KEY=rows.unsqueeze(1)), state, budget=3)
    assert torch.equal(ours.assign, theirs.assign)


@pytest.mark.parametrize(
    ("name", "params", "match"),
    [
        ("tome", {"metric": "cosine"}, "metric must be one of key, query, value, concat, hidden, learned"),
        ("dtem", {"metric": "key"}, "metric must be 'learned'"),
        ("dtem", {"k2": 0}, "k2 must be an int >= 1"),
        ("dtem", {"feat_dim": 0.5}, "feat_dim must be an int >= 1"),
        ("dtem", {"tau1": 0}, "tau1 must be a number > 0"),
    ],
)
def test_errors(name: str, params: dict[str, Any], match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        vt.reducers.create(name, **params)
