"""Attentive masking and layer-wise shuffle against loops, in training and out of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visiontok as vt
from visiontok.errors import IncompatibleError, ParameterError
from visiontok.training.masking import (
    attentive_mask,
    attentive_masking,
    class_attention,
    crop_attention,
    layer_shuffle,
)

pytest.importorskip("timm")


def vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(**{**settings, **options})
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# ---- ops


def naive_mask(attention: Tensor, grid: tuple[int, int], ratio: float, block: int) -> Tensor:
    rows = []
    cells = (grid[0] // block, grid[1] // block)
    for row in attention:
        score = F.interpolate(row.view(1, 1, *grid), cells, mode="bilinear", align_corners=False).flatten().tolist()
        count = min(int(cells[0] * cells[1] * ratio) + 1, len(score))
        best = sorted(range(len(score)), key=lambda cell: (-score[cell], cell))[:count]
        rows.append([(y // block) * cells[1] + x // block not in best for y in range(grid[0]) for x in range(grid[1])])
    return torch.tensor(rows)


@pytest.mark.parametrize("grid", [(14, 14), (4, 8), (2, 2), (12, 6)])
@pytest.mark.parametrize(("ratio", "block"), [(0.5, 2), (0.01, 2), (1.0, 2), (0.3, 1)])
def test_mask(grid: tuple[int, int], ratio: float, block: int) -> None:
    attention = torch.rand(3, grid[0] * grid[1], generator=torch.Generator().manual_seed(2))
    mask = attentive_mask(attention, grid, ratio, block)
    assert torch.equal(mask, naive_mask(attention, grid, ratio, block))
    assert len(set((~mask).sum(1).tolist())) == 1
    assert torch.equal(attentive_mask(attention[:1], grid, ratio, block), mask[:1])


def test_mask_ties_go_to_the_first_cells() -> None:
    assert attentive_mask(torch.ones(1, 16), (4, 4), 0.5).view(4, 4).sum(1).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("attention", "grid", "ratio", "block"),
    [
        (torch.ones(1, 15), (4, 4), 0.5, 2),
        (torch.ones(16), (4, 4), 0.5, 2),
        (torch.ones(1, 15), (3, 5), 0.5, 2),
        (torch.ones(1, 16), (4, 4), 0.0, 2),
        (torch.ones(1, 16), (4, 4), 1.5, 2),
        (torch.ones(1, 16), (4, 4), 0.5, 0),
    ],
)
def test_mask_errors(attention: Tensor, grid: tuple[int, int], ratio: float, block: int) -> None:
    with pytest.raises(ParameterError):
        attentive_mask(attention, grid, ratio, block)


def naive_crop(attention: Tensor, grid: tuple[int, int], source: list[int], target: list[int]) -> Tensor:
    """Resize, cut pixel by pixel with zeros outside, resize back."""
    top, left, height, width = (target[0] - source[0], target[1] - source[1], target[2], target[3])
    pixels = F.interpolate(attention.view(1, 1, *grid), source[2:], mode="bilinear", align_corners=False)[0, 0]
    cut = torch.zeros(height, width, dtype=attention.dtype)
    for y in range(height):
        for x in range(width):
            if 0 <= y + top < source[2] and 0 <= x + left < source[3]:
                cut[y, x] = pixels[y + top, x + left]
    return F.interpolate(cut[None, None], grid, mode="bilinear", align_corners=False).flatten()


def test_crop_attention() -> None:
    grid = (4, 6)
    attention = torch.rand(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    # The same crop, a part, a larger one around it, one that hangs over the edge, and one far outside.
    source = torch.tensor([[0, 0, 20, 30], [3, 2, 31, 17], [5, 5, 8, 8], [0, 0, 16, 16], [0, 0, 9, 9]])
    target = torch.tensor([[0, 0, 20, 30], [9, 6, 11, 9], [0, 0, 20, 20], [-4, 9, 13, 25], [90, 90, 5, 5]])
    got = crop_attention(attention, grid, source, target)
    for row in range(5):
        want = naive_crop(attention[row], grid, source[row].tolist(), target[row].tolist())
        torch.testing.assert_close(got[row], want, atol=1e-12, rtol=0)
    assert torch.equal(crop_attention(attention[1:2], grid, source[1:2], target[1:2]), got[1:2])
    with pytest.raises(ParameterError, match="expected attention"):
        crop_attention(attention, (5, 5), source, target)


# ---- attentive masking in a model


def whole_attention(model: Any, x: Tensor) -> Tensor:
    """CLS attention averaged over layers and heads, from hand-made maps."""
    inputs: list[Tensor] = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    rows = []
    for block, y in zip(model.blocks, inputs):
        q, k, _ = block.attn.qkv(y).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        maps = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        rows.append(maps[:, :, 0, 1:].mean(1))
    return torch.stack(rows).mean(0).detach()


def test_class_attention(images: Tensor) -> None:
    model = vit()
    want = whole_attention(model, images)
    with class_attention(model) as attend:
        torch.testing.assert_close(attend(images), want)
        torch.testing.assert_close(attend(images[:1]), want[:1])
    torch.testing.assert_close(whole_attention(model, images), want, atol=0, rtol=0)
    with pytest.raises(vt.VisionTokError), class_attention(vit(class_token=False, global_pool="avg")):
        pass


@pytest.mark.parametrize("reducer", [None, "tome"])
def test_masking_keeps_what_the_teacher_attends_to(images: Tensor, reducer: str | None) -> None:
    model, teacher = vit(), vit()
    with torch.no_grad():
        plain = model(images)
    kept = ~attentive_mask(whole_attention(teacher, images), (4, 4), 0.5)
    entered: list[Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    if reducer:
        vt.patch(model, reducer, r=1)
    with attentive_masking(model, teacher, 0.5):
        model.train()
        masked = model(images)
        model.eval()
        with torch.no_grad():
            whole = model(images)
    full = entered[1]
    want = torch.stack([torch.cat((row[:1], row[1:][keep])) for row, keep in zip(full, kept)])
    assert want.shape[1] == 1 + 12
    torch.testing.assert_close(entered[0], want, atol=0, rtol=0)
    assert masked.shape == plain.shape
    assert not torch.allclose(masked, whole)
    if reducer is None:
        assert torch.equal(whole, plain)
    hook.remove()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for net in (model, teacher) for m in net.modules())
    assert not hasattr(teacher, "_visiontok")


def test_masking_trains(images: Tensor) -> None:
    model, teacher = vit().train(), vit()
    with attentive_masking(model, teacher, 0.25):
        model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_masking_errors() -> None:
    with pytest.raises(ParameterError, match="ratio"), attentive_masking(vit(), vit(), 2.0):
        pass
    with pytest.raises(ParameterError, match="block must divide"), attentive_masking(vit(), vit(), 0.5, block=3):
        pass
    model = vit()
    del model.patch_drop
    with pytest.raises(IncompatibleError, match="patch_drop"), attentive_masking(model, vit(), 0.5):
        pass


# ---- layer-wise shuffle


def block_inputs(model: Any) -> list[Tensor]:
    kept: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    return kept


def outputs(model: Any) -> list[Tensor]:
    kept: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, y: kept.append(y.detach()))
    return kept


def test_shuffle_moves_patches_and_puts_them_back(images: Tensor) -> None:
    model, plain = vit(depth=4, reg_tokens=2).train(), vit(depth=4, reg_tokens=2).train()
    with layer_shuffle(model, 1.0):
        seen, done, want = block_inputs(model), outputs(model), outputs(plain)
        torch.manual_seed(0)
        got = model(images)
    torch.testing.assert_close(got, plain(images), atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(done, want):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    before = [None, *done[:-1]]
    moved = [before[i] is not None and not torch.equal(seen[i], before[i]) for i in range(4)]
    # Block l does so with chance l / 3: never the first, always the last.
    assert not moved[0]
    assert moved[3]
    assert torch.equal(seen[3][:, :3], done[2][:, :3])
    order = [row.tolist() for row in seen[3][0]]
    assert sorted(order) == sorted(row.tolist() for row in done[2][0])
    places = [[row.tolist() for row in done[2][b]].index(seen[3][b, 7].tolist()) for b in range(2)]
    assert places[0] == places[1]


def test_shuffle_is_off_in_eval_and_gone_afterwards(images: Tensor) -> None:
    model = vit()
    want = model(images)
    with layer_shuffle(model, 1.0):
        state = torch.get_rng_state()
        assert torch.equal(model(images), want)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_shuffle_chance_grows_with_depth(images: Tensor) -> None:
    model = vit(depth=5).train()
    with layer_shuffle(model, 0.8):
        seen, done = block_inputs(model), outputs(model)
        torch.manual_seed(0)
        counts = [0] * 5
        with torch.no_grad():
            for _ in range(200):
                seen.clear(), done.clear()
                model(images)
                for index in range(1, 5):
                    counts[index] += int(not torch.equal(seen[index], done[index - 1]))
    for index, count in enumerate(counts):
        assert abs(count / 200 - 0.8 * index / 4) < 0.12


def test_shuffle_carries_sizes(images: Tensor) -> None:
    """Merged once in block 0, shuffled afterwards: sizes must follow their tokens through proportional attention."""
    model = vit(depth=4).train()
    red = vt.patch(model, "tome", r={0: 6}, trace=True)
    want = model(images)
    origin = red.trace[-1].origin
    with layer_shuffle(model, 1.0):
        states: list[Any] = []
        model.blocks[3].register_forward_hook(lambda _, args, y: states.append(vt.core.runtime.state_of(y)))
        torch.manual_seed(0)
        got = model(images)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(states[0].origin, origin)
    assert torch.equal(states[0].origin_at(3), origin)
    assert states[0].size.sum(1).flatten().tolist() == [17.0, 17.0]


def test_shuffle_changes_what_is_merged_and_restores_the_order(images: Tensor) -> None:
    model = vit(depth=4).train()
    red = vt.patch(model, "tome", r=3)
    states: list[Any] = []

    def keep(block: Any, args: Any, y: Tensor) -> None:
        states.append(vt.core.runtime.state_of(y))

    hook = model.blocks[3].register_forward_hook(keep)
    model(images)
    plain = states.pop().origin
    hook.remove()
    with layer_shuffle(model, 1.0):
        model.blocks[3].register_forward_hook(keep)
        torch.manual_seed(0)
        mixed = model(images)
        mixed.sum().backward()
    assert red.tokens == [14, 11, 8, 5]
    origin = states[0].origin
    together = origin[:, :, None] == origin[:, None]
    assert not torch.equal(together, plain[:, :, None] == plain[:, None])
    for row in origin.tolist():
        first = [row.index(slot) for slot in range(5)]
        assert first == sorted(first)
        assert row[0] == 0


def test_shuffle_leaves_learned_slots_alone(images: Tensor) -> None:
    pytest.importorskip("visiontok.reducers.sit")
    model = vit(depth=4).train()
    vt.patch(model, "sit", keep={3: 0.5})
    plain = model(images)
    with layer_shuffle(model, 1.0):
        torch.manual_seed(0)
        torch.testing.assert_close(model(images), plain, atol=1e-4, rtol=1e-4)


def test_shuffle_errors() -> None:
    with pytest.raises(ParameterError, match=r"shuffle must be in \[0, 1\], got 1.5"), layer_shuffle(vit(), 1.5):
        pass
