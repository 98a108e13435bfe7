"""Positions that follow tokens: means and gathers of rotary rows and biases, against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.positions import Positions
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import IncompatibleError, ParameterError

GRID = (3, 4)
LEAD = 2
N0 = LEAD + GRID[0] * GRID[1]
STEPS = torch.tensor([[0.3, 1.7, 0.0, 0.0], [0.0, 0.0, 0.3, 2.9]], dtype=torch.float64)


def place(index: int) -> tuple[int, int]:
    return (index - LEAD) // GRID[1], (index - LEAD) % GRID[1]


def angles(row: float, column: float) -> Tensor:
    return row * STEPS[0] + column * STEPS[1]


def table() -> Tensor:
    return torch.stack([angles(*place(i)) for i in range(LEAD, N0)])


def opened(rule: str, grid: tuple[int, int] | None = GRID) -> tuple[Tensor, TokenState]:
    x = torch.zeros(2, N0, 3)
    positions = Positions.initial(rule, 2, N0, LEAD, grid, x.device)
    return x, TokenState.initial(x, LEAD, grid).changed(positions=positions)


def random_map(n: int, k: int, seed: int, drop: int = 0) -> TokenMap:
    """The prefix stays; others go to random slots, each of which has a member; the last `drop` are dropped."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(2):
        order = torch.randperm(n - LEAD, generator=generator)
        slots = torch.cat((torch.arange(k - LEAD), torch.randint(k - LEAD, (n - k,), generator=generator)))[order]
        rows.append(torch.cat((torch.arange(LEAD), slots + LEAD)))
    assign = torch.stack(rows)
    if drop:
        assign[:, -drop:] = -1
    return TokenMap(assign, k)


def twice(rule: str) -> tuple[TokenState, list[list[list[int]]]]:
    """A state after two maps, and the original tokens in each slot."""
    x, state = opened(rule)
    x, state = vt.apply(random_map(N0, 10, 0), x, state)
    _, state = vt.apply(random_map(10, 6, 1), x, state)
    members: list[list[list[int]]] = [[[] for _ in range(6)] for _ in range(2)]
    for b, row in enumerate(state.origin.tolist()):
        for token, slot in enumerate(row):
            members[b][slot].append(token)
    return state, members


def test_mean_rows_are_those_of_the_mean_of_all_members() -> None:
    state, members = twice("mean")
    assert state.positions is not None
    sin, cos = state.positions.rotary(table().sin(), table().cos(), STEPS)
    assert sin.shape == (2, 1, 4, 4)
    for b in range(2):
        for slot in range(LEAD, 6):
            places = torch.tensor([place(i) for i in members[b][slot]], dtype=torch.float64)
            row, column = places.mean(dim=0).tolist()
            torch.testing.assert_close(sin[b, 0, slot - LEAD], angles(row, column).sin(), atol=1e-6, rtol=0)
            torch.testing.assert_close(cos[b, 0, slot - LEAD], angles(row, column).cos(), atol=1e-6, rtol=0)


def test_gathered_rows_are_the_anchors_and_unmerged_tokens_are_exact_under_both_rules() -> None:
    for rule in ("mean", "gather"):
        state, members = twice(rule)
        assert state.positions is not None
        index = state.positions.index
        sin, _ = state.positions.rotary(table().sin().float(), table().cos().float(), STEPS)
        lone = 0
        for b in range(2):
            for slot in range(LEAD, 6):
                own = members[b][slot]
                assert int(index[b, slot]) in own
                if rule == "gather" or len(own) == 1:
                    lone += len(own) == 1
                    assert torch.equal(sin[b, 0, slot - LEAD], table().sin().float()[int(index[b, slot]) - LEAD])
        assert lone


def test_rows_per_head_and_per_sample() -> None:
    state, _ = twice("mean")
    assert state.positions is not None
    steps = torch.stack((STEPS, 2 * STEPS), dim=1)
    heads = torch.stack((table(), 2 * table()))
    sin, cos = state.positions.rotary(heads.sin(), heads.cos(), steps)
    assert sin.shape == (2, 2, 4, 4)
    for head, scale in enumerate((1, 2)):
        one, _ = state.positions.rotary((scale * table()).sin(), (scale * table()).cos(), scale * STEPS)
        torch.testing.assert_close(sin[:, head], one[:, 0])
    batched, _ = state.positions.rotary(heads.sin().expand(2, -1, -1, -1), heads.cos().expand(2, -1, -1, -1), steps)
    assert torch.equal(batched, sin)
    assert cos.dtype == torch.float64


