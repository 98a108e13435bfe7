"""Token maps: what is painted where, on origins made by hand."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import visiontok
from visiontok.errors import ParameterError
from visiontok.models.tiny import tiny_vit
from visiontok.viz import label_hash, layer_maps, survival_map, token_gif, token_map, token_strip


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def entry(layer: int, patches: list[int], grid: tuple[int, int], prefix: int = 1) -> SimpleNamespace:
    origin = np.array([[*range(prefix), *(slot if slot < 0 else slot + prefix for slot in patches)]], dtype=np.int32)
    return SimpleNamespace(layer=layer, origin=origin, grid=grid, prefix=prefix)


QUARTERS = np.zeros((8, 8, 3), np.uint8)
QUARTERS[:4, :4], QUARTERS[:4, 4:], QUARTERS[4:, :4] = (200, 0, 0), (0, 100, 0), (0, 0, 80)


def test_group_takes_its_mean_color_wherever_its_patches_lie() -> None:
    out = pixels(token_map(QUARTERS, [0, 1, 2, 3, 1], (2, 2), scale=1, borders=False))
    assert out[0, 0].tolist() == out[7, 7].tolist() == [100, 0, 0]
    assert out[0, 7].tolist() == [0, 100, 0]
    assert out[7, 0].tolist() == [0, 0, 80]


def test_means_are_taken_at_any_size_and_grid() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    origin = rng.integers(-1, 4, 15)
    out = pixels(token_map(image, origin, (3, 5), 0, scale=1, borders=False))
    labels = np.array([[origin[(y * 3 // 37) * 5 + x * 5 // 53] for x in range(53)] for y in range(37)])
    for slot in range(4):
        expected = image[labels == slot].mean(axis=0)
        assert np.abs(out[labels == slot] - expected).max() <= 0.5


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_is_skipped(prefix: int) -> None:
    patches = np.array([3, 3, 0, -1, 0, 7]) + prefix
    patches[3] = -1
    origin = np.concatenate([np.arange(prefix), patches])
    plain = token_map(QUARTERS, np.where(patches < 0, -1, patches - prefix), (2, 3), 0)
    assert np.array_equal(pixels(token_map(QUARTERS, origin, (2, 3), prefix)), pixels(plain))
    assert label_hash(origin, (2, 3), prefix) == label_hash([3, 3, 0, -1, 0, 7], (2, 3), 0)


@pytest.mark.parametrize("style", ["mean", "label", "heat"])
def test_dropped_patches_are_hatched_gray(style: str) -> None:
    red = np.full((64, 64, 3), (255, 0, 0), np.uint8)
    out = pixels(token_map(red, [0, 1, -1, 2, 3], (2, 2), style=style, scale=4, borders=False))
    dropped, kept = out[:128, 128:], out[:128, :128]
    assert (dropped == dropped[..., :1]).all(), "gray"
    assert len(np.unique(dropped)) == 2, "stripes of two shades"
    assert not (kept == kept[..., :1]).all()


def test_borders_lie_on_region_edges_only() -> None:
    white = np.full((96, 96, 3), 255, np.uint8)
    out = pixels(token_map(white, [0, 1, 1, 2, 1], (2, 2), scale=4))  # an L of one token and a single patch
    size = out.shape[0]
    marked = (out != 255).any(axis=-1)
    center = size // 2
    assert marked[center + 2 :, center - 2 : center + 2].all(), "between the L and the single patch, both sides"
    assert not marked[: center - 8, center - 8 : center + 8].any(), "inside the L"
    assert not marked[0].any(), "the picture has no frame"
    assert out[size - 1, center].tolist() == out[center - 1, 8].tolist(), "the L has one color"
    assert not (pixels(token_map(white, [0, 1, 1, 2, 1], (2, 2), scale=4, borders=False)) != 255).any()


def test_single_tokens_keep_their_picture_under_label_and_are_full_under_heat() -> None:
    label = pixels(token_map(QUARTERS, [0, 1, 2, 3, 3], (2, 2), style="label", scale=1, borders=False))
    assert label[0, 0].tolist() == [200, 0, 0]
    assert label[7, 0].tolist() != [0, 0, 80]
    heat = pixels(token_map(np.zeros((8, 8)), [0, 1, 2, 3, 3], (2, 2), style="heat", scale=1, borders=False))
    assert heat[0, 0].sum() > heat[7, 7].sum(), "a token of its own is brighter than half a token"


@pytest.mark.parametrize(("side", "expected"), [(8, 256), (32, 256), (200, 400), (256, 256), (300, 300)])
def test_small_pictures_are_enlarged_by_a_whole_factor(side: int, expected: int) -> None:
    assert token_map(np.zeros((side, side)), np.arange(17), (4, 4)).size == (expected, expected)


def test_same_input_gives_the_same_bytes() -> None:
    origin = np.random.default_rng(1).integers(-1, 9, 65)
    assert token_map(QUARTERS, origin, (8, 8)).tobytes() == token_map(QUARTERS, origin, (8, 8)).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_every_usual_mode_is_drawn(mode: str) -> None:
    base = Image.new("L", (40, 24), 255 if mode == "1" else 200)
    picture = Image.fromarray(np.full((24, 40), 51400, np.uint16)) if mode in ("I;16", "I") else base.convert(mode)
    out = token_map(picture.convert("I") if mode == "I" else picture, np.arange(7), (2, 3), scale=1, borders=False)
    assert out.size == (40, 24)
    assert abs(int(pixels(out)[0, 0, 0]) - (255 if mode == "1" else 200)) <= 1


def test_label_hash_names_the_partition_not_the_numbers() -> None:
    assert label_hash([0, 1, 1, 2, -1, 2, 3], (2, 3)) == "518d069f2c45a8be"
    assert label_hash([0, 9, 9, 4, -1, 4, 1], (2, 3)) == label_hash([0, 1, 1, 2, -1, 2, 3], (2, 3))
    assert label_hash([0, 1, 1, 2, -1, 2, 3], (3, 2)) != label_hash([0, 1, 1, 2, -1, 2, 3], (2, 3))


TRACE = [entry(0, [0, 1, 2, 2], (2, 2)), entry(3, [0, -1, 1, 1], (2, 2))]


def test_layer_maps_are_captioned_with_live_tokens() -> None:
    assert [caption for caption, _ in layer_maps(QUARTERS, TRACE)] == [
        "input: 5 tokens",
        "layer 0: 4 tokens",
        "layer 3: 3 tokens",
    ]
    assert [caption for caption, _ in layer_maps(QUARTERS, TRACE, layers=[3])][1:] == ["layer 3: 3 tokens"]


def traced(reducer: str, **params: Any) -> list[Any]:
    torch.manual_seed(0)
    images = torch.stack([torch.zeros(3, 32, 32), *torch.rand(2, 3, 32, 32) * 2 - 1])
    with visiontok.patched(tiny_vit(), reducer, **params, trace=True) as reduction, torch.inference_mode():
        reduction.model(images)
        return reduction.trace


@pytest.mark.parametrize(
    ("reducer", "params"),
    [
        ("sit", {"keep": 0.5}),
        ("token_transforming", {"keep": 0.5}),
        ("expedite", {"clusters": (4, 4), "start": 4, "end": 8}),
        ("evo_vit", {"keep": 0.5}),
        ("clca", {"inner": "evit", "keep": 0.6, "num_clr": 2}),
        ("ats", {}),
        ("ats", {"compact": False}),
        ("mpm", {"adaptive": True, "compact": False}),
        ("cubist", {"keep": 0.5}),
    ],
)
def test_every_kind_of_reduction_is_drawn_where_its_origin_says(reducer: str, params: dict[str, Any]) -> None:
    trace = traced(reducer, **params)
    for sample in (0, 2):
        panels = layer_maps(np.zeros((32, 32)), trace, sample=sample, scale=1, borders=False)
        assert len(panels) == len(trace) + 1
        for (caption, panel), step in zip(panels[1:], trace):
            # N0 = one class token and 64 patches, whatever joined the sequence since.
            dropped = (step.origin[sample, 1:].view(8, 8) < 0).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
            assert np.array_equal(pixels(panel).sum(-1) > 0, dropped), "hatched where dropped, else the black picture"
            live = step.map.K if step.size is None else int((step.size[sample] > 0).sum())
            assert caption.startswith(f"layer {step.layer}: {live} tokens")
            assert caption.endswith(", span") == (step.site.name == "AROUND")
        survival_map(np.zeros((32, 32)), trace, sample=sample)


def test_strip_has_a_panel_per_layer_and_wraps() -> None:
    one_row, two_columns = token_strip(QUARTERS, TRACE), token_strip(QUARTERS, TRACE, columns=2)
    assert one_row.width == 3 * 256 + 4 * 8
    assert two_columns.width == 2 * 256 + 3 * 8
    assert two_columns.height > 1.9 * one_row.height
    assert token_strip(QUARTERS, [entry(i, [0, 1, 2, 2], (2, 2)) for i in range(12)]).width == 7 * 256 + 8 * 8


def test_gif_has_a_frame_per_panel() -> None:
    assert Image.open(io.BytesIO(token_gif(QUARTERS, TRACE))).n_frames == 3


def test_survival_ranks_patches() -> None:
    out = pixels(survival_map(np.zeros((8, 8)), TRACE, scale=1)).sum(axis=-1)
    assert out[0, 0] > out[7, 7] > 0, "kept for itself, then shared"
    assert out[0, 7] == pixels(survival_map(np.zeros((8, 8)), [TRACE[0], TRACE[1]], scale=1)).sum(axis=-1)[0, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"origin": np.arange(6)}, r"origin has 6 tokens, but prefix=1 and grid=\(2, 2\) make 1 \+ 2 \* 2 = 5"),
        ({"origin": np.zeros((2, 5), int)}, r"origin has shape \(2, 5\).*origin\[0\]"),
        ({"origin": np.zeros(5)}, "origin has dtype float64"),
        ({"origin": [0, 1, 2, 3, -2]}, "origin contains -2"),
        ({"grid": (0, 4)}, r"grid=\(0, 4\) is no patch grid"),
        ({"prefix": -1}, "prefix=-1 is negative"),
        ({"style": "fancy"}, "style='fancy' is unknown; choose one of mean, label, heat"),
        ({"scale": 0}, "scale=0 is no whole factor"),
        ({"scale": 1.5}, r"scale=1\.5 is no whole factor"),
        ({"scale": 100_000}, "scale=100000 makes"),
        ({"image": np.zeros((3, 8, 8))}, r"image has shape \(3, 8, 8\).*channels last"),
        ({"image": np.full((8, 8), -1.0)}, r"image has floats outside \[0, 1\]"),
        ({"image": np.zeros((8, 8), np.int64)}, "image has dtype int64"),
    ],
)
def test_wrong_arguments_are_named(change: dict, said: str) -> None:
    arguments = {"image": QUARTERS, "origin": np.arange(5), "grid": (2, 2), "prefix": 1}
    with pytest.raises(ParameterError, match=said):
        token_map(**{**arguments, **change})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "trace is empty: patch with trace=True"),
        ((None,), "trace is empty"),
        ((TRACE, {"layers": [1]}), r"asks for \[1\], but the trace has \[0, 3\]"),
        ((TRACE, {"sample": 1}), "sample=1 is not in the traced batch of 1"),
        ((TRACE, {"columns": 0}), "columns=0"),
        (([SimpleNamespace(layer=2, origin=None, grid=(2, 2), prefix=1)],), "layer 2 has no origin map"),
        (
            ([SimpleNamespace(layer=2, origin=np.zeros((1, 5), int), grid=None, prefix=1)],),
            r"layers \[2\].*no patch grid",
        ),
    ],
)
def test_wrong_traces_are_named(arguments: tuple, said: str) -> None:
    trace, *options = arguments
    with pytest.raises(ParameterError, match=said):
        token_strip(QUARTERS, trace, **(options[0] if options else {}))


def test_snapshot_of_a_real_decision() -> None:
    torch = pytest.importorskip("torch")
    vt = pytest.importorskip("visiontok")
    steps = torch.arange(1, 26, dtype=torch.float64)
    key = torch.stack([torch.cos(steps * 0.7), torch.sin(steps * 1.3), torch.cos(steps * steps * 0.1)], dim=-1)[None]
    state = vt.TokenState.initial(key, prefix=1)
    signals = vt.Signals.of(KEY=key[:, None], HIDDEN=key, GRID=(4, 6))
    decision = vt.reducers.create("tome", r=9).decide(signals, state, budget=9)
    assert label_hash(decision.assign[0], (4, 6)) == "49523df6545a17bc"
