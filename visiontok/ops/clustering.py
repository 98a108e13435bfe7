"""Soft clustering of a token map into a smaller grid, and the weights that lead back; Expedite, arXiv:2210.01035."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops.constants import shape_constant, wide_dtype

__all__ = [
    "Clusters",
    "Norm",
    "cluster",
    "cluster_dense",
    "fit_cells",
    "hard_labels",
    "home",
    "pooled",
    "reconstruct_weights",
]

Norm = Literal["l1", "l2"]

# Cells along a side of a tile. Tokens of one tile share their candidate cells, so that distances are a few matrix
# products; one tile per cell would compute the fewest distances, but measured 4 to 7 times slower than 4 x 4.
_TILE = 4


class Clusters(NamedTuple):
    """A soft clustering.

    Attributes:
        centroids: (B, M, C) in at least fp32, cells in raster order; gradients flow through the tokens only.
        share: (B, M, N) how much of each cell is each token; rows sum to 1; no gradient.
    """

    centroids: Tensor
    share: Tensor


def cluster(
    x: Tensor,
    grid: tuple[int, int],
    cells: tuple[int, int],
    iters: int = 5,
    temperature: float = 0.02,
    window: int = 5,
    official: bool = False,
) -> Clusters:
    """Iterates soft assignments of tokens to the cells around them, starting from average pooling.

    Each step gives a token the weights softmax(-temperature * squared distance) over the centroids of at most window²
    cells around its own one, and moves every centroid to the weighted mean of its tokens. Distances are computed in
    tiles of neighbouring cells only, not between all cells and tokens. The weights carry no gradient, as in the
    released code.

    Args:
        x: (B, H * W, C) tokens in raster order, without prefix.
        grid: (H, W).
        cells: (h, w) of the clusters, at most (H, W).
        iters: Steps; 0 gives the pooled map.
        temperature: Multiplies the distances, so it is an inverse temperature; above 0.
        window: Odd number of cells along a side of the neighbourhood.
        official: Whether a cell whose weights sum to less than 1e-16 shrinks towards zero, as in the released code;
            else it is a mean like the others.

    Raises:
        ParameterError: Shapes do not fit, or a value is outside its range.
    """
    _check(x, grid, cells, iters, temperature, window)
    rows = x.to(wide_dtype(x.dtype))
    with torch.no_grad():
        pool = _pooling(*grid, *cells, x.device).to(rows.dtype)
        if iters == 0:
            share = pool.expand(x.shape[0], -1, -1)
        else:
            # A shrunken cell shrinks towards the true zero, not towards the mean of the map.
            start = rows.detach() if official else _centred(rows.detach())
            share = _iterated(start, pool, (*grid, *cells, window // 2), iters, temperature, official)
    return Clusters(share @ rows, share)


def _iterated(
    x: Tensor, pool: Tensor, shape: tuple[int, ...], iters: int, temperature: float, official: bool
) -> Tensor:
    table = (*shape, _tile(*shape[2:]), x.device)
    members, candidates, holders, allowed = (make(*table) for make in (_members, _candidates, _holders, _allowed))
    own = x[:, members]
    outside = ~allowed
    padding = ~allowed.any(dim=-1, keepdim=True)
    centroids, weight = pool @ x, x
    for step in range(iters):
        near = centroids[:, candidates]
        logits = _closeness(own, near, temperature).masked_fill(outside, -math.inf)
        chosen = logits.masked_fill(padding, 0).log_softmax(dim=-1).masked_fill(outside, -math.inf)
        # Relative to the largest weight in its cell no weight can underflow, however far a cell is from all tokens.
        largest = _held(chosen.amax(dim=2), holders, -math.inf).amax(dim=-1)
        weight = (chosen - largest[:, candidates].unsqueeze(2)).exp()
        total = _held(weight.sum(dim=2), holders, 0.0).sum(dim=-1)
        total = total.maximum((math.log(1e-16) - largest).exp()) if official else total
        weight = weight / total[:, candidates].unsqueeze(2)
        if step < iters - 1:
            part = (weight.transpose(-1, -2) @ own).flatten(1, 2)
            part = torch.cat((part, part.new_zeros(part.shape[0], 1, part.shape[2])), dim=1)
            centroids = part[:, holders].sum(dim=2)
    batch, size = x.shape[0], pool.numel()
    slots = _slots(*table).flatten().expand(batch, -1)
    full = x.new_zeros(batch, size + 1).scatter(1, slots, weight.flatten(1))
    return full[:, :size].reshape(batch, *pool.shape)


def _tile(h: int, w: int, half: int) -> int:
    # With few cells the tiles' candidates overlap so much that one tile over the whole map is faster.
    return _TILE if 4 * (_TILE + 2 * half) ** 2 <= h * w else max(h, w)


def _closeness(tokens: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    # -temperature * squared distance without the part that all centroids share, which no softmax sees.
    return temperature * (2 * (tokens @ centroids.transpose(-1, -2)) - centroids.square().sum(dim=-1).unsqueeze(-2))


def _held(values: Tensor, holders: Tensor, empty: float) -> Tensor:
    """(B, tiles, seats) values to (B, M, R): what each cell got from each tile that holds it."""
    flat = values.flatten(1)
    return torch.cat((flat, flat.new_full((flat.shape[0], 1), empty)), dim=1)[:, holders]


def cluster_dense(
    x: Tensor, grid: tuple[int, int], cells: tuple[int, int], iters: int = 5, temperature: float = 0.02, window: int = 5
) -> Clusters:
    """`cluster` by the formula, with all distances and a mask: slow, the reference that `cluster` is tested against."""
    _check(x, grid, cells, iters, temperature, window)
    rows = x.to(wide_dtype(x.dtype))
    row, column = _home_cells(grid, cells, x.device)
    cell = torch.arange(cells[0] * cells[1], device=x.device)
    outside = ((row - (cell // cells[1]).unsqueeze(1)).abs() > window // 2) | (
        (column - (cell % cells[1]).unsqueeze(1)).abs() > window // 2
    )
    share = _pooling(*grid, *cells, x.device).to(rows.dtype).expand(x.shape[0], -1, -1)
    for _ in range(iters):
        distance = (share @ rows).detach().unsqueeze(2) - rows.detach().unsqueeze(1)
        logits = (-temperature * distance.square().sum(dim=-1)).masked_fill(outside, -math.inf)
        share = logits.log_softmax(dim=1).softmax(dim=2)
    return Clusters(share @ rows, share)


def pooled(x: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """(B, H * W, C) to (B, h * w, C): adaptive average pooling, the centroids before the first step."""
    return _pooling(*grid, *cells, x.device).to(x.dtype) @ x


def home(grid: tuple[int, int], cells: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(H * W,) int64 the cell that each token of the grid belongs to."""
    row, column = _home_cells(grid, cells, torch.device(device))
    return row * cells[1] + column


