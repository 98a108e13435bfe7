"""H2O, Keyformer, StreamingLLM, EMS and LazyLLM against loops, on what a real causal attention received."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.errors import ParameterError
from visiontok.ops.receiving import Received

# Typed loosely: a decision may be None.
create: Any = vt.reducers.create

N = 23
HEADS, SHARED = 4, 2


class Cached:
    """A prompt of N visual tokens and some text: rows are sample times key-value head, columns the visual tokens."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.received = Received(query, key, 0.7)

    def sum(self, perturb: Any = None, last: int | None = None) -> Tensor:
        return self.received.sum(perturb, last).flatten(0, 1)[:, 2 : 2 + N]


def case(text: int = 6, seed: int = 0, batch: int = 2) -> tuple[Any, Any, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    length = 2 + N + text
    query = torch.randn(batch, HEADS, length, 8, generator=noise)
    key = torch.randn(batch, SHARED, length, 8, generator=noise)
    item = key[:, :, 2 : 2 + N].flatten(0, 1).unsqueeze(1)
    state = vt.TokenState.initial(item.squeeze(1), 0, layer=1, depth=4)
    return vt.Signals.of(KEY=item, ATTN_SUM=Cached(query, key)), state, item.squeeze(1)


def kept(tm: Any) -> list[list[int]]:
    return [[n for n in range(tm.assign.shape[1]) if int(row[n]) >= 0] for row in tm.assign]


def best(score: list[float], count: int, last: int) -> list[int]:
    others = sorted(range(len(score) - last), key=lambda j: (-score[j], j))[: count - last]
    return sorted(others) + list(range(len(score) - last, len(score)))


@pytest.mark.parametrize(
    ("params", "count", "last"),
    [
        ({}, 4, 2),
        ({"heavy_ratio": 0.5, "recent_ratio": 0.2}, 15, 4),
        ({"heavy_ratio": 0.3, "recent_ratio": 0}, 6, 0),
        ({"heavy_ratio": 0, "recent_ratio": 0.4}, 9, 9),
        ({"keep": 9}, 9, 4),
        ({"keep": 0.5, "heavy_ratio": 0.3}, 12, 3),
        ({"r": 1}, 22, 11),
        ({"keep": 1}, 1, 0),
    ],
)
def test_h2o(params: dict[str, Any], count: int, last: int) -> None:
    signals, state, _ = case()
    tm = create("h2o", **params).decide(signals, state)
    assert kept(tm) == [best(row.tolist(), count, last) for row in signals.ATTN_SUM.sum()]
    assert count == tm.K


def test_heads_keep_different_entries() -> None:
    signals, state, _ = case()
    assert len({tuple(row) for row in kept(create("h2o", keep=9).decide(signals, state))}) == 4


@pytest.mark.parametrize("name", ["h2o", "keyformer", "streaming_llm", "ems", "lazy_llm"])
def test_no_budget_to_spend_is_the_identity_and_budgets_are_exact(name: str) -> None:
    signals, state, _ = case()
    assert create(name, keep=N).decide(signals, state) is None
    assert create(name, keep=10 * N).decide(signals, state) is None
    for removed in (1, 7, N - 1, 5 * N):
        tm = create(name).decide(signals, state, removed)
        assert N - min(removed, N - 1) == tm.K
        assert [len(set(row.tolist()) - {-1}) for row in tm.assign] == [tm.K] * 4


@pytest.mark.parametrize("name", ["h2o", "keyformer", "streaming_llm", "ems", "lazy_llm"])
def test_a_row_does_not_see_its_batch_mates(name: str) -> None:
    method = create(name, keep=8)
    signals, state, _ = case()
    query, key = signals.ATTN_SUM.received._query, signals.ATTN_SUM.received._key
    alone = vt.Signals.of(KEY=signals.KEY[2:], ATTN_SUM=Cached(query[1:], key[1:]))
    one = vt.TokenState.initial(signals.KEY[2:, 0], 0, layer=1, depth=4)
    assert method.decide(signals, state).assign[2:].tolist() == method.decide(alone, one).assign.tolist()


def gumbel_columns(signals: Any, method: Any, tau: float) -> list[list[float]]:
    """What each visual key receives under noisy logits; the noise itself is read from the method."""
    received = signals.ATTN_SUM.received
    query, key = received._query, received._key
    length = query.shape[2]
    spy: dict[str, Tensor] = {}

    class Spy:
        def sum(self, perturb: Any = None, last: int | None = None) -> Tensor:
            rows = torch.arange(length)
            spy["noise"] = perturb(torch.zeros(1, HEADS, length, length), rows)[0] * tau
            return torch.zeros(4, N)

    method.score(vt.Signals.of(ATTN_SUM=Spy()), vt.TokenState.initial(torch.zeros(1, N, 1), 0, layer=1, depth=4))
    out = []
    for b in range(query.shape[0]):
        for s in range(SHARED):
            column = [0.0] * length
            for h in range(s * HEADS // SHARED, (s + 1) * HEADS // SHARED):
                for i in range(length):
                    logits = [
                        (0.7 * float(query[b, h, i] @ key[b, s, j]) + float(spy["noise"][h, i, j])) / tau
                        for j in range(i + 1)
                    ]
                    total = sum(math.exp(x) for x in logits)
                    for j, x in enumerate(logits):
                        column[j] += math.exp(x) / total
            out.append(column[2 : 2 + N])
    return out


@pytest.mark.parametrize(
    ("params", "count", "last"),
    [({}, 13, 3), ({"kv_cache": 40, "recent": 50, "tau_init": 2.0}, 9, 4), ({"keep": 8, "seed": 3}, 8, 2)],
)
def test_keyformer(params: dict[str, Any], count: int, last: int) -> None:
    signals, state, _ = case()
    method = create("keyformer", **params)
    expected = gumbel_columns(signals, method, method.tau_init)
    assert kept(method.decide(signals, state)) == [best(row, count, last) for row in expected]


def test_keyformer_noise_depends_on_seed_and_layer_and_not_on_padding() -> None:
    signals, state, _ = case()
    plain = create("keyformer", keep=8).decide(signals, state).assign
    assert plain.tolist() == create("keyformer", keep=8).decide(signals, state).assign.tolist()
    assert plain.tolist() != create("keyformer", keep=8, seed=1).decide(signals, state).assign.tolist()
    assert plain.tolist() != create("keyformer", keep=8).decide(signals, state.changed(layer=2)).assign.tolist()
    received = signals.ATTN_SUM.received
    padded = Cached(*(torch.nn.functional.pad(t, (0, 0, 3, 0), value=9.0) for t in (received._query, received._key)))
    padded.received._live = torch.arange(received._key.shape[2] + 3).expand(2, -1) >= 3

    class Cut:
        def sum(self, perturb: Any = None, last: int | None = None) -> Tensor:
            return padded.received.sum(perturb).flatten(0, 1)[:, 5 : 5 + N]

    assert plain.tolist() == create("keyformer", keep=8).decide(vt.Signals.of(ATTN_SUM=Cut()), state).assign.tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"keep": 6}, [0, 1, 2, 3, 21, 22]),
        ({"recent_size": 3}, [0, 1, 2, 3, 20, 21, 22]),
        ({"keep": 3}, [0, 1, 2]),
        ({"keep": 2, "start_size": 0}, [21, 22]),
        ({"recent_size": 2, "start_size": 1}, [0, 21, 22]),
    ],
)
def test_streaming_llm(params: dict[str, Any], expected: list[int]) -> None:
    _, state, _ = case()
    method = create("streaming_llm", **params)
    assert kept(method.decide(vt.Signals.of(), state)) == [expected] * 4
    assert method.needs == ()


