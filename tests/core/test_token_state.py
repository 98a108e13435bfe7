"""TokenState: what it carries along, what it composes, what it tells attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.positions import Positions
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError

MERGE = TokenMap(torch.tensor([[0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 2, 2]]), 3, form="complete")
MARKED = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1]]).bool()
DROP = TokenMap(torch.tensor([[0, -1, 1], [1, 0, -1]]), 2)


def hidden(batch: int = 2, length: int = 6) -> Tensor:
    return torch.arange(batch * length * 2, dtype=torch.float32).view(batch, length, 2)


def start(**fields: Any) -> TokenState:
    return TokenState.initial(hidden(), prefix=0, **fields)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 6), {}, r"x must be \(B, N, C\), got shape \(2, 6\)"),
        (torch.zeros(2, 6, 1), {"prefix": 7}, r"prefix must be in \[0, 6\], got 7"),
        (torch.zeros(2, 6, 1), {"prefix": -1}, r"prefix must be in \[0, 6\], got -1"),
        (torch.zeros(2, 6, 1), {"prefix": 1, "grid": (2, 3)}, r"grid \(2, 3\) does not hold the 5 non-prefix tokens"),
    ],
)
def test_initial_refuses(x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        TokenState.initial(x, **options)


def test_initial_state() -> None:
    state = TokenState.initial(hidden(), prefix=2, grid=(2, 2))
    assert (state.batch, state.n, state.n0, state.items, state.layer) == (2, 6, 6, 4, 0)
    assert state.size is None
    assert state.key_bias(torch.float32) is None
    assert state.origin.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert state.origin.dtype == torch.int32


def test_state_is_frozen() -> None:
    state = start()
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.n = 3  # type: ignore[misc]
    changed = state.changed(layer=4)
    assert (state.layer, changed.layer, changed.n) == (0, 4, 6)


def test_apply_moves_values_sizes_and_origin() -> None:
    x = hidden()
    y, state = vt.apply(MERGE, x, start())
    torch.testing.assert_close(y[0, 2], x[0, 3:].mean(dim=0))
    assert state.size.squeeze(-1).tolist() == [[1, 2, 3], [2, 2, 2]]
    assert state.origin.tolist() == MERGE.assign.tolist()
    assert (state.n, state.n0) == (3, 6)
    z, last = vt.apply(DROP, y, state)
    assert last.origin.tolist() == [[0, -1, -1, 1, 1, 1], [1, 1, 0, 0, -1, -1]]
    marked = last.changed(marks=(state.trail, ()))
    assert marked.origin_at(0).tolist() == MERGE.assign.tolist()
    assert marked.origin_at(1).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert last.size.squeeze(-1).tolist() == [[1, 3], [2, 2]]
    assert torch.equal(z[1], y[1, [1, 0]])
    # Sizes count the original tokens that each slot holds.
    for origin, size in zip(last.origin, last.size.squeeze(-1)):
        assert torch.bincount(origin[origin >= 0], minlength=2).tolist() == size.tolist()


def test_second_merge_weighs_by_size() -> None:
    x = hidden()
    y, state = vt.apply(MERGE, x, start())
    z, _ = vt.apply(TokenMap(torch.tensor([[0, 0, 0]] * 2), 1), y, state)
    torch.testing.assert_close(z[:, 0], x.mean(dim=1))


def test_streams_follow_the_same_tokens() -> None:
    x = hidden()
    (a, b), state = vt.apply(MERGE, (x, 10 * x), start())
    torch.testing.assert_close(10 * a, b)
    assert state.n == 3


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"x is \(2, 5, 2\), the map is over \(2, 6\) tokens"):
        vt.apply(MERGE, hidden(2, 5), start())
    with pytest.raises(ParameterError, match="the map takes 6 tokens, the state has 5"):
        vt.apply(MERGE, hidden(), TokenState.initial(hidden(2, 5), prefix=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sizes_use_at_least_fp32(dtype: torch.dtype) -> None:
    _, state = vt.apply(MERGE, hidden().to(dtype), start())
    assert state.size.dtype == torch.promote_types(dtype, torch.float32)


# ---- what travels along


@pytest.mark.parametrize(
    ("rule", "value", "want"),
    [
        ("sum", torch.arange(12.0).view(2, 6), [[0.0, 3.0, 12.0], [13.0, 17.0, 21.0]]),
        ("sum", torch.arange(12).view(2, 6), [[0, 3, 12], [13, 17, 21]]),
        ("any", MARKED, [[False, True, False], [True, False, True]]),
        ("anchor", torch.arange(12).view(2, 6), [[0, 1, 3], [6, 8, 10]]),
        (None, torch.arange(12).view(2, 6), [[0, 1, 3], [6, 8, 10]]),
    ],
)  # fmt: skip
def test_carry_follows_its_rule(rule: str | None, value: Tensor, want: list[list[float]]) -> None:
    rules = {} if rule is None else {"it": rule}
    _, state = vt.apply(MERGE, hidden(), start(carry={"it": value}, carry_rules=rules))
    assert state.carry["it"].tolist() == want
    assert state.carry["it"].dtype == value.dtype


def test_carry_of_dropped_tokens_goes() -> None:
    x = hidden(2, 3)
    carry, rules = {"a": torch.ones(2, 3), "b": torch.ones(2, 3, dtype=torch.bool)}, {"a": "sum", "b": "any"}
    _, state = vt.apply(DROP, x, TokenState.initial(x, prefix=0, carry=carry, carry_rules=rules))
    assert state.carry["a"].tolist() == [[1, 1], [1, 1]]
    assert state.carry["b"].tolist() == [[True, True], [True, True]]


def test_carry_keeps_trailing_dimensions_and_precision() -> None:
    value = torch.rand(2, 6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, state = vt.apply(MERGE, hidden(), start(carry={"it": value}, carry_rules={"it": "sum"}))
    assert state.carry["it"].shape == (2, 3, 2, 3)
    torch.testing.assert_close(state.carry["it"][0, 2], value[0, 3:].sum(dim=0), atol=1e-14, rtol=0)
    big = torch.full((2, 6), 2**24 + 1)
    _, state = vt.apply(MERGE, hidden(), start(carry={"it": big}, carry_rules={"it": "sum"}))
    assert state.carry["it"][0].tolist() == [2**24 + 1, 2 * (2**24 + 1), 3 * (2**24 + 1)]


def test_unknown_carry_rule_is_refused() -> None:
    state = start(carry={"it": torch.ones(2, 6)}, carry_rules={"it": "median"})
    with pytest.raises(ParameterError, match="median"):
        vt.apply(MERGE, hidden(), state)


def test_map_replaces_carry_stash_and_memo() -> None:
    fresh = torch.full((2, 3), 9.0)
    tm = MERGE.with_state(carry={"new": fresh, "old": fresh}, stash=torch.ones(2, 1, 2), memo={"b": 2})
    state = start(carry={"old": torch.ones(2, 6), "kept": torch.arange(12).view(2, 6)}, memo={"a": 1, "b": 1})
    _, after = vt.apply(tm, hidden(), state)
    assert after.carry["old"] is fresh
    assert after.carry["new"] is fresh
    assert after.carry["kept"].tolist() == [[0, 1, 3], [6, 8, 10]]
    assert after.stash.shape == (2, 1, 2)
    assert after.memo == {"a": 1, "b": 2}
    _, later = vt.apply(DROP, hidden(2, 3), after)
    assert later.memo == after.memo
    assert later.stash is after.stash


def test_identity_changes_memo_and_nothing_else() -> None:
    x = hidden()
    state = start(grid=(2, 3), carry={"it": torch.ones(2, 6)})
    y, after = vt.apply(TokenMap.identity(x, memo={"seen": True}), x, state)
    assert y is x
    assert after.memo == {"seen": True}
    assert after.trail == ()
    assert after.grid == (2, 3)
    assert after.carry["it"] is state.carry["it"]


def test_grid_survives_only_where_the_map_says_so() -> None:
    x = hidden()
    _, lost = vt.apply(MERGE, x, start(grid=(2, 3)))
    assert lost.grid is None
    tm = TokenMap(torch.tensor([[0, 0, 1, 1, 2, 2]] * 2), 3, grid=(1, 3))
    _, kept = vt.apply(tm, x, start(grid=(2, 3)))
    assert kept.grid == (1, 3)


def test_positions_are_those_of_the_anchors() -> None:
    gathered = Positions.initial("gather", 2, 6, 0, None, torch.device("cpu"))
    anchored = TokenMap(MERGE.assign, 3, anchor=torch.tensor([[0, 2, 4], [1, 3, 5]]))
    _, state = vt.apply(anchored, hidden(), start(positions=gathered))
    assert state.positions is not None
    assert state.positions.index.tolist() == [[0, 2, 4], [1, 3, 5]]
    _, state = vt.apply(MERGE, hidden(), start(positions=gathered))
    assert state.positions is not None
    assert state.positions.index.tolist() == [[0, 1, 3], [0, 2, 4]]


# ---- attention


def test_key_bias() -> None:
    _, plain = vt.apply(MERGE, hidden(), start())
    assert plain.key_bias(torch.float32) is None
    _, weighted = vt.apply(MERGE, hidden(), start(proportional=True))
    bias = weighted.key_bias(torch.float32)
    assert bias.shape == (2, 1, 1, 3)
    torch.testing.assert_close(bias.flatten(1), torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]]).log())
    assert weighted.key_bias(torch.float16).dtype == torch.float16


@pytest.mark.parametrize("proportional", [False, True])
def test_padding_is_masked(proportional: bool) -> None:
    padded = TokenMap(torch.tensor([[0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1]]), 3, counts=torch.tensor([3, 2]))
    _, state = vt.apply(padded, hidden(), start(proportional=proportional))
    assert state.padded
    bias = state.key_bias(torch.float32).flatten(1)
    assert bias[1, 2] == -math.inf
    size = torch.tensor([[1.0, 2.0, 3.0], [3.0, 3.0, 0.0]])
    torch.testing.assert_close(
        bias, size.log() if proportional else torch.zeros(2, 3).masked_fill(size == 0, -math.inf)
    )
    # Padding stays padding through a later map without counts of its own.
    swap = TokenMap(torch.tensor([[2, 1, 0]] * 2), 3, form="complete")
    _, later = vt.apply(swap, hidden(2, 3), state)
    assert later.padded
    assert later.size[1].flatten().tolist() == [0, 3, 3]


# ---- restoring and moving


def test_restore_through_several_maps() -> None:
    y, state = vt.apply(MERGE, hidden(), start())
    z, state = vt.apply(DROP, y, state)
    full = state.restore(z)
    assert torch.equal(full[0], torch.stack([z[0, 0], 0 * z[0, 0], 0 * z[0, 0], z[0, 1], z[0, 1], z[0, 1]]))
    near = state.restore(z, "nearest")
    assert torch.equal(near[0, 1], z[0, 0])
    assert torch.equal(near[0, 2], z[0, 1])
    x = hidden()
    assert torch.equal(state.restore(z, "self", x=x)[0, 1:3], x[0, 1:3])
    assert start().restore(x) is x


def test_nearest_never_fills_a_patch_with_the_class_token() -> None:
    x = hidden(1, 5)
    state = TokenState.initial(x, prefix=1)
    y, state = vt.apply(TokenMap.keep(torch.tensor([[3]]), 5, prefix=1), x, state)
    full = state.restore(y, "nearest")
    assert torch.equal(full[0, 1:], x[0, 3].expand(4, 2))
    assert torch.equal(full[0, 0], x[0, 0])


def test_restored_gradient_reaches_the_slots() -> None:
    y = torch.ones(2, 3, 2, requires_grad=True)
    _, state = vt.apply(MERGE, hidden(), start())
    state.restore(y).sum().backward()
    assert y.grad[..., 0].tolist() == [[1, 2, 3], [2, 2, 2]]


def test_to_moves_every_tensor() -> None:
    extra = {"carry": {"a": torch.ones(2, 6)}, "memo": {"b": torch.ones(1), "c": "text"}, "stash": torch.ones(2, 1, 2)}
    _, state = vt.apply(
        MERGE, hidden(), start(positions=Positions.initial("mean", 2, 6, 0, (2, 3), hidden().device), **extra)
    )
    moved = state.to(torch.device("meta"))
    assigned = [step.assign for step in moved.trail]
    where: Any = moved.positions
    tensors = [moved.size, where.index, where.coords, moved.stash, moved.carry["a"], moved.memo["b"], *assigned]
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.memo["c"] == "text"
    assert moved.device == torch.device("meta")
    assert not state.size.is_meta


def test_gradient_of_dropped_tokens_is_zero_not_nan() -> None:
    # Slot 0 is empty, so a dropped token must not be divided by its size.
    tm = TokenMap(torch.tensor([[-1, 1, 1, 2, -1, 2]] * 2), 3)
    for size in (None, torch.full((2, 6, 1), 7.0)):
        x = hidden().requires_grad_()
        y, _ = vt.apply(tm, x, start(size=size))
        y.sum().backward()
        assert x.grad[0, :, 0].tolist() == [0.0, 0.5, 0.5, 0.5, 0.0, 0.5]


def test_restore_when_only_the_prefix_is_left() -> None:
    x = hidden(1, 5)
    y, state = vt.apply(TokenMap.keep(torch.empty(1, 0, dtype=torch.int64), 5, prefix=1), x, TokenState.initial(x))
    assert torch.equal(state.restore(y, "nearest"), x[:, :1].expand(-1, 5, -1))
    whole = TokenState.initial(x, prefix=5)
    y, whole = vt.apply(TokenMap.keep(torch.empty(1, 0, dtype=torch.int64), 5, prefix=5), x, whole)
    assert torch.equal(whole.restore(y, "nearest"), x)
