"""SAM's encoder in transformers: windows as items, small maps, restoration before the neck, refusals."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import visiontok as vt
from visiontok import backbones
from visiontok.backbones.hf_sam import join, partition, segment_anything_keys
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError, StateLostError
from visiontok.ops import clustering


@functools.cache
def made() -> dict[str, Any]:
    return backbones.registry.get("hf_sam")().examples()


@pytest.fixture(params=["vision", "padded", "no_windows"])
def sam(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    model, image = made()[request.param]
    return copy.deepcopy(model).double(), image.double()


def embed(model: Any, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image).last_hidden_state


def by_hand(model: Any, image: Tensor, start: int, end: int, cells: tuple[int, int]) -> Tensor:
    """Windows cut, clustered, run and rebuilt one after the other, with the host's own modules."""
    encoder = model.vision_encoder
    layers = encoder.layers
    with torch.no_grad():
        x = encoder.patch_embed(image) + encoder.pos_embed
        for layer in layers[:start]:
            x = layer(x)
        height, width = x.shape[1:3]
        win = encoder.config.window_size or height
        down, across = -(-height // win), -(-width // win)
        x = F.pad(x, (0, 0, 0, across * win - width, 0, down * win - height))
        small = x.new_zeros(len(x), down * cells[0], across * cells[1], x.shape[-1])
        ways: dict[tuple[int, int], Tensor] = {}
        for i in range(down):
            for j in range(across):
                tokens = x[:, i * win : (i + 1) * win, j * win : (j + 1) * win].flatten(1, 2)
                c = clustering.cluster_dense(tokens, (win, win), cells, 5, 0.02, 5).centroids
                ways[i, j] = clustering.reconstruct_weights(tokens, c, 3, 0.02)
                rows = slice(i * cells[0], (i + 1) * cells[0])
                small[:, rows, j * cells[1] : (j + 1) * cells[1]] = c.unflatten(1, cells)
        for layer in layers[start:end]:
            # The host's own layer, told of another window: both sides must be equal for that.
            layer = copy.copy(layer)
            layer.window_size = cells[0] if layer.window_size else 0
            small = layer(small)
        full = torch.zeros_like(x)
        for (i, j), way in ways.items():
            rows = slice(i * cells[0], (i + 1) * cells[0])
            part = small[:, rows, j * cells[1] : (j + 1) * cells[1]].flatten(1, 2)
            full[:, i * win : (i + 1) * win, j * win : (j + 1) * win] = (way @ part).unflatten(1, (win, win))
        x = full[:, :height, :width]
        for layer in layers[end:]:
            x = layer(x)
        return encoder.neck(x)


@pytest.mark.parametrize(("start", "end"), [(0, None), (1, None), (2, None), (3, None), (1, 3), (2, 3)])
def test_the_patched_encoder_equals_windows_by_hand(sam: tuple[Any, Tensor], start: int, end: int | None) -> None:
    model, image = sam
    want = by_hand(model, image, start, 4 if end is None else end, (3, 3))
    with vt.patched(model, "expedite", clusters=9, start=start, end=end, k=3) as red:
        got = embed(model, image)
        side = model.vision_encoder.config.window_size or 8
        assert red.tokens == red.plan.tokens
        assert red.plan.length == side * side
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_zero_reduction_and_unpatching_are_bit_equal(sam: tuple[Any, Tensor]) -> None:
    model, image = sam
    before = embed(model, image)
    names = list(model.state_dict())
    for options in ({"r": 0}, {"keep": 1.0}):
        with vt.patched(model, "expedite", **options):
            assert torch.equal(embed(model, image), before)
            assert list(model.state_dict()) == names
    assert torch.equal(embed(model, image), before)
    assert not any("_visiontok" in vars(module) for module in model.modules())


@pytest.mark.parametrize("start", [1, 3])
def test_cubist_shrinks_every_window_and_the_neck_gets_the_full_map(sam: tuple[Any, Tensor], start: int) -> None:
    model, image = sam
    encoder = model.vision_encoder
    cubist = vt.reducers.create("cubist", rh=1, rw=1, loc=start)
    with torch.no_grad():
        x = encoder.patch_embed(image) + encoder.pos_embed
        for layer in encoder.layers[:start]:
            x = layer(x)
        height, width = x.shape[1:3]
        win = encoder.config.window_size or height
        down = -(-height // win)
        x = F.pad(x, (0, 0, 0, down * win - width, 0, down * win - height))
        full, small = torch.zeros_like(x), x.new_zeros(len(x), down * (win - 1), down * (win - 1), x.shape[-1])
        places = {}
        for i, j in itertools.product(range(down), repeat=2):
            tokens = x[:, i * win : (i + 1) * win, j * win : (j + 1) * win].flatten(1, 2)
            state = TokenState.initial(tokens, 0, (win, win))
            tm = cubist.decide(vt.Signals.of(HIDDEN=tokens, GRID=(win, win)), state, win * win - (win - 1) ** 2)
            assert tm is not None
            places[i, j] = tm.assign
            rows, columns = slice(i * (win - 1), (i + 1) * (win - 1)), slice(j * (win - 1), (j + 1) * (win - 1))
            small[:, rows, columns] = tm.reduce(tokens).unflatten(1, (win - 1, win - 1))
        for layer in encoder.layers[start:]:
            layer = copy.copy(layer)
            layer.window_size = win - 1 if layer.window_size else 0
            small = layer(small)
        for (i, j), place in places.items():
            rows, columns = slice(i * (win - 1), (i + 1) * (win - 1)), slice(j * (win - 1), (j + 1) * (win - 1))
            part = small[:, rows, columns].flatten(1, 2)
            back = part.gather(1, place.unsqueeze(-1).expand(-1, -1, part.shape[-1]))
            full[:, i * win : (i + 1) * win, j * win : (j + 1) * win] = back.unflatten(1, (win, win))
        want = encoder.neck(full[:, :height, :width])
    with vt.patched(model, cubist) as red:
        torch.testing.assert_close(embed(model, image), want, rtol=1e-9, atol=1e-9)
        assert red.tokens == red.plan.tokens


def test_clusters_need_not_be_square(sam: tuple[Any, Tensor]) -> None:
    model, image = sam
    with vt.patched(model, "expedite", clusters=(3, 2), start=1, trace=True) as red:
        assert embed(model, image).shape == (2, 16, image.shape[2] // 8, image.shape[2] // 8)
        assert red.trace[0].map.grid == (3, 2)
        assert red.tokens[1:] == [6, 6, 6]


@pytest.mark.parametrize("kind", ["SamVisionEncoder", "SamModel"])
def test_the_encoder_alone_and_the_whole_sam(kind: str) -> None:
    from transformers.models.sam import configuration_sam as configs
    from transformers.models.sam import modeling_sam as sam

    model, image = made()["vision"]
    if kind == "SamVisionEncoder":
        other = copy.deepcopy(model.vision_encoder)
        read = lambda m: m(image).last_hidden_state  # noqa: E731
    else:
        small = {"hidden_size": 16, "num_hidden_layers": 1, "mlp_dim": 16, "image_size": 64, "patch_size": 8}
        config = configs.SamConfig(
            vision_config=model.config.to_dict(),
            prompt_encoder_config={**small, "image_embedding_size": 8, "num_point_embeddings": 4},
            mask_decoder_config={**small, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        )
        other = sam.SamModel(config).eval()
        other.vision_encoder.load_state_dict(model.vision_encoder.state_dict())
        read = lambda m: m.get_image_embeddings(image)[0]  # noqa: E731
    with torch.no_grad(), vt.patched(model, "expedite", clusters=4), vt.patched(other, "expedite", clusters=4):
        got = read(other)
        want = model(image).last_hidden_state
    torch.testing.assert_close(got, want if got.dim() == 4 else want[0])


def test_recorded_hidden_states_are_there_while_patched() -> None:
    model, image = made()["vision"]
    with torch.no_grad(), vt.patched(model, "expedite", clusters=4, start=2):
        states = model(image, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [8, 8, 4, 4, 4]


def test_only_grid_preserving_reducers_fit() -> None:
    model, _ = made()["vision"]
    for name in ("tome", "random", "pitome"):
        with pytest.raises(IncompatibleError, match=f"only reducers that keep a grid can be used; {name} does not"):
            vt.patch(model, name, r=2)


def test_layers_with_different_windows_are_refused() -> None:
    model = copy.deepcopy(made()["vision"][0])
    model.vision_encoder.layers[1].window_size = 2
    with pytest.raises(IncompatibleError, match="windows of 2, the others of 4"):
        vt.patch(model, "expedite", r=2)


def test_a_state_that_is_lost_between_layers() -> None:
    model, image = made()["vision"]
    with torch.no_grad(), vt.patched(copy.deepcopy(model), "expedite", clusters=4, start=1) as red:
        encoder: Any = red.model.vision_encoder
        want = embed(red.model, image)
        alive: list[Tensor] = []

        def replaced(change: Any) -> Any:
            def hook(*call: Any) -> Tensor:
                alive.append(call[-1])
                return change(call[-1])

            return encoder.layers[1].register_forward_hook(hook)

        # A copy of the same values is recognised while the original lives, other values are not.
        hook = replaced(lambda y: y.clone())
        assert torch.equal(embed(red.model, image), want)
        hook.remove()
        replaced(lambda y: y + 1)
        with pytest.raises(StateLostError):
            embed(red.model, image)


def test_gradients_reach_every_parameter() -> None:
    model = copy.deepcopy(made()["padded"][0]).train()
    image = made()["padded"][1]
    with vt.patched(model, "expedite", clusters=9, start=1):
        model(image).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_windows_and_back() -> None:
    x = torch.randn(2, 7, 9, 3)
    windows = partition(x, (3, 4))
    assert windows.shape == (2 * 3 * 3, 12, 3)
    assert torch.equal(windows[1].view(3, 4, 3), x[0, :3, 4:8])
    assert not windows[2].view(3, 4, 3)[:, 1:].any()
    assert torch.equal(join(windows, (3, 4), (3, 3))[:, :7, :9], x)


def test_segment_anything_names() -> None:
    model: Any = made()["vision"][0]
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {"mask_decoder.iou_token.weight": torch.zeros(1)}
    names = {"neck.conv1": "neck.0", "neck.layer_norm1": "neck.1", "neck.conv2": "neck.2", "neck.layer_norm2": "neck.3"}
    for name, value in ours.items():
        name = name.removeprefix("vision_encoder.").replace("patch_embed.projection", "patch_embed.proj")
        for mine, other in names.items():
            name = name.replace(mine, other)
        name = name.replace("layers.", "blocks.").replace("layer_norm", "norm")
        theirs[f"image_encoder.{name}"] = value
    assert segment_anything_keys(theirs).keys() == ours.keys()
    alone = {name.removeprefix("image_encoder."): t for name, t in theirs.items() if "image" in name}
    assert segment_anything_keys(alone).keys() == model.vision_encoder.state_dict().keys()
