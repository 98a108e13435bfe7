"""SiT: the slimming module against loops, its counts, and learning, saving and removing it on timm models."""

import copy
import math

import pytest
import torch
from torch import nn

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.reducers.sit import SiT, TokenSlimmingModule

timm = pytest.importorskip("timm")


def slimmer(dim=6, K=3, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    module = TokenSlimmingModule(dim, K).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


def by_loops(module, x):
    """(B, K, C): the slimmed tokens of x (B, N, C), one number at a time."""
    norm, first, _, last = module.weight
    out = torch.zeros(x.shape[0], last.out_features, x.shape[2], dtype=x.dtype)
    for b in range(x.shape[0]):
        logits = []
        for token in x[b]:
            mean = sum(token) / len(token)
            spread = sum((t - mean) ** 2 for t in token) / len(token)
            rows = [(t - mean) / (spread + 1e-5) ** 0.5 * g + o for t, g, o in zip(token, norm.weight, norm.bias)]
            hidden = [sum(w * t for w, t in zip(line, rows)) + o for line, o in zip(first.weight, first.bias)]
            hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden]
            logits.append([sum(w * h for w, h in zip(line, hidden)) + o for line, o in zip(last.weight, last.bias)])
        for k in range(out.shape[1]):
            powers = [math.exp(float(row[k] * module.scale)) for row in logits]
            for share, token in zip(powers, x[b]):
                out[b, k] += share / sum(powers) * token
    return out


@pytest.mark.parametrize(("tokens", "K"), [(7, 3), (1, 1), (5, 1), (3, 8)])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_equals_loops_and_leaves_the_prefix(tokens, K, prefix):
    module = slimmer(K=K).requires_grad_(False)
    x = torch.randn(2, prefix + tokens, 6, dtype=torch.float64)
    state = vt.TokenState.initial(x, prefix=prefix)
    tm = SiT().decide(vt.Signals.of(HIDDEN=x, MODULE=module), state)
    y, after = vt.apply(tm, x, state)
    assert y.shape == (2, prefix + K, 6)
    torch.testing.assert_close(y[:, prefix:], by_loops(module, x[:, prefix:]), rtol=1e-10, atol=1e-10)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    assert after.size is None
    shares = tm.soft[:, prefix:, prefix:]
    assert torch.equal(tm.assign[:, :prefix], torch.arange(prefix).expand(2, prefix))
    assert torch.equal(tm.assign[:, prefix:] - prefix, shares.argmax(dim=1))
    assert torch.equal(tm.kept[:, prefix:] - prefix, shares.argmax(dim=2))


def test_equal_shares_go_to_the_lowest_slot():
    x = torch.ones(1, 5, 6, dtype=torch.float64)
    state = vt.TokenState.initial(x, prefix=1)
    tm = SiT().decide(vt.Signals.of(HIDDEN=x, MODULE=slimmer(K=2)), state)
    assert tm.assign.tolist() == [[0, 1, 1, 1, 1]]
    assert tm.kept.tolist() == [[0, 1, 1]]


def test_padding_gets_no_share():
    module = slimmer().requires_grad_(False)
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    size = torch.tensor([[1, 2, 1, 1, 0, 0], [1, 1, 1, 3, 1, 1]]).unsqueeze(-1).double()
    state = vt.TokenState.initial(x, prefix=1).changed(size=size, padded=True)
    y, _ = vt.apply(SiT().decide(vt.Signals.of(HIDDEN=x, MODULE=module), state), x, state)
    torch.testing.assert_close(y[:1, 1:], by_loops(module, x[:1, 1:4]))
    torch.testing.assert_close(y[1:, 1:], by_loops(module, x[1:, 1:]))
    nothing = state.changed(size=size * 0)
    tm = SiT().decide(vt.Signals.of(HIDDEN=x, MODULE=module), nothing)
    assert torch.isfinite(tm.soft).all()


def test_gradients_pass_gradcheck():
    module = slimmer(dim=4, K=2)
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    state = vt.TokenState.initial(x, prefix=1)

    def slimmed(x, scale, weight):
        held = {"scale": scale, "weight.3.weight": weight}
        tm = SiT().decide(vt.Signals.of(HIDDEN=x, MODULE=_Calls(module, held)), state)
        return vt.apply(tm, x, state)[0]

    assert torch.autograd.gradcheck(slimmed, (x, module.scale, module.weight[3].weight))


class _Calls:
    def __init__(self, module, held):
        self.module, self.held = module, held

    def __call__(self, *args):
        return torch.func.functional_call(self.module, self.held, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_take_wide_signals(dtype):
    x = torch.randn(2, 9, 6).to(dtype)
    state = vt.TokenState.initial(x, prefix=1)
    tm = SiT().decide(vt.Signals.of(HIDDEN=x, MODULE=slimmer(dtype=dtype)), state)
    assert tm.soft.dtype == torch.float32
    torch.testing.assert_close(tm.soft.sum(dim=-1), torch.ones(2, 4))
    assert vt.apply(tm, x, state)[0].dtype == dtype


@pytest.mark.parametrize("n0", [196, 16, 14 * 13, 5])
@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9])
def test_counts_are_shares_of_the_first_count(n0, ratio):
    red, left, found = SiT(keeping_ratio=ratio, stage_blocks=(1, 2, 1, 3)), n0, []
    budgets = red.budgets(7)
    assert list(budgets) == [1, 3, 4]
    for layer, budget in budgets.items():
        left -= red.removed(left, budget, Where(layer, 7, start=n0))
        found.append(left)
    assert found == [max(int(n0 * ratio**i), 1) for i in (1, 2, 3)]


