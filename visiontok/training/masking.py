"""Training-time changes to the token sequence: attentive masking (A-CLIP) and stochastic layer-wise shuffle.

Both are context managers around a training loop. They act only while the model is in training mode, and leave nothing
behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visiontok as vt
from visiontok.core import runtime
from visiontok.core.patching import ATTRIBUTE
from visiontok.core.reducer import Reducer
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState, apply
from visiontok.core.tokens import TokenMap
from visiontok.errors import IncompatibleError, ParameterError
from visiontok.finding import resolve_target
from visiontok.ops.ordering import stable_order

__all__ = ["attentive_mask", "attentive_masking", "class_attention", "crop_attention", "layer_shuffle"]

# ---- attentive masking (Yang et al., ICCV 2023, https://arxiv.org/abs/2212.08653)


def attentive_mask(attention: Tensor, grid: tuple[int, int], ratio: float, block: int = 2) -> Tensor:
    """Which patches A-CLIP removes: all but the cells with the highest attention.

    Attention is resized bilinearly to cells of `block` x `block` patches; `int(cells * ratio) + 1` cells stay.

    Args:
        attention: (B, N) attention of the class token to the patches.
        grid: (h, w), h * w = N; both divisible by `block`.
        ratio: Share of cells to keep, in (0, 1].
        block: Side of a cell in patches.

    Returns:
        (B, N) bool, True = removed; the same number in every row.

    Raises:
        ParameterError: The shapes do not fit, or `ratio` is out of range.
    """
    (height, width), batch = grid, attention.shape[0]
    if attention.dim() != 2 or attention.shape[1] != height * width:
        raise ParameterError(f"attention must be (B, {height * width}) for grid {grid}, got {tuple(attention.shape)}.")
    if block < 1 or height % block or width % block:
        raise ParameterError(f"block must divide both sides of grid {grid}, got {block}.")
    if not 0 < ratio <= 1:
        raise ParameterError(f"ratio must be in (0, 1], got {ratio!r}.")
    cells = (height // block, width // block)
    score = F.interpolate(attention.view(batch, 1, height, width), cells, mode="bilinear", align_corners=False)
    kept = stable_order(score.flatten(1), descending=True)[:, : _kept_cells(cells[0] * cells[1], ratio)]
    removed = torch.ones(batch, cells[0] * cells[1], dtype=torch.bool, device=attention.device).scatter(1, kept, False)
    removed = removed.view(batch, *cells).repeat_interleave(block, 1).repeat_interleave(block, 2)
    return removed.flatten(1)


def _kept_cells(cells: int, ratio: float) -> int:
    return min(int(cells * ratio) + 1, cells)


def crop_attention(attention: Tensor, grid: tuple[int, int], source: Tensor, target: Tensor) -> Tensor:
    """Attention on one crop of an image, seen from another crop of it.

    As if the map were resized to the pixels of `source`, cut to `target` (zero outside), and resized back to the grid.

    Args:
        attention: (B, N) on the source crop.
        grid: (h, w) of both maps, h * w = N.
        source: (B, 4) int: top, left, height, width in pixels of the image.
        target: (B, 4) int, likewise.

    Returns:
        (B, N) on the target crop.

    Raises:
        ParameterError: The shapes do not fit.
    """
    (height, width), batch = grid, attention.shape[0]
    if attention.shape != (batch, height * width) or source.shape != (batch, 4) or target.shape != (batch, 4):
        raise ParameterError(
            f"expected attention (B, {height * width}), source and target (B, 4); got {tuple(attention.shape)}, "
            f"{tuple(source.shape)}, {tuple(target.shape)}."
        )
    rows = _resampling(height, source[:, 0], source[:, 2], target[:, 0], target[:, 2], attention.dtype)
    columns = _resampling(width, source[:, 1], source[:, 3], target[:, 1], target[:, 3], attention.dtype)
    return (rows @ attention.view(batch, height, width) @ columns.mT).flatten(1)


def _resampling(n: int, start: Tensor, length: Tensor, to: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    # (B, n, n): both resizings and the cut are separable and linear, so per axis they are one small matrix.
    out = torch.arange(n, device=start.device, dtype=torch.float64)
    length, size = length.long(), size.long()
    pixel, share = _taps(out, n / size.double(), size)
    pixel = pixel + (to - start).view(-1, 1, 1)
    inside = (pixel >= 0) & (pixel < length.view(-1, 1, 1))
    cell, weight = _taps(pixel.clamp_min(0).flatten(1).double(), length.double() / n, torch.full_like(length, n))
    weight = weight.unflatten(1, (n, 2)) * (share * inside).unsqueeze(-1)
    matrix = torch.zeros(len(start), n, n, dtype=torch.float64, device=start.device)
    return matrix.scatter_add(2, cell.view(-1, n, 4), weight.flatten(2)).to(dtype)


def _taps(position: Tensor, scale: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    # The two samples that bilinear resizing (align_corners=False) mixes at each output position, and their shares.
    at = ((position + 0.5) / scale.unsqueeze(1) - 0.5).clamp_min(0)
    last = length.unsqueeze(1) - 1
    low = torch.minimum(at.floor().long(), last)
    part = at - low
    return torch.stack((low, torch.minimum(low + 1, last)), -1), torch.stack((1 - part, part), -1)


@dataclass(frozen=True)
class _Listener(Reducer):
    # Reduces nothing: hears the prefix queries' attention in every block.
    name = "_listener"
    always = True
    heard: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_PREFIX,)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        self.heard.append(signals.ATTN_PREFIX[:, :, 0, state.prefix :].mean(dim=1))
        return None


@contextmanager
def class_attention(model: nn.Module) -> Iterator[Any]:
    """A function from images (B, C, H, W) to the class token's attention (B, N), averaged over layers and heads.

    Args:
        model: An unpatched model with a class token; patched while the context is open.

    Raises:
        IncompatibleError: The model has no class token, or its attention cannot be read.
    """
    listener = _Listener()

    @torch.no_grad()
    def attend(images: Tensor) -> Tensor:
        listener.heard.clear()
        model(images)
        return torch.stack(listener.heard).mean(dim=0)

    with vt.patched(model, listener):
        yield attend


@contextmanager
def attentive_masking(model: nn.Module, teacher: nn.Module, ratio: float, block: int = 2) -> Iterator[None]:
    """Trains `model` on the patches that `teacher` attends to; in eval mode all patches stay.

    Kept tokens are gathered after the position embedding.

    Args:
        model: A timm ViT, patched or not.
        teacher: The same architecture, unpatched, e.g. an EMA of `model`.
        ratio: Share of cells to keep; see `attentive_mask`.
        block: Side of a cell in patches.

    Raises:
        IncompatibleError: The model does not embed patches the way timm does, or has no class token.
        ParameterError: `ratio` or `block` do not fit.
    """
    target, backbone = resolve_target(model)
    drop, prefix, grid = getattr(target, "patch_drop", None), backbone.prefix(target), backbone.grid(target)
    if not isinstance(drop, nn.Module) or grid is None:
        raise IncompatibleError(f"attentive masking gathers tokens at patch_drop, which {type(target).__name__} lacks.")
    attentive_mask(torch.zeros(1, grid[0] * grid[1]), grid, ratio, block)
    # The same in every row, so no row needs padding.
    count = _kept_cells(grid[0] * grid[1] // block**2, ratio) * block**2
    kept: list[Tensor] = []
    with ExitStack() as stack:
        attend = stack.enter_context(class_attention(teacher))

        def choose(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept.clear()
            if module.training:
                removed = attentive_mask(attend(args[0]), grid, ratio, block)
                kept.append(stable_order(removed.long())[:, :count] + prefix)

        def gather(module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
            if not kept:
                return x
            rows = x.gather(1, kept.pop().unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            return torch.cat((x[:, :prefix], rows), dim=1)

        stack.callback(model.register_forward_pre_hook(choose).remove)
        stack.callback(drop.register_forward_hook(gather).remove)
        yield


# ---- stochastic layer-wise shuffle (Huang et al., 2024, https://arxiv.org/abs/2408.17081)


@contextmanager
def layer_shuffle(model: nn.Module, probability: float) -> Iterator[None]:
    """Shuffles the patch tokens before a block and restores their order after it, deeper blocks more often.

    Block l of L does so with probability `l / (L - 1) * probability`, with one permutation for the whole batch. A plain
    ViT block does not see the order; reducers that split tokens by position (ToMe) and state-space blocks do. A block
    whose reduction has learned slots or needs the grid is left alone.

    Args:
        model: A model of a known family, patched or not.
        probability: That of the last block, in [0, 1].

    Raises:
        ParameterError: `probability` is out of range, or no block may be shuffled.
    """
    if not 0 <= probability <= 1:
        raise ParameterError(f"shuffle must be in [0, 1], got {probability!r}.")
    target, backbone = resolve_target(model)
    blocks, prefix = backbone.blocks(target), backbone.prefix(target)
    chances = [probability * index / max(len(blocks) - 1, 1) for index in range(len(blocks))]
    fixed = _order_bound(target)
    if probability and not any(chance for index, chance in enumerate(chances) if index not in fixed):
        raise ParameterError("shuffle: the reduction of every block but the first needs the order of the tokens.")
    with ExitStack() as stack:
        for index, (chance, block) in enumerate(zip(chances, blocks)):
            if chance and index not in fixed:
                shuffle = _Shuffle(chance, prefix)
                stack.callback(block.module.register_forward_pre_hook(shuffle.before).remove)
                stack.callback(block.module.register_forward_hook(shuffle.after).remove)
        yield


def _order_bound(model: nn.Module) -> set[int]:
    reduction = vars(model).get(ATTRIBUTE)
    points = [] if reduction is None else reduction.plan.points
    kinds = [(p.block, p.reducer) for p in points]
    return {block for block, r in kinds if r.trainable or r.grid_preserving or Signal.GRID in r.needs}


class _Shuffle:
    """One block's pair of hooks; between them it holds the running permutation."""

    def __init__(self, chance: float, prefix: int) -> None:
        self._chance, self._prefix = chance, prefix
        self._index: Tensor | None = None
        self._state: TokenState | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._index = None
        if not module.training or torch.rand(()) >= self._chance:
            return None
        x, *rest = args
        self._state = runtime.state_of(x)
        if self._state is not None and self._state.padded:
            return None
        index = torch.randperm(x.shape[1] - self._prefix).to(x.device)
        self._index = index
        shuffled, state = _moved(x, self._state, index + self._prefix, self._prefix, None)
        return (shuffled if state is None else runtime.attach_state(shuffled, state), *rest)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._index is None:
            return None
        before, after = self._state, runtime.state_of(output)
        if output.shape[1] == len(self._index) + self._prefix:
            index, grid = self._index.argsort() + self._prefix, None if before is None else before.grid
        elif after is not None:
            index, grid = _by_first_member(after), None
        else:
            raise IncompatibleError("shuffle: a block changed the number of tokens without saying where they went.")
        self._index = self._state = None
        restored, state = _moved(output, after, index, self._prefix, grid)
        if state is not None:
            # What the block returned is this, also for whoever looks at intermediate features.
            runtime.attach_state(restored, state.changed(marks=(*state.marks[:-1], state.trail)))
        return restored


def _by_first_member(state: TokenState) -> Tensor:
    # (B, K - prefix): slots in the order of the first original token in each; slots without one last.
    origin = state.origin.long()
    spare = torch.where(origin < 0, state.n, origin)
    place = torch.arange(state.n0, device=origin.device).expand_as(origin)
    first = place.new_full((state.batch, state.n + 1), state.n0).scatter_reduce(1, spare, place, reduce="amin")
    return stable_order(first[:, state.prefix : state.n]) + state.prefix


def _moved(
    x: Tensor, state: TokenState | None, index: Tensor, prefix: int, grid: tuple[int, int] | None
) -> tuple[Tensor, TokenState | None]:
    tm = TokenMap.keep(index.expand(x.shape[0], -1), x.shape[1], prefix, grid=grid)
    return (tm.reduce(x), None) if state is None else apply(tm, x, state)
