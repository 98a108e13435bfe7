"""FastV, PyramidDrop, SparseVLM and DART against loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.schedule import Budget
from visiontok.core.visual import Text
from visiontok.errors import ParameterError
from visiontok.reducers.sparsevlm import text_raters


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(rows: int, n: int, layer: int, depth: int = 32, n0: int | None = None) -> vt.TokenState:
    state = vt.TokenState.initial(torch.zeros(rows, n, 1), prefix=0, layer=layer, depth=depth)
    return state if n0 is None else state.changed(n0=n0)


def best(score: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda j: (-score[j], j))[:count])


def text_of(rows: int, length: int, width: int, live: list[int]) -> Text:
    alive = torch.arange(length).expand(rows, -1) < torch.tensor(live).unsqueeze(1)
    return Text(draw(rows, length, width, seed=7) * alive.unsqueeze(-1), alive)


@pytest.mark.parametrize(("n", "ratio", "left"), [(5, 0.5, 2), (7, 0.5, 4), (10, 0.75, 2), (9, 0.0, 9), (9, 1.0, 0)])
def test_fastv_keeps_what_the_last_token_attends_to(n: int, ratio: float, left: int) -> None:
    rows = draw(2, 3, n).softmax(dim=-1)
    tm: Any = vt.reducers.create("fastv", ratio=ratio).decide(vt.Signals.of(ATTN_LAST=rows), state_of(2, n, 2))
    if left == n:
        assert tm is None
        return
    want = [best(row.mean(dim=0).tolist(), left) for row in rows]
    assert tm.kept.tolist() == want
    assert left == tm.K


def test_fastv_defaults_and_budgets() -> None:
    assert vt.reducers.create("fastv").budgets(32) == {2: Budget(ratio=0.5)}
    assert vt.reducers.create("fastv", k=5, keep=64).budgets(32) == {5: Budget(count=64)}
    rows = torch.full((1, 2, 6), 0.1)
    tm: Any = vt.reducers.create("fastv", keep=4).decide(vt.Signals.of(ATTN_LAST=rows), state_of(1, 6, 2))
    assert tm.kept.tolist() == [[0, 1, 2, 3]]
    assert vt.reducers.create("fastv").positions == "original"


@pytest.mark.parametrize("bad", [{"k": 0}, {"k": True}, {"ratio": 1.5}, {"ratio": -0.1}, {"ratio": 0.5, "keep": 4}])
def test_fastv_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="fastv: "):
        vt.reducers.create("fastv", **bad)


def test_pyramiddrop_counts_from_the_first_number_of_tokens() -> None:
    reducer: Any = vt.reducers.create("pyramiddrop")
    assert list(reducer.budgets(32)) == [8, 16, 24]
    assert list(reducer.budgets(40)) == [10, 20, 30]
    assert (reducer.look, reducer.positions) == ("ahead", "compact")
    n, counts = 45, []
    for layer in (8, 16, 24):
        rows = draw(2, 2, n, seed=layer).softmax(dim=-1)
        tm = reducer.decide(vt.Signals.of(ATTN_LAST=rows), state_of(2, n, layer, n0=45))
        assert tm.kept.tolist() == [best(row.mean(dim=0).tolist(), tm.K) for row in rows]
        n = tm.K
        counts.append(n)
    assert counts == [22, 11, 5]


def test_pyramiddrop_own_stages() -> None:
    reducer = vt.reducers.create("pyramiddrop", layer_list=[1, 3], image_token_ratio_list=[0.75, 0.1])
    assert reducer.budgets(4) == {1: Budget(ratio=0.75), 3: Budget(ratio=0.1)}
    assert vt.reducers.create("pyramiddrop", layer_list=[1], keep=9).budgets(4) == {1: Budget(count=9)}
    assert list(vt.reducers.create("pyramiddrop").budgets(2).values()) == [Budget(ratio=0.125)]


@pytest.mark.parametrize(
    "bad",
    [{"layer_list": [0, 2]}, {"layer_list": [3, 2]}, {"image_token_ratio_list": [0.5, 0.6, 0.1]},
     {"layer_list": [1, 2], "image_token_ratio_list": [0.5]}, {"image_token_ratio_list": [1.2, 0.5, 0.1]}],
)  # fmt: skip
def test_pyramiddrop_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="pyramiddrop: "):
        vt.reducers.create("pyramiddrop", **bad)


def naive_raters(x: Tensor, text: Text) -> list[list[int]]:
    found = []
    for row, tokens, live in zip(x, text.tokens, text.live):
        words = [t for t in range(len(tokens)) if live[t]]
        fit = dict.fromkeys(words, 0.0)
        for visual in row:
            logits = {t: float(visual @ tokens[t]) for t in words}
            top = max(logits.values(), default=0.0)
            total = sum(math.exp(v - top) for v in logits.values())
            for t in words:
                fit[t] += math.exp(logits[t] - top) / total / len(row)
        mean = sum(fit.values()) / max(len(fit), 1)
        chosen = [t for t in words if fit[t] > mean]
        found.append(chosen or words)
    return found


def test_sparsevlm_raters() -> None:
    x, text = draw(3, 6, 4), text_of(3, 5, 4, [5, 3, 0])
    shares = text_raters(x, text)
    want = naive_raters(x, text)
    assert [row.nonzero().squeeze(1).tolist() for row in shares] == want
    torch.testing.assert_close(shares.sum(dim=1), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))


def sparse_signals(rows: int, n: int, width: int = 4) -> tuple[vt.Signals, Tensor, Text, Tensor]:
    x, text = draw(rows, n, width, seed=n), text_of(rows, 5, width, [5, 3, 4][:rows])
    attention = draw(rows, 2, 5, n, seed=n + 1).softmax(dim=-1) * text.live[:, None, :, None]
    return vt.Signals.of(HIDDEN=x, TEXT=text, ATTN_TEXT=attention), x, text, attention


@pytest.mark.parametrize(("n", "keep"), [(40, 20), (40, 39), (40, 5), (40, 1), (200, 60)])
def test_sparsevlm_keeps_and_recycles(n: int, keep: int) -> None:
    signals, x, text, attention = sparse_signals(3, n)
    reducer: Any = vt.reducers.create("sparsevlm", keep=keep)
    tm = reducer.decide(signals, state_of(3, n, 3))
    assert keep == tm.K
    y, _ = vt.apply(tm, x, state_of(3, n, 3))
    for b, raters in enumerate(naive_raters(x, text)):
        score = [float(sum(attention[b, :, t, j].mean() for t in raters) / len(raters)) for j in range(n)]
        stay = max((t for t in range(keep) if t + int((int(0.3 * (n - t)) + 1) / 10) + 1 <= keep), default=0)
        ranked = sorted(range(n), key=lambda j: (-score[j], j))
        kept, back = sorted(ranked[:stay]), ranked[stay : stay + int(0.3 * (n - stay)) + 1]
        assert tm.kept[b, :stay].tolist() == kept
        assert sorted((tm.assign[b] >= stay).nonzero().squeeze(1).tolist()) == sorted(back)
        for slot in range(stay, keep):
            members = [j for j in back if int(tm.assign[b, j]) == slot]
            assert members
            torch.testing.assert_close(y[b, slot], x[b, members].mean(dim=0))


def test_sparsevlm_released_counts() -> None:
    reducer: Any = vt.reducers.create("sparsevlm", retained_tokens=192)
    assert list(reducer.budgets(32)) == [3, 7, 16]
    assert list(reducer.budgets(40)) == [3, 9, 20]
    n, counts = 576, []
    for layer in (3, 7, 16):
        signals = sparse_signals(1, n)[0]
        n = reducer.decide(signals, state_of(1, n, layer)).K
        counts.append(n)
    # 300 + 9 means of 83 tokens, 200 + 4 of 33, 110 + 3 of 29.
    assert counts == [309, 204, 113]
    plain: Any = vt.reducers.create("sparsevlm", retained_tokens=64, recycle=False)
    assert plain.decide(sparse_signals(1, 576)[0], state_of(1, 576, 3)).K == 66


@pytest.mark.parametrize(
    "bad", [{"retained_tokens": 100}, {"pruning_loc": [3, 1]}, {"pruning_loc": [2]}, {"retained_tokens": 64, "keep": 9}]
)
def test_sparsevlm_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="sparsevlm: "):
        vt.reducers.create("sparsevlm", **bad)


@pytest.mark.parametrize("params", [{"keep": 20}, {"keep": 3}, {"r": 1}, {"pivot_text_token": 0, "keep": 11}, {}])
def test_dart_keeps_the_least_similar(params: dict[str, Any]) -> None:
    rows, n = 2, 50
    x, key, text = draw(rows, n, 6), draw(rows, 2, n, 3, seed=1), text_of(rows, 5, 6, [5, 2])
    reducer: Any = vt.reducers.create("dart", **params)
    tm = reducer.decide(vt.Signals.of(HIDDEN=x, KEY=key, TEXT=text), state_of(rows, n, 2))
    left = tm.K
    assert left == {**{"keep": 4 + 8 * int(n * 0.222 // 8)}, **params}.get("keep") or params == {"r": 1} and left == 49
    for b in range(rows):
        size = [float(key[b, :, j].abs().sum()) for j in range(n)]
        pivots = sorted(range(n), key=lambda j: (-size[j], j))[: min(4, left)]
        kept, judges = set(pivots), [x[b, j] for j in pivots]
        words = [t for t in range(5) if text.live[b, t]]
        words = sorted(words, key=lambda t: -float(text.tokens[b, t].abs().sum()))[: reducer.pivot_text_token]
        judges += [text.tokens[b, t] for t in words] + [x[b, pivots[0]]] * (reducer.pivot_text_token - len(words))
        total, count = left - len(pivots), len(judges)
        for j, judge in enumerate(judges):
            share = total * (j + 1) // count - total * j // count
            alike = {i: float(torch.cosine_similarity(judge, x[b, i], dim=0)) for i in range(n) if i not in kept}
            kept |= set(sorted(alike, key=lambda i: (alike[i], i))[:share])
        assert tm.kept[b].tolist() == sorted(kept)


@pytest.mark.parametrize(
    "bad", [{"k": 0}, {"pivot_image_token": 0}, {"reduction_ratio": 1.0}, {"pivot_text_token": -1}]
)
def test_dart_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="dart: "):
        vt.reducers.create("dart", **bad)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "dart"])
def test_rows_do_not_depend_on_batch_mates(name: str) -> None:
    n, text = 40, text_of(3, 5, 4, [5, 3, 0])
    made = {
        "HIDDEN": draw(3, n, 4), "KEY": draw(3, 2, n, 4, seed=2), "ATTN_LAST": draw(3, 2, n, seed=3).softmax(dim=-1),
        "ATTN_TEXT": draw(3, 2, 5, n, seed=4).softmax(dim=-1) * text.live[:, None, :, None],
    }  # fmt: skip
    reducer = vt.reducers.create(name, keep=17)
    layer = list(reducer.layers(32))[0]
    together: Any = reducer.decide(vt.Signals.of(**made, TEXT=text), state_of(3, n, layer))
    for b in range(3):
        alone = {signal: value[b : b + 1] for signal, value in made.items()}
        one: Any = reducer.decide(
            vt.Signals.of(**alone, TEXT=Text(text.tokens[b : b + 1], text.live[b : b + 1])), state_of(1, n, layer)
        )
        assert torch.equal(one.assign[0], together.assign[b])