def test_streaming_llm_keeps_516_by_default() -> None:
    state = vt.TokenState.initial(torch.zeros(1, 576, 1), 0, layer=0, depth=2)
    assert kept(create("streaming_llm").decide(vt.Signals.of(), state)) == [[*range(4), *range(64, 576)]]


@pytest.mark.parametrize(("pool", "threshold"), [(1.0, 0.0), (2.0, 0.2), (2.0, -1.0), (9.0, 0.2)])
def test_ems(pool: float, threshold: float) -> None:
    signals, state, key = case()
    method = create("ems", keep=7, window=5, pool=pool, threshold=threshold)
    tm = method.decide(signals, state)
    merged = tm.reduce(key)
    everything, local = signals.ATTN_SUM.sum(), signals.ATTN_SUM.sum(last=5)
    joined = 0
    for row in range(4):
        score = [
            float(everything[row, j] / everything[row].mean() + local[row, j] / local[row].mean()) for j in range(N)
        ]
        order = sorted(range(N), key=lambda j: -score[j])
        centres = sorted(order[:7])
        members: dict[int, list[int]] = {centre: [centre] for centre in centres}
        for j in order[7 : int(7 * pool)]:
            cosines = {c: float(torch.cosine_similarity(key[row, j], key[row, c], dim=0)) for c in centres}
            nearest = max(cosines, key=lambda c: cosines[c])
            if cosines[nearest] >= threshold:
                members[nearest].append(j)
                joined += 1
        for slot, centre in enumerate(centres):
            assert [j for j in range(N) if int(tm.assign[row, j]) == slot] == sorted(members[centre])
            total = sum(score[j] for j in members[centre])
            mean = torch.stack([key[row, j] * (score[j] / total) for j in members[centre]]).sum(dim=0)
            torch.testing.assert_close(merged[row, slot], mean, rtol=1e-4, atol=1e-5)
    assert (joined > 0) == (pool > 1)
    assert joined < 4 * (N - 7) or threshold < 0