def hard_labels(x: Tensor, centroids: Tensor) -> Tensor:
    """(B, N) int64 the nearest of all centroids (B, M, C) for each token (B, N, C); the lowest index on a tie."""
    wide = wide_dtype(x.dtype)
    x, centroids = x.to(wide), centroids.to(wide)
    middle = x.mean(dim=1, keepdim=True)
    return _closeness(x - middle, centroids - middle, 1.0).argmax(dim=-1)


def reconstruct_weights(
    before: Tensor, after: Tensor, k: int = 20, temperature: float = 0.02, norm: Norm = "l1", official: bool = False
) -> Tensor:
    """How much of each cluster makes up each token: exp(-temperature * squared distance) of its k nearest clusters.

    Weights are a softmax in the log domain, so that they cannot underflow.

    Args:
        before: (B, N, C) tokens that were clustered.
        after: (B, M, C) clusters.
        k: Clusters per token; more than M, or -1, means all.
        temperature: Multiplies the distances; above 0.
        norm: `l1`: weights of a token sum to 1 (the paper). `l2`: their squares do (the released code), which scales
            tokens by up to sqrt(k).
        official: As in the released code all clusters as near as the k-th count, not the lowest indices only, and a
            token whose weights are all below about 1e-12 shrinks towards zero.

    Returns:
        (B, N, M) in at least fp32.

    Raises:
        ParameterError: k is neither -1 nor at least 1, temperature is not positive, or norm is unknown.
    """
    if isinstance(k, bool) or not isinstance(k, int) or (k < 1 and k != -1):
        raise ParameterError(f"k must be an int >= 1, or -1 for all clusters, got {k!r}.")
    if norm not in ("l1", "l2"):
        raise ParameterError(f"norm must be 'l1' or 'l2', got {norm!r}.")
    _positive("temperature", temperature)
    wide, order = wide_dtype(before.dtype), 1 if norm == "l1" else 2
    before, after = before.to(wide), after.to(wide)
    if official:
        return _released_weights(before, after, k, temperature, order)
    middle = before.detach().mean(dim=1, keepdim=True)
    logits = _closeness(before - middle, after - middle, temperature)
    if 0 < k < after.shape[1]:
        logits = logits.masked_fill(~_nearest(logits.detach(), k), -math.inf)
    # The largest weight is 1 before scaling, so they cannot all vanish.
    weights = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()
    return weights / torch.linalg.vector_norm(weights, ord=order, dim=-1, keepdim=True)


