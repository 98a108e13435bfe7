"""Matching, plans and energies in Triton against loops in fp64 and the torch formulation: decisions must be equal."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_modes import PACKAGE, kernels

from visiontok.ops import matching, merging, scoring

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Cosines closer than this may change places by rounding alone.
GAP = 2e-6


class Mode(NamedTuple):
    """Where the kernels run.

    Attributes:
        kernels: The modules by name.
        device: Of the tensors.
    """

    kernels: dict[str, ModuleType]
    device: str

    def call(self, path: str, *args: Any) -> Any:
        """Runs a launcher, `module.function`, twice, and requires the same bits."""
        module, _, name = path.rpartition(".")
        launch = getattr(self.kernels[module], name)
        args = tuple(arg.to(self.device) if isinstance(arg, Tensor) else arg for arg in args)
        once = launch(*args)
        if self.device == "cuda":
            parts = [(once, launch(*args))] if isinstance(once, Tensor) else zip(once, launch(*args))
            assert all(torch.equal(one, two) for one, two in parts)
        return once.cpu() if isinstance(once, Tensor) else tuple(part.cpu() for part in once)


@pytest.fixture(scope="module", params=["interpreted", "compiled"])
def mode(request: pytest.FixtureRequest) -> Iterator[Mode]:
    interpret = request.param == "interpreted"
    if not interpret and not torch.cuda.is_available():
        pytest.skip("no GPU")
    with kernels("scoring", interpret=interpret):
        names = ("configuring", "matching", "planning", "scoring")
        modules = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in names}
        yield Mode(modules, "cpu" if interpret else "cuda")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN or -7."""
    real = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        made = real(*shape, **options)
        return made.fill_(math.nan if made.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)


def unit(metric: Tensor) -> np.ndarray:
    rows = metric.double().numpy()
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def loop_best(metric: Tensor, a: Sequence[int], b: Sequence[int]) -> tuple[list[float], list[int]]:
    """Best cosine and partner of one image (N, d); NaN is lowest, the first of equals wins."""
    rows = unit(metric)
    cosine = rows[list(a)] @ rows[list(b)].T
    cosine[np.isnan(cosine)] = -np.inf
    return cosine.max(axis=1).tolist(), cosine.argmax(axis=1).tolist()


def loop_plan(
    score: Sequence[float], partner: Sequence[int], a: Sequence[int], b: Sequence[int], r: int, prefix: int,
    ascending: bool,
) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
    """assign, csr and src of one image."""
    ranked = sorted(range(len(a)), key=lambda i: (-score[i], i))
    staying = sorted(ranked[r:]) if ascending else ranked[r:]
    slots = [[t] for t in range(prefix)] + [[a[i]] for i in staying] + [[t] for t in b]
    for i in ranked[:r]:
        slots[prefix + len(staying) + partner[i]].append(a[i])
    assign = [0] * (prefix + len(a) + len(b))
    for slot, members in enumerate(slots):
        for t in members:
            assign[t] = slot
    csr = np.cumsum([0] + [len(members) for members in slots]).tolist()
    return assign, csr, [t for members in slots for t in sorted(members)]


def loop_slots(key: Tensor, r: int, prefix: int) -> list[tuple[list[int], list[int], list[int]]]:
    length = key.shape[2]
    a = list(range(prefix + prefix % 2, length, 2))
    b = list(range(prefix + (prefix + 1) % 2, length, 2))
    metric = key.double().sum(1)
    return [loop_plan(*loop_best(one, a, b), a, b, r, prefix, prefix > 0) for one in metric]


def assert_plan(got: tuple[Tensor, ...], want: Sequence[tuple[list[int], list[int], list[int]]]) -> None:
    assert [part.dtype for part in got] == [torch.int64, torch.int32, torch.int32]
    for name, part, expected in zip(("assign", "csr", "src"), got, zip(*want)):
        assert part.tolist() == list(expected), name


def clear(metric: Tensor, prefix: int) -> bool:
    """Whether rounding cannot change a decision over even and odd positions of one image (N, d)."""
    rows = unit(metric)
    cosine = rows[prefix + prefix % 2 :: 2] @ rows[prefix + (prefix + 1) % 2 :: 2].T
    best = np.sort(cosine, axis=1)[:, -2:]
    scores = np.sort(best[:, -1])
    return min([*np.diff(best, axis=1).ravel(), *np.diff(scores), 1.0]) > GAP