def test_lazy_llm_falls_over_the_depth_and_asks_the_last_query() -> None:
    method = create("lazy_llm", begin=0.25, final_keep=0.4)
    signals, state, _ = case()
    counts = []
    for layer in range(4):
        tm = method.decide(signals, state.changed(layer=layer))
        counts.append(N if tm is None else tm.K)
    assert counts == [23, 19, 14, 10]
    tm = method.decide(signals, state.changed(layer=3))
    assert kept(tm) == [best(row.tolist(), 10, 0) for row in signals.ATTN_SUM.sum(last=1)]
    same = create("lazy_llm", keep=5)
    assert [budget.count for budget in same.budgets(10).values()] == [5] * 7
    assert list(same.budgets(10)) == list(range(3, 10))
    assert (same.when, same.revives) == ("both", True)


@pytest.mark.parametrize(
    ("name", "params", "match"),
    [
        ("h2o", {"heavy_ratio": 1.1}, "heavy_ratio must be in"),
        ("h2o", {"heavy_ratio": 0.6, "recent_ratio": 0.6}, "heavy_ratio \\+ recent_ratio must be in"),
        ("h2o", {"heavy_ratio": 0, "recent_ratio": 0}, "heavy_ratio \\+ recent_ratio must be in"),
        ("keyformer", {"kv_cache": 0}, "kv_cache must be in"),
        ("keyformer", {"kv_cache": 50, "keep": 5}, "one budget"),
        ("keyformer", {"recent": 101}, "recent must be in"),
        ("keyformer", {"tau_init": 0}, "tau_init must be above 0"),
        ("streaming_llm", {"start_size": -1}, "start_size must be an int >= 0"),
        ("streaming_llm", {"recent_size": 5, "keep": 5}, "one budget"),
        ("ems", {"window": 0}, "window must be an int >= 1"),
        ("ems", {"pool": 0.5}, "pool must be at least 1"),
        ("ems", {"threshold": 2}, "threshold must be in"),
        ("lazy_llm", {"begin": 1.0}, "begin must be in"),
        ("lazy_llm", {"final_keep": 0}, "final_keep must be in"),
        ("h2o", {"over": "text"}, "over must be"),
    ],
)
def test_wrong_parameters(name: str, params: dict[str, Any], match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        create(name, **params)