def test_other_budgets_act_per_stage_end():
    assert SiT(keep=0.5).spec() == (None, 0.5)
    red = SiT(r=3)
    assert list(red.budgets(12)) == [3, 6, 9]
    assert [red.removed(n, red.budgets(12)[3], Where(3, 12)) for n in (10, 4, 3, 1)] == [3, 3, 2, 0]
    assert list(SiT(keep={2: 5}).budgets(4)) == [1, 2, 3]
    assert SiT().replaced(r=4).keeping_ratio is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keeping_ratio": 0.0}, r"keeping_ratio must be in \(0, 1\].*got 0.0"),
        ({"keeping_ratio": 1.5}, "got 1.5"),
        ({"keeping_ratio": 0.5, "r": 3}, "give one budget, got 2"),
        ({"stage_blocks": ()}, "stage_blocks must list"),
        ({"stage_blocks": (1, 0)}, r"stage_blocks must list the blocks .* got \(1, 0\)"),
        ({"slim_ratio": 0}, "slim_ratio must be above 0"),
    ],
)
def test_bad_values_are_named(given, said):
    with pytest.raises(vt.VisionTokError, match=said):
        SiT(**given)


def tiny(**options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**{**sizes, **options}).eval()


def test_stages_must_fill_the_model():
    with pytest.raises(vt.VisionTokError, match=r"stage_blocks=\(1, 2\) has 3 blocks, the model has 4"):
        vt.patch(tiny(), "sit", stage_blocks=(1, 2))


def test_patching_leaves_the_random_stream_alone_and_follows_the_seed():
    def weights(seed):
        torch.manual_seed(seed)
        model = tiny()
        before = torch.get_rng_state()
        vt.patch(model, "sit", keep=0.5)
        assert torch.equal(torch.get_rng_state(), before)
        return {k: v for k, v in model.state_dict().items() if "visiontok" in k}

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    names = [name for name in first if name.endswith("weight.1.weight")]
    assert len(names) == 3
    assert not any(torch.equal(first[name], other[name]) for name in names)
    assert not torch.equal(first[names[0]], first[names[1]])


def test_training_on_a_timm_model_moves_every_module(tmp_path):
    torch.manual_seed(0)
    model = tiny(reg_tokens=2).double()
    plain = copy.deepcopy(model.state_dict())
    red = vt.patch(model, "sit", keep=0.5)
    learned = {name: p for name, p in model.named_parameters() if "visiontok" in name}
    assert len(learned) == 3 * 7
    before = {name: p.detach().clone() for name, p in learned.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2])
    nn.functional.cross_entropy(model.train()(x), y).backward()
    # The last layer's bias shifts all logits of a slot alike, which a softmax over tokens does not see.
    inert = {name for name in learned if name.endswith("weight.3.bias")}
    assert all(p.grad is not None for p in learned.values())
    assert all(bool(p.grad.abs().max() > 0) for name, p in learned.items() if name not in inert)
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in learned.items() if name not in inert)
    expected = model.eval()(x)

    red.save_pretrained(tmp_path)
    other = tiny(reg_tokens=2).double()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain})
    vt.from_pretrained(other, tmp_path)
    assert torch.equal(other(x), expected)

    vt.unpatch(model)
    assert list(model.state_dict()) == list(plain)
    assert not any("visiontok" in name for name, _ in model.named_modules())


def test_official_names_load_and_misfits_are_named():
    torch.manual_seed(0)
    model = tiny()
    red = vt.patch(model, "sit", keep=0.5)
    state = {f"tsm.{j}.{name}": torch.randn_like(p) for j, K in enumerate((8, 4, 2))
             for name, p in TokenSlimmingModule(24, K).state_dict().items()}  # fmt: skip
    assert sorted(red.load_learned(state)) == sorted(state)
    mine = [p for name, p in model.state_dict().items() if "visiontok" in name]
    assert all(torch.equal(a, b) for a, b in zip(mine, state.values()))
    state["tsm.1.weight.3.bias"] = torch.zeros(5)
    with pytest.raises(vt.VisionTokError, match=r"tsm.1.weight.3.bias is \(5,\), needs \(4,\)"):
        red.load_learned(state)


def test_another_resolution_gives_the_trained_counts():
    torch.manual_seed(0)
    model = tiny(dynamic_img_size=True)
    red = vt.patch(model, "sit", keep=0.5)
    assert red.plan.tokens == [9, 5, 3, 3]
    with torch.no_grad():
        # 64 and 4 tokens come in: the second is fewer than leave the first module. With 8, as many leave as come in.
        for size in ((64, 64), (16, 16), (16, 32)):
            assert torch.isfinite(model(torch.randn(1, 3, *size))).all()
            assert red.tokens == [9, 5, 3, 3]


def test_no_reduction_adds_nothing():
    model = tiny()
    for nothing in ({"r": 0}, {"keep": 1.0}, {"keeping_ratio": 1.0}):
        with vt.patched(model, "sit", **nothing) as red:
            assert not any("visiontok" in name for name in model.state_dict())
            assert not red.plan.removes