def test_biases_against_loops() -> None:
    bias = torch.randn(2, N0, N0, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mean, members = twice("mean")
    gather, _ = twice("gather")
    assert mean.positions is not None
    assert gather.positions is not None
    index = gather.positions.index
    averaged, taken = mean.positions.bias(bias, mean.origin), gather.positions.bias(bias, gather.origin)
    assert averaged.shape == taken.shape == (2, 2, 6, 6)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                block = bias[:, members[b][i]][:, :, members[b][j]]
                torch.testing.assert_close(averaged[b, :, i, j], block.mean(dim=(1, 2)), atol=1e-12, rtol=0)
                if block[0].numel() == 1:
                    assert torch.equal(averaged[b, :, i, j], block[:, 0, 0])
                assert torch.equal(taken[b, :, i, j], bias[:, index[b, i], index[b, j]])


def test_a_mean_bias_is_exact_under_autocast_and_has_gradients() -> None:
    state, members = twice("mean")
    assert state.positions is not None
    bias = torch.randn(3, N0, N0, generator=torch.Generator().manual_seed(4), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = state.positions.bias(bias, state.origin)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, state.positions.bias(bias, state.origin), atol=0, rtol=0)
    mean.sum().backward()
    shares = bias.grad
    assert shares is not None
    for own in members[0]:
        torch.testing.assert_close(shares[0, own].sum(), torch.tensor(6.0 + sum(
            6 * len(set(own) & set(other)) / len(other) for other in members[1])))  # fmt: skip


def test_tokens_that_join_have_no_position() -> None:
    x, state = opened("mean")
    assign = torch.arange(N0 + 1).expand(2, -1).clone()
    joined = TokenMap(assign, N0 + 1, extra=torch.ones(2, 1, 3))
    _, state = vt.apply(joined, x, state)
    assert state.positions is not None
    assert state.positions.index[:, -1].tolist() == [-1, -1]
    sin, cos = state.positions.rotary(table().sin(), table().cos(), STEPS)
    assert torch.equal(sin[:, :, -1], torch.zeros(2, 1, 4, dtype=torch.float64))
    assert torch.equal(cos[:, :, -1], torch.ones(2, 1, 4, dtype=torch.float64))
    assert torch.equal(sin[0, 0, :-1], table().sin())
    for rule in ("mean", "gather"):
        x, state = opened(rule)
        _, state = vt.apply(joined, x, state)
        assert state.positions is not None
        bias = state.positions.bias(torch.ones(N0, N0), state.origin)
        assert float(bias[..., -1].abs().max()) == float(bias[..., -1, :].abs().max()) == 0
        assert float(bias[..., :-1, :-1].min()) == 1


def test_dropped_tokens_move_nothing() -> None:
    x, state = opened("mean")
    _, state = vt.apply(TokenMap.keep(torch.tensor([[3, 7], [2, 13]]), N0, LEAD), x, state)
    assert state.positions is not None
    sin, _ = state.positions.rotary(table().sin(), table().cos(), STEPS)
    assert torch.equal(sin[:, 0], table().sin()[torch.tensor([[1, 5], [0, 11]])])


def test_soft_maps_stand_at_the_mean_of_what_they_mix() -> None:
    x, state = opened("mean")
    soft = torch.zeros(2, LEAD + 1, N0)
    soft[:, 0, 0] = soft[:, 1, 1] = 1
    soft[:, 2, [2, 5]] = torch.tensor([3.0, 1.0])
    assign = torch.full((2, N0), 2)
    assign[:, :2] = torch.tensor([0, 1])
    _, state = vt.apply(TokenMap(assign, 3, soft=soft), x, state)
    assert state.positions is not None
    assert state.positions.coords is not None
    assert state.positions.coords[:, 2].tolist() == [[0, 0.75], [0, 0.75]]


def test_a_mean_needs_a_grid_and_rules_have_names() -> None:
    x, state = opened("mean", grid=None)
    _, state = vt.apply(random_map(N0, 10, 0), x, state)
    assert state.positions is not None
    with pytest.raises(IncompatibleError, match="positions='gather'"):
        state.positions.rotary(table().sin(), table().cos(), STEPS)
    with pytest.raises(ParameterError, match="positions must be 'mean' or 'gather', got 'nearest'"):
        vt.reducers.create("tome", r=1, positions="nearest")
