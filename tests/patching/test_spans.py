"""Spans: reduced at their start, whole again at their end, also with another reducer inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import visiontok as vt
from visiontok.errors import IncompatibleError, ParameterError


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5} | options
    return VisionTransformer(**given).double().eval()


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def span(**params: Any) -> tuple[str, dict[str, Any]]:
    return "expedite", {"start": 1, "end": 3, "clusters": 16, "temperature": 0.05, **params}


def test_a_span_is_undone_at_its_end() -> None:
    model = tiny()
    red = vt.patch(model, [span()], trace=True)
    features = model.forward_features(IMAGE)
    assert red.tokens == red.plan.tokens == [17, 17, 65, 65]
    assert features.shape == (2, 65, 24)
    assert [point.undo for point in red.plan.points] == [False, True]
    assert "span ends" in str(red.plan)
    assert len(red.trace) == 1


def test_blocks_after_a_span_see_exactly_what_the_way_back_gives() -> None:
    model = tiny()
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for block in model.blocks]
    red = vt.patch(model, [span()], trace=True)
    with torch.no_grad():
        model(IMAGE)
        hooks += [model.blocks[2].register_forward_hook(lambda *call: seen.append(call[-1]))]
        tm = red.trace[0].map
        inside = seen[2]
        red.unpatch()
        # Block 2 alone, unpatched, then the map's own way back.
        expected = tm.back @ model.blocks[2](inside)
    torch.testing.assert_close(seen[3], expected)


def test_the_consumer_ends_what_is_still_open() -> None:
    model = tiny()
    red = vt.patch(model, [span(end=None)])
    assert model.forward_features(IMAGE).shape == (2, 65, 24)
    assert red.tokens == [17, 17, 17, 17]
    maps = model.forward_intermediates(IMAGE, output_fmt="NCHW", intermediates_only=True)
    assert {tuple(y.shape) for y in maps} == {(2, 24, 8, 8)}
    assert model(IMAGE).shape == (2, 5)


@pytest.mark.parametrize("inside", [("tome", {"r": {2: 5}}), ("topk", {"r": {2: 5}}), ("random", {"r": {2: 5}})])
def test_another_reducer_may_act_inside(inside: Any) -> None:
    model = tiny()
    red = vt.patch(model, [span(), inside], trace=True)
    features = model.forward_features(IMAGE)
    assert red.tokens == red.plan.tokens == [17, 17, 65, 65]
    assert features.isfinite().all()
    assert red.trace[-1].tokens == 12
    maps = model.forward_intermediates(IMAGE, output_fmt="NCHW", intermediates_only=True)
    assert {tuple(y.shape) for y in maps} == {(2, 24, 8, 8)}
    assert all(y.isfinite().all() for y in maps)


def test_reducing_after_a_span_works_on_full_length() -> None:
    model = tiny()
    red = vt.patch(model, [span(), ("tome", {"r": {3: 20}})])
    model(IMAGE)
    assert red.tokens == red.plan.tokens == [17, 17, 65, 45]


def test_gradients_pass_through_a_span() -> None:
    model = tiny()
    vt.patch(model, [span()])
    image = IMAGE.clone().requires_grad_()
    model(image).square().sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())


def test_a_span_must_end_after_it_starts() -> None:
    for end in (1, 0, 9):
        with pytest.raises(ParameterError, match="end|span"):
            vt.patch(tiny(), [span(end=end)])


def test_evo_vit_updates_every_token_it_left_out_later() -> None:
    model = tiny()
    red = vt.patch(model, "evo_vit", keep=0.5, trace=True)
    features = model.forward_features(IMAGE)
    assert features.shape == (2, 65, 24)
    assert red.tokens == red.plan.tokens
    assert min(step.tokens for step in red.trace) < 65


def test_spans_nest_but_do_not_cross() -> None:
    nested = [span(end=4, clusters=25), ("expedite", {"start": 2, "end": 3, "clusters": 9})]
    model = tiny(depth=6)
    red = vt.patch(model, nested)
    model(IMAGE)
    assert red.tokens == red.plan.tokens == [26, 10, 26, 65, 65, 65]
    for end in (5, None):
        with pytest.raises(IncompatibleError, match="across the end of expedite's span at layer 4"):
            vt.patch(tiny(depth=6), [span(end=4), ("expedite", {"start": 2, "end": end, "clusters": 9})])


def test_two_reducers_share_a_site_at_different_layers() -> None:
    model = tiny()
    red = vt.patch(model, [("tome", {"r": {1: 2}}), ("pitome", {"r": {2: 2}})])
    model(IMAGE)
    assert red.tokens == red.plan.tokens == [65, 63, 61, 61]
    with pytest.raises(IncompatibleError, match=r"pitome and tome both act at \(MID, layer 1\)"):
        vt.patch(tiny(), [("tome", {"r": {1: 2}}), ("pitome", {"r": {1: 2}})])


def test_clca_returns_its_cache_only_where_the_inner_reducer_acts() -> None:
    model = tiny(depth=6)
    red = vt.patch(model, "clca", inner=("tome", {"r": {2: 10}}), num_clr=0, clc_recover_at_last=False)
    model(IMAGE)
    # One token is cached after blocks 0 and 1, and both return after block 2.
    assert red.tokens == red.plan.tokens == [65, 65, 57, 57, 57, 57]
