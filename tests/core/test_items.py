"""Items: decisions on parts of sequences, stitched into one map."""

from __future__ import annotations

import pytest
import torch

import visiontok as vt
from visiontok.core.items import Items, decide_items, stitch
from visiontok.errors import IncompatibleError, ParameterError


def test_one_item_over_the_whole_sequence_equals_the_plain_decision() -> None:
    torch.manual_seed(0)
    x, key = torch.randn(2, 17, 8), torch.randn(2, 3, 17, 4)
    state = vt.TokenState.initial(x, prefix=1)
    tome = vt.reducers.create("tome", r=5)
    plain = tome.decide(vt.Signals.of(KEY=key), state, 5)
    items = Items((0, 1), torch.arange(17).repeat(2, 1), prefix=1)
    stitched = decide_items(tome, {"KEY": lambda: key}, state, [items], [5])
    assert plain is not None
    assert stitched is not None
    assert torch.equal(plain.assign, stitched.assign)
    assert torch.equal(plain.kept, stitched.kept)
    torch.testing.assert_close(vt.apply(plain, x, state)[0], vt.apply(stitched, x, state)[0])


def test_tokens_outside_items_keep_their_place_and_value() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 12, 4)
    state = vt.TokenState.initial(x, prefix=0)
    # Row 0: text 0-2, image 3-8, text 9-11. Row 1: the image sits at 1-6.
    items = Items((0, 1), torch.stack((torch.arange(3, 9), torch.arange(1, 7))))
    tm = decide_items(vt.reducers.create("random", r=2), {}, state, [items], [2])
    assert tm is not None
    y, after = vt.apply(tm, x, state)
    assert y.shape == (2, 10, 4)
    assert torch.equal(y[0, :3], x[0, :3])
    assert torch.equal(y[0, -3:], x[0, -3:])
    assert torch.equal(y[1, :1], x[1, :1])
    assert torch.equal(y[1, -5:], x[1, -5:])
    assert (after.origin == -1).sum(dim=1).tolist() == [2, 2]


def test_rows_with_different_numbers_of_items_are_padded() -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 9, 4)
    state = vt.TokenState.initial(x, prefix=0)
    items = Items((0, 0, 1), torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8], [2, 3, 4, 5]]))
    tm = decide_items(vt.reducers.create("random", r=1), {}, state, [items], [1])
    assert tm is not None
    assert tm.K == 8
    assert tm.counts is not None
    assert tm.counts.tolist() == [7, 8]
    y, after = vt.apply(tm, x, state)
    assert after.size is not None
    assert after.size[0, :, 0].tolist() == [1.0] * 7 + [0.0]
    assert after.key_bias(torch.float32)[0, 0, 0, -1].item() == float("-inf")
    assert torch.equal(y[0, 3], x[0, 4])


def test_two_groups_of_different_length_merge_with_weights() -> None:
    torch.manual_seed(3)
    x, key = torch.randn(1, 14, 4), torch.randn(1, 1, 14, 4)
    state = vt.TokenState.initial(x, prefix=0)
    groups = [Items((0,), torch.arange(0, 6)[None]), Items((0,), torch.arange(7, 14)[None])]
    pitome = vt.reducers.create("pitome", preset="deit", kind="protect")
    tm = decide_items(pitome, {"KEY": lambda: key}, state, groups, [2, 3])
    assert tm is not None
    y, after = vt.apply(tm, x, state)
    assert y.shape[1] == 9
    assert after.size is not None
    assert after.size.sum().item() == 14
    first = pitome.decide(vt.Signals.of(KEY=key[:, :, :6]), groups[0].state(state), 2)
    assert first is not None
    torch.testing.assert_close(y[:, :4], first.reduce(x[:, :6]))
    assert torch.equal(y[:, 4], x[:, 6])


def test_soft_maps_have_no_stitched_form() -> None:
    x = torch.randn(1, 4, 2)
    state = vt.TokenState.initial(x, prefix=0)
    soft = vt.TokenMap(torch.zeros(1, 3, dtype=torch.int64), 1, soft=torch.full((1, 1, 3), 1 / 3))
    with pytest.raises(IncompatibleError, match="soft maps"):
        stitch([soft], [Items((0,), torch.tensor([[0, 1, 2]]))], state)


def test_index_must_have_one_row_per_item() -> None:
    with pytest.raises(ParameterError, match=r"index must be \(2, n\)"):
        Items((0, 1), torch.zeros(1, 3, dtype=torch.int64))