def keys(seed: int, batch: int, length: int, heads: int, width: int, prefix: int, dtype: torch.dtype) -> Tensor:
    """(B, H, N, d) keys as a fused projection leaves them, whose matches rounding cannot change."""
    generator = torch.Generator().manual_seed(seed)
    images: list[Tensor] = []
    for _ in range(200):
        qkv = torch.randn(length, 3, heads, width, generator=generator).to(dtype)
        if clear(qkv[:, 1].double().sum(1), prefix):
            images.append(qkv)
        if len(images) == batch:
            return torch.stack(images).permute(2, 0, 3, 1, 4)[1]
    raise AssertionError("no clear draw")


def signs(seed: int, batch: int, heads: int, length: int, width: int) -> Tensor:
    """(B, H, N, d) small integers whose sums over heads are ±1: with d a power of 4 cosines are exact, and tie."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.randint(0, 2, (batch, length, width), generator=generator) * 2 - 1
    parts = torch.randint(-3, 4, (batch, heads, length, width), generator=generator)
    parts[:, 0] += total - parts.sum(1)
    return parts


CASES = [
    (3, 1, 8, 1, 1, SINGLE), (4, 3, 8, 0, 2, HALF), (5, 1, 3, 2, 1, SINGLE), (7, 2, 5, 5, 1, SINGLE),
    (8, 4, 20, 0, 4, SINGLE), (16, 1, 72, 1, 7, HALF), (33, 3, 64, 1, 8, BRAIN), (50, 2, 40, 2, 24, HALF),
    (64, 1, 16, 0, 32, SINGLE), (65, 4, 80, 5, 30, SINGLE), (131, 1, 64, 1, 13, BRAIN), (70, 2, 128, 0, 20, SINGLE),
    (197, 3, 64, 1, 13, HALF), (198, 1, 80, 2, 98, SINGLE), (577, 1, 32, 1, 23, SINGLE),
    (40, 2, 130, 1, 9, HALF), (35, 1, 300, 0, 9, BRAIN),
]  # fmt: skip


@pytest.mark.parametrize(("length", "heads", "width", "prefix", "r", "dtype"), CASES, ids=str)
def test_slots(mode: Mode, length: int, heads: int, width: int, prefix: int, r: int, dtype: torch.dtype) -> None:
    key = keys(length, 1 if length > 100 else 2, length, heads, width, prefix, dtype)
    got = mode.call("matching.match_slots", key, r, prefix)
    assert_plan(got, loop_slots(key, r, prefix))
    assign = matching.even_odd_slots(key.double().sum(1), r, prefix)
    groups = merging.group(assign, length - r, complete=True)
    assert all(torch.equal(one.long(), two.long()) for one, two in zip(got, (assign, *groups)))


@pytest.mark.full
@pytest.mark.parametrize("length", [6, 9, 31, 63, 128, 129, 257, 300, 577])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("heads", "dtype"), [(1, SINGLE), (1, HALF), (2, BRAIN), (4, SINGLE)], ids=str)
@pytest.mark.parametrize("width", [12, 64, 80])
def test_slots_everywhere(
    mode: Mode, length: int, prefix: int, heads: int, dtype: torch.dtype, width: int
) -> None:  # fmt: skip
    if length - prefix < 2:
        pytest.skip("nothing to merge")
    key = keys(length + width, 1, length, heads, width, prefix, dtype)
    most = (length - prefix) // 2
    for r in sorted({1, max(most // 3, 1), most}):
        assert_plan(mode.call("matching.match_slots", key, r, prefix), loop_slots(key, r, prefix))


@pytest.mark.parametrize(
    ("width", "heads", "dtype"), [(1, 1, SINGLE), (4, 1, HALF), (4, 2, SINGLE), (16, 1, BRAIN), (64, 4, HALF)], ids=str
)
def test_exact_ties_go_to_the_lowest_index(mode: Mode, width: int, heads: int, dtype: torch.dtype) -> None:
    for length, prefix, r in ((21, 0, 7), (75, 1, 30)):
        key = signs(width, 1, heads, length, width).to(dtype)
        assert_plan(mode.call("matching.match_slots", key, r, prefix), loop_slots(key, r, prefix))


@pytest.mark.parametrize("heads", [1, 2])
def test_tiles_do_not_matter(mode: Mode, heads: int) -> None:
    key, tiles = signs(5, 1, heads, 90, 16).half(), {"ROWS": 32, "COLUMNS": 16, "COUNTED": 16, "num_warps": 4}
    with mode.kernels["configuring"].forced("match" if heads == 1 else "match_fp32", tiles):
        assert_plan(mode.call("matching.match_slots", key, 20, 1), loop_slots(key, 20, 1))


def test_keys_without_unit_stride(mode: Mode) -> None:
    key = signs(3, 2, 2, 16, 20).float().transpose(2, 3)
    assert key.stride(-1) != 1
    assert_plan(mode.call("matching.match_slots", key, 5, 1), loop_slots(key, 5, 1))


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_zero_keys_are_like_nothing(mode: Mode, dtype: torch.dtype) -> None:
    key = keys(1, 2, 33, 1, 16, 1, dtype).contiguous()
    key[:, :, 3:20] = 0
    assert_plan(mode.call("matching.match_slots", key, 14, 1), loop_slots(key, 14, 1))
    nothing = torch.zeros_like(key)
    assert_plan(mode.call("matching.match_slots", nothing, 14, 1), loop_slots(nothing, 14, 1))


@pytest.mark.parametrize("route", ["one program", "tiles"])
@pytest.mark.parametrize(("heads", "dtype"), [(1, HALF), (2, SINGLE)], ids=str)
def test_nan_stays_in_its_image(
    mode: Mode, route: str, heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if route == "tiles":
        monkeypatch.setattr(mode.kernels["matching"], "_LONGEST", 16)
    key = keys(2, 4, 33, heads, 16, 1, dtype).contiguous()
    key[1, :, [2, 3, 9, 14], 0] = math.nan
    key[2] = math.nan
    key[3, 0, 5:9] = math.inf
    got = mode.call("matching.match_slots", key, 12, 1)
    assert_plan(got, loop_slots(key, 12, 1))
    assert got[2].sort(dim=1).values.tolist() == [list(range(33))] * 4


@pytest.mark.parametrize("length", [1026, pytest.param(2051, marks=pytest.mark.full)])
def test_long_sequences(mode: Mode, length: int) -> None:
    key, forced = signs(7, 1, 2, length, 4).float(), mode.kernels["configuring"].forced
    tiles = {"ROWS": 512, "COLUMNS": 512} if mode.device == "cpu" else {"ROWS": 64, "COLUMNS": 64}
    with forced("best_fp32", {**tiles, "DEPTH": 16}), forced("rank", tiles), forced("place", tiles):
        got = mode.call("matching.match_slots", key, 400, 1)
    assert_plan(got, loop_slots(key, 400, 1))


def test_no_images(mode: Mode) -> None:
    got = mode.call("matching.match_slots", torch.zeros(0, 3, 10, 8), 3, 1)
    assert [part.shape for part in got] == [(0, 10), (0, 8), (0, 10)]
    a, b = torch.arange(0, 10, 2), torch.arange(1, 10, 2)
    score, partner = mode.call("matching.best_match", torch.zeros(0, 10, 8), a, b)
    assert score.shape == partner.shape == (0, 5)
    assert score.dtype == torch.float32
    assert partner.dtype == torch.int64
    got = mode.call("planning.plan", score, partner, a, b, 3, 0, 10, True)
    assert [part.shape for part in got] == [(0, 10), (0, 8), (0, 10)]
    assert mode.call("scoring.energy", torch.zeros(0, 10, 8), 0.5, 1.0, "elu").shape == (0, 10)


def grid_partition(height: int, width: int, seed: int) -> tuple[list[int], list[int]]:
    """One random destination in each 2 x 2 cell of a grid (ToMe for diffusion); all others may leave."""
    generator = np.random.default_rng(seed)
    b = [
        (2 * y + generator.integers(2)) * width + 2 * x + generator.integers(2)
        for y in range(height // 2)
        for x in range(width // 2)
    ]
    return sorted(set(range(height * width)) - set(b)), b


@pytest.mark.parametrize(("width", "dtype"), [(100, HALF), (320, BRAIN), (7, SINGLE), (200, SINGLE)], ids=str)
def test_random_grid_partition(mode: Mode, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    metric = torch.randn(2, 6 * 10, width, generator=generator).to(dtype)
    a, b = grid_partition(6, 10, seed=0)
    a_list, b_list = torch.tensor(a), torch.tensor(b)
    score, partner = mode.call("matching.best_match", metric, a_list, b_list)
    want = [loop_best(one, a, b) for one in metric]
    assert torch.allclose(score.double(), torch.tensor([one[0] for one in want]).double(), rtol=0, atol=1e-6)
    assert partner.tolist() == [one[1] for one in want]
    got = mode.call("planning.plan", score, partner, a_list, b_list, 30, 0, 60, False)
    scores = score.tolist()
    assert_plan(got, [loop_plan(scores[i], want[i][1], a, b, 30, 0, False) for i in range(2)])


@pytest.mark.parametrize("ascending", [False, True])
def test_partition_of_ranks(mode: Mode, ascending: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    # Rows that are slices of wider ones, and lists that are every second entry of a ranking, as in PiToMe.
    metric = torch.randn(3, 41, 40, generator=generator)[..., :24]
    order = torch.stack([torch.randperm(40, generator=generator) + 1 for _ in range(3)])
    a, b = order[:, 0::2], order[:, 1::2]
    score, partner = mode.call("matching.best_match", metric, a, b)
    for i in range(3):
        want, index = loop_best(metric[i], a[i].tolist(), b[i].tolist())
        assert score[i].tolist() == pytest.approx(want, abs=1e-6)
        assert partner[i].tolist() == index
    for r in (0, 1, 13, 20):
        got = mode.call("planning.plan", score, partner, a, b, r, 1, 41, ascending)
        lists = zip(score.tolist(), partner.tolist(), a.tolist(), b.tolist())
        assert_plan(got, [loop_plan(*one, r, 1, ascending) for one in lists])


@pytest.mark.parametrize(("leaving", "receiving", "prefix"), [(1, 1, 0), (40, 3, 2), (3, 90, 1), (40, 35, 70)])
def test_plan_with_ties_and_nan(mode: Mode, leaving: int, receiving: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(leaving)
    length = leaving + receiving + prefix
    score = torch.randint(0, 4, (2, leaving), generator=generator).float()
    score[1, leaving // 2] = math.nan
    partner = torch.randint(0, receiving, (2, leaving), generator=generator)
    order = torch.randperm(leaving + receiving, generator=generator) + prefix
    a, b = order[:leaving], order[leaving:]
    for r, ascending in ((1, True), (max(leaving // 2, 1), False), (leaving, True)):
        got = mode.call("planning.plan", score, partner, a, b, r, prefix, length, ascending)
        scores = score.nan_to_num(-math.inf).tolist()
        lists = [(*one, a.tolist(), b.tolist()) for one in zip(scores, partner.tolist())]
        assert_plan(got, [loop_plan(*one, r, prefix, ascending) for one in lists])


KINDS = [("elu", 0.4, 1.0), ("elu", -0.1, 1.7), ("hinge", 0.3, 1.2), ("gauss", 0.6, 1.0)]


@pytest.mark.parametrize(("kind", "margin", "alpha"), KINDS)
@pytest.mark.parametrize(("length", "width", "dtype"), [(1, 8, SINGLE), (70, 200, HALF), (131, 24, SINGLE)], ids=str)
def test_energy(
    mode: Mode, kind: str, margin: float, alpha: float, length: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(length)
    # Around a common direction, so that cosines fall on both sides of the margin; one row is zero.
    metric = torch.randn(2, length, width, generator=generator) + 0.8
    metric[:, length // 2] *= length == 1
    metric = metric.to(dtype)
    rows = matching.unit(metric.double())
    want = scoring.gaussian_energy(rows, margin) if kind == "gauss" else scoring.energy(
        rows, margin, alpha, hinge=kind == "hinge"
    )  # fmt: skip
    got = mode.call("scoring.energy", metric, margin, alpha, kind)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, rtol=2e-6, atol=1e-6)


def test_energy_of_nan_stays_in_its_image(mode: Mode) -> None:
    metric = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))
    clean = mode.call("scoring.energy", metric, 0.5, 1.0, "elu")
    metric[1, 4, 2] = math.nan
    got = mode.call("scoring.energy", metric, 0.5, 1.0, "elu")
    assert torch.equal(got[::2], clean[::2])
    assert got[1].isnan().all()
