"""ATS and its unsorted variant against loops; independence of the batch; budgets as caps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.errors import ParameterError
from visiontok.reducers.ats import nearest

# Typed loosely: a decision may be None.
create: Any = vt.reducers.create

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "clca"


def setup(
    n: int, prefix: int = 1, sharp: float = 2.0, batch: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Any, Any]:
    noise = torch.Generator().manual_seed(n * 5 + prefix)
    attention = torch.randn(batch, 2, prefix, n + prefix, generator=noise, dtype=torch.float64).mul(sharp).softmax(-1)
    value = torch.randn(batch, 2, n + prefix, 4, generator=noise, dtype=torch.float64)
    state = vt.TokenState.initial(value.transpose(1, 2).flatten(2), prefix, layer=3, depth=12)
    return attention, value, state, vt.Signals.of(ATTN_PREFIX=attention, VALUE=value)


def naive(
    a: Tensor, v: Tensor, prefix: int, samples: int, live: list[int] | None = None, whole: bool = True
) -> list[int]:
    """Kept tokens of one sample in slot order, one token at a time, padding left out of everything."""
    live = list(range(prefix, a.shape[-1])) if live is None else live
    score = {j: sum(float(a[h, 0, j]) for h in range(a.shape[0])) * float(v[:, j].norm()) for j in live}
    total = sum(score.values())
    order = sorted(live, key=lambda j: score[j])
    cdf, acc = [], 0.0
    for j in order:
        acc += score[j] / total
        cdf.append(acc)
    start = cdf[0] if whole else 0.0
    cdf = [(c - start) / (cdf[-1] - start) for c in cdf]
    least = min(c for c in cdf if c > 0)
    ys = [least + (1 - least) * (i / (samples - 1) if samples > 1 else 1.0) for i in range(samples)]
    ranks = {min(range(len(cdf)), key=lambda i: abs(y - cdf[i])) for y in ys}
    return [order[i] for i in sorted(ranks)]


def kept(tm: Any, b: int, prefix: int) -> list[int]:
    count = int(tm.counts[b])
    assert tm.kept[b, :prefix].tolist() == list(range(prefix))
    return tm.kept[b, prefix:count].tolist()


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize(("n", "sharp"), [(16, 1.0), (25, 4.0), (9, 8.0), (2, 1.0), (3, 1.0)])
def test_adaptive_samples_equal_loops(n: int, sharp: float, prefix: int) -> None:
    attention, value, state, signals = setup(n, prefix, sharp)
    tm: Any = create("ats").decide(signals, state)
    for b in range(3):
        assert kept(tm, b, prefix) == naive(attention[b], value[b], prefix, n)
    assert n + prefix == tm.K
    dead = ~tm.live
    y, after = vt.apply(tm, value.transpose(1, 2).flatten(2), state)
    size: Any = after.size
    assert (size.squeeze(-1) == tm.live).all()
    assert not y[dead].any()


@pytest.mark.parametrize("samples", [1, 2, 5, 11])
def test_a_budget_caps_the_samples(samples: int) -> None:
    attention, value, state, signals = setup(12)
    for fields, budget in (({"keep": samples}, None), ({}, 12 - samples)):
        tm: Any = create("ats", **fields).decide(signals, state, budget)
        assert samples + 1 == tm.K
        for b in range(3):
            assert kept(tm, b, 1) == naive(attention[b], value[b], 1, samples)


def test_a_later_stage_treats_padding_as_absent() -> None:
    attention, value, state, _ = setup(14)
    live = torch.arange(15) < torch.tensor([[15], [9], [2]])
    attention = attention * live[:, None, None]
    attention = attention / attention.sum(dim=-1, keepdim=True)
    state = state.changed(n0=21, size=live.double().unsqueeze(-1), padded=True)
    signals = vt.Signals.of(ATTN_PREFIX=attention, VALUE=value)
    tm: Any = create("ats").decide(signals, state)
    for b, count in enumerate((15, 9, 2)):
        assert kept(tm, b, 1) == naive(attention[b], value[b], 1, 20, list(range(1, count)), whole=False)
    official: Any = create("ats", compat="official").decide(signals, state)
    assert kept(official, 0, 1) == naive(attention[0], value[0], 1, 20)
    assert kept(official, 1, 1) == kept(tm, 1, 1)


def test_tiny_and_constant_inputs() -> None:
    _, _, state, signals = setup(1)
    assert create("ats").decide(signals, state) is None
    _, _, state, signals = setup(2)
    assert create("ats").decide(signals, state).counts.tolist() == [2, 2, 2]
    assert create("ats", compat="official").decide(signals, state).counts.tolist() == [1, 1, 1]
    for n in (2, 5):
        x = torch.zeros(1, n + 1, 8)
        flat = vt.Signals.of(ATTN_PREFIX=torch.zeros(1, 2, 1, n + 1), VALUE=torch.zeros(1, 2, n + 1, 4))
        tm = create("ats").decide(flat, vt.TokenState.initial(x, layer=3, depth=12))
        assert tm.kept[0, : int(tm.counts[0])].tolist() == list(range(0, n + 1))[:1] + list(range(2, n + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_equals_comparing_all(dtype: Any) -> None:
    noise = torch.Generator().manual_seed(1)
    for case in range(60):
        n, m = 1 + case % 23, 1 + case % 31
        power = 1 + 40 * (case % 4)
        raw = torch.rand(2, n, generator=noise, dtype=dtype).pow(power).sort(dim=1).values.cumsum(dim=1)
        cdf = (raw - raw[:, :1]) / (raw[:, -1:] - raw[:, :1]).clamp_min(1e-30)
        cdf = (cdf * 8).round() / 8 if case % 5 == 0 else cdf
        ys = torch.rand(2, m, generator=noise, dtype=dtype)
        ys = (ys * 16).round() / 16 if case % 5 == 0 else ys
        gaps = (ys.unsqueeze(2) - cdf.unsqueeze(1)).abs()
        first = (gaps == gaps.amin(dim=2, keepdim=True)).int().argmax(dim=2)
        assert torch.equal(nearest(cdf, ys), first), case


@pytest.fixture(scope="module")
def model() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    made = (
        VisionTransformer(img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=3).eval().double()
    )
    blocks: Any = made.blocks
    for block in blocks:
        block.attn.qkv.weight.data.mul_(12)
    return made


@pytest.mark.parametrize("params", [{}, {"keep": 0.6}, {"r": 30}, {"tokens": 8}, {"keep": [1.0, 0.7, 0.2, 0.5]}])
@pytest.mark.parametrize("name", ["ats", "ats_v2"])
def test_no_image_depends_on_its_batch_and_compaction_changes_nothing(
    model: Any, name: str, params: dict[str, Any]
) -> None:
    if name == "ats_v2" and not params:
        pytest.skip("has no setting without a budget")
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x * torch.tensor([0.2, 1.0, 4.0, 9.0], dtype=torch.float64).view(-1, 1, 1, 1)
    results = []
    with torch.no_grad():
        for compact in (True, False):
            with vt.patched(copy.deepcopy(model), name, compact=compact, **params) as red:
                together = red.model(x)
                alone = torch.cat([red.model(x[i : i + 1]) for i in range(4)])
                torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
                results.append(together)
        assert not torch.allclose(results[0], model(x))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_official_compaction_depends_on_the_batch(model: Any) -> None:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad(), vt.patched(copy.deepcopy(model), "ats", compat="official") as red:
        alone = torch.cat([red.model(x[i : i + 1]) for i in range(4)])
        assert not torch.allclose(red.model(x), alone)


def test_ats_blocks() -> None:
    assert list(create("ats").layers(12)) == list(range(3, 12))
    assert list(create("ats", ats_blocks=[5, 2]).layers(12)) == [2, 5]
    assert list(create("ats_v2").layers(12)) == [3, 6, 9]
    with pytest.raises(ParameterError, match="ats: ats_blocks must be a list"):
        create("ats", ats_blocks=3)
    assert not create("ats", keep=1.0).always
    assert not create("ats", r=0).always
    assert create("ats", r=[0, 2]).always


def unsorted(a: Tensor, v: Tensor, steps: list[float]) -> list[int]:
    score = [sum(float(a[h, 0, j] * v[h, j].norm()) for h in range(len(a))) for j in range(1, a.shape[-1])]
    cdf, acc = [], 0.0
    for value in score:
        acc += value / (sum(score) + 1e-6)
        cdf.append(acc)
    return sorted({1 + min(range(len(cdf)), key=lambda i: abs(step - cdf[i])) for step in steps})


@pytest.mark.parametrize("samples", [1, 2, 3, 6, 7, 12])
def test_the_unsorted_variant_equals_loops(samples: int) -> None:
    attention, value, state, signals = setup(13)
    middle = [(2 * i + 1) / (2 * samples) for i in range(samples)]
    released = torch.arange(1 / (2 * samples), (2 * samples - 1) / (2 * samples), 1 / samples).tolist() or [0.5]
    assert len(released) == (samples if samples in (1, 3, 7, 12) else samples - 1)
    for compat, steps in ((None, middle), ("official", released)):
        tm: Any = create("ats_v2", keep={3: samples}, compat=compat).decide(signals, state)
        assert samples + 1 == tm.K
        for b in range(3):
            assert kept(tm, b, 1) == unsorted(attention[b], value[b], steps)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("op_atsv2_*.safetensors")), ids=lambda path: path.stem)
def test_the_unsorted_variant_equals_its_golden_files(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        params = json.loads(file.metadata()["params"])
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    attention, value, ids = data["in.attn"], data["in.v"], data["out.ids"]
    state = vt.TokenState.initial(value.transpose(1, 2).flatten(2), layer=3, depth=12)
    state = state.changed(size=data["in.mask"].float().unsqueeze(-1), padded=True)
    signals = vt.Signals.of(ATTN_PREFIX=attention[:, :, :1], VALUE=value)
    reducer: Any = create("ats_v2", compat="official")
    steps = reducer.steps(params["sample_count"], torch.zeros(1))
    torch.testing.assert_close(steps, torch.tensor(params["steps"]))
    tm: Any = reducer.decide(signals, state, state.items - params["sample_count"])
    width = ids.shape[1]
    assert not tm.live[:, width:].any()
    assert torch.equal(tm.kept.masked_fill(~tm.live, 0)[:, :width], ids)
    assert torch.equal(tm.live[:, :width], data["out.mask"])


def test_released_unsorted_variant_samples_padding_like_tokens() -> None:
    noise = torch.Generator().manual_seed(30)
    attention = torch.randn(4, 2, 26, 26, generator=noise).mul(3)
    value = torch.randn(4, 2, 26, 8, generator=noise)
    live = torch.ones(4, 26, dtype=torch.bool)
    for b in range(1, 4):
        live[b, 12 - 2 * b : 22] = False
    attention = attention.masked_fill(~live.view(4, 1, 1, 26), -torch.inf).softmax(dim=-1)
    state = vt.TokenState.initial(torch.zeros(4, 26, 1)).changed(size=live.float().unsqueeze(-1), padded=True)
    signals = vt.Signals.of(ATTN_PREFIX=attention[:, :, :1], VALUE=value)
    tm = create("ats_v2", compat="official").decide(signals, state, budget=25 - 13)
    steps = torch.arange(1 / 26, 25 / 26, 1 / 13).tolist()
    revived = 0
    for b in range(4):
        score = [sum(float(attention[b, h, 0, j] * value[b, h, j].norm()) for h in range(2)) for j in range(1, 26)]
        cdf = torch.tensor(score).div(sum(score) + 1e-6).cumsum(dim=0) + 0.1 * ~live[b, 1:]
        want = sorted({min(range(25), key=lambda i: abs(s - float(cdf[i]))) + 1 for s in steps})
        assert kept(tm, b, 1) == want
        revived += sum(not live[b, j] for j in want)
    assert revived
    size: Any = vt.apply(tm, torch.zeros(4, 26, 1), state)[1].size
    assert size[:, :, 0].sum(dim=1).tolist() == tm.counts.tolist()