def _released_weights(before: Tensor, after: Tensor, k: int, temperature: float, order: int) -> Tensor:
    # Clusters often come out nearly equal, and then its rounding decides which of them count.
    squares = before.square().sum(dim=-1, keepdim=True) + after.square().sum(dim=-1).unsqueeze(1)
    weights = (-temperature * (squares - 2 * (before @ after.transpose(-1, -2)))).exp()
    if 0 < k < after.shape[1]:
        weights = weights.masked_fill(weights < weights.detach().topk(k, dim=-1).values[..., -1:], 0)
    return weights / torch.linalg.vector_norm(weights, ord=order, dim=-1, keepdim=True).clamp_min(1e-12)


def fit_cells(grid: tuple[int, int], most: int) -> tuple[int, int]:
    """The largest (h, w) within the grid with h * w <= most and the grid's proportions, give or take one cell.

    Args:
        grid: (H, W).
        most: At least 1.
    """
    height, width = grid
    slack = max(height, width)
    found = []
    for h in range(1, height + 1):
        w = min(width, most // h, (h * width + slack) // height)
        skew = abs(h * width - w * height)
        if w > 0 and skew <= slack:
            found.append((h * w, -skew, h, w))
    return max(found)[2:]


def _nearest(logits: Tensor, k: int) -> Tensor:
    least = logits.topk(k, dim=-1).values[..., -1:]
    above, level = logits > least, logits == least
    return above | (level & (level.cumsum(dim=-1) <= k - above.sum(dim=-1, keepdim=True)))


def _centred(x: Tensor) -> Tensor:
    # Distances do not change, but products of features with a large common part would lose digits.
    return x - x.mean(dim=1, keepdim=True)


# ---- tables that depend on shapes only


class _Axis(NamedTuple):
    """One axis of the tiling: tokens and candidate cells of every tile, and the tiles of every cell."""

    members: list[list[int]]
    within: list[list[list[bool]]]
    candidates: list[list[int]]
    holders: list[list[tuple[int, int]]]


@functools.lru_cache(maxsize=256)
def _axis(size: int, count: int, half: int, tile: int) -> _Axis:
    seats = min(tile + 2 * half, count)
    tiles = range(0, count, tile)
    starts = [min(max(first - half, 0), count - seats) for first in tiles]
    candidates = [[start + j for j in range(seats)] for start in starts]
    owned = [[i for i in range(size) if i * count // size in range(first, first + tile)] for first in tiles]
    most = max(map(len, owned))
    # Padding repeats a token, with no cell allowed to it.
    members = [own + [0] * (most - len(own)) for own in owned]
    within = [
        [[p < len(own) and abs(i * count // size - j) <= half for j in cells] for p, i in enumerate(padded)]
        for own, padded, cells in zip(owned, members, candidates)
    ]
    holders = [[(t, cells.index(k)) for t, cells in enumerate(candidates) if k in cells] for k in range(count)]
    most = max(map(len, holders))
    return _Axis(members, within, candidates, [found + [(-1, -1)] * (most - len(found)) for found in holders])


@shape_constant
def _members(height: int, width: int, h: int, w: int, half: int, tile: int, device: torch.device) -> Tensor:
    """(tiles, places) the tokens of each tile."""
    rows = torch.tensor(_axis(height, h, half, tile).members, device=device)
    columns = torch.tensor(_axis(width, w, half, tile).members, device=device)
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)


@shape_constant
def _candidates(height: int, width: int, h: int, w: int, half: int, tile: int, device: torch.device) -> Tensor:
    """(tiles, seats) the cells that the tokens of each tile may join."""
    rows = torch.tensor(_axis(height, h, half, tile).candidates, device=device)
    columns = torch.tensor(_axis(width, w, half, tile).candidates, device=device)
    return (rows[:, None, :, None] * w + columns[None, :, None, :]).flatten(2).flatten(0, 1)


@shape_constant
def _allowed(height: int, width: int, h: int, w: int, half: int, tile: int, device: torch.device) -> Tensor:
    """(tiles, places, seats) bool, which token may join which cell."""
    rows = torch.tensor(_axis(height, h, half, tile).within, device=device)
    columns = torch.tensor(_axis(width, w, half, tile).within, device=device)
    both = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return both.flatten(4).flatten(2, 3).flatten(0, 1)


@shape_constant
def _holders(height: int, width: int, h: int, w: int, half: int, tile: int, device: torch.device) -> Tensor:
    """(M, R) the flat (tile, seat) pairs of each cell; one past the last where a cell has fewer."""
    rows, columns = _axis(height, h, half, tile), _axis(width, w, half, tile)
    row = torch.tensor(rows.holders, device=device)[:, None, :, None]
    column = torch.tensor(columns.holders, device=device)[None, :, None, :]
    across, wide = len(columns.candidates), len(columns.candidates[0])
    seats = len(rows.candidates[0]) * wide
    flat = (row[..., 0] * across + column[..., 0]) * seats + row[..., 1] * wide + column[..., 1]
    spare = len(rows.candidates) * across * seats
    flat = torch.where((row[..., 0] < 0) | (column[..., 0] < 0), spare, flat)
    return flat.flatten(2).flatten(0, 1)


@shape_constant
def _slots(height: int, width: int, h: int, w: int, half: int, tile: int, device: torch.device) -> Tensor:
    """(tiles, places, seats) the entry of a flat (M, N) matrix that each pair is; one past the last for padding."""
    table = (height, width, h, w, half, tile, device)
    members, candidates = _members(*table).unsqueeze(2), _candidates(*table).unsqueeze(1)
    length = height * width
    return torch.where(_allowed(*table), candidates * length + members, h * w * length)


@shape_constant
def _pooling(height: int, width: int, h: int, w: int, device: torch.device) -> Tensor:
    """(M, N) fp64 adaptive average pooling."""
    rows, columns = _averages(height, h), _averages(width, w)
    across = torch.tensor(columns, dtype=torch.float64, device=device)
    down = torch.tensor(rows, dtype=torch.float64, device=device)
    return (down[:, None, :, None] * across[None, :, None, :]).flatten(2).flatten(0, 1)


def _averages(size: int, count: int) -> list[list[float]]:
    bounds = [(k * size // count, -(-(k + 1) * size // count)) for k in range(count)]
    return [[1 / (stop - start) if start <= i < stop else 0.0 for i in range(size)] for start, stop in bounds]


def _home_cells(grid: tuple[int, int], cells: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    place = torch.arange(grid[0] * grid[1], device=device)
    return place // grid[1] * cells[0] // grid[0], place % grid[1] * cells[1] // grid[1]


# ---- checks


def _check(
    x: Tensor, grid: tuple[int, int], cells: tuple[int, int], iters: int, temperature: float, window: int
) -> None:
    if x.dim() != 3 or x.shape[1] != grid[0] * grid[1]:
        raise ParameterError(f"x must be (B, {grid[0] * grid[1]}, C) for the grid {grid}, got {tuple(x.shape)}.")
    if not (1 <= cells[0] <= grid[0] and 1 <= cells[1] <= grid[1]):
        raise ParameterError(f"cells must be between (1, 1) and the grid {grid}, got {cells}.")
    if isinstance(iters, bool) or not isinstance(iters, int) or iters < 0:
        raise ParameterError(f"iters must be an int >= 0, got {iters!r}.")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ParameterError(f"window must be an odd int >= 1, got {window!r}.")
    _positive("temperature", temperature)


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ParameterError(f"{name} must be a positive number, got {value!r}.")
