"""The C++ kernels against the torch formulation and against loops in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from slot_loops import assert_near, reduced
from torch import Tensor
from torch.nn.functional import layer_norm

from visiontok.ops import dispatch
from visiontok.ops.cpu import MODES, building, launching, match_slots, merge, refuses
from visiontok.ops.matching import even_odd_slots
from visiontok.ops.merging import group

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    found = building.library()
    if found.library is None:
        pytest.skip(f"no C++ kernels: {found.note}")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN or -7, so that what a kernel leaves out is seen (K1)."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else -7)

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call is large enough for all threads; their number is put back."""
    monkeypatch.setattr(launching, "_MULTIPLICATIONS", 0)
    monkeypatch.setattr(launching, "_NUMBERS", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_slots(batch: int, length: int, slots: int, seed: int = 0) -> Tensor:
    """Random slots; some tokens are dropped, and the last slot stays empty."""
    return torch.randint(-1, max(slots - 1, 1), (batch, length), generator=torch.Generator().manual_seed(seed))


def grouped(assign: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    groups = group(assign, slots)
    return groups.csr.int(), groups.src.int()


def assert_slots(key: Tensor, r: int, prefix: int) -> None:
    """Equal to the torch formulation on head sums in fp32, and grouped alike."""
    assign, csr, src = match_slots(key, r, prefix)
    assert torch.equal(assign, even_odd_slots(key.float().sum(dim=1), r, prefix))
    want = grouped(assign, key.shape[2] - r)
    assert (assign.dtype, csr.dtype, src.dtype) == (torch.int64, torch.int32, torch.int32)
    assert torch.equal(csr, want[0])
    assert torch.equal(src, want[1])


# ---- match


@pytest.mark.parametrize("length", [3, 4, 5, 12, 13, 33, 50, 101, 197, 198, 577])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_slots_equal_those_of_torch(length: int, prefix: int) -> None:
    most = (length - prefix) // 2
    for heads, depth, batch in ((1, 64, 1), (3, 24, 2), (6, 1, 1), (7, 80, 3)):
        key = normal(batch, length, heads, depth, seed=depth).transpose(1, 2)
        for r in {1, most // 3, most} - {0, -1, -2}:
            if r <= most:
                assert_slots(key, r, prefix)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_keys_in_half_precision_and_any_layout(dtype: torch.dtype) -> None:
    qkv = normal(2, 50, 3, 4, 32).to(dtype)
    key = qkv.permute(2, 0, 3, 1, 4)[1]
    for view in (key, key.contiguous(), key[:, 1:3], key[..., ::2], key.transpose(2, 3).contiguous().transpose(2, 3),
                 key[:1].expand(3, -1, -1, -1), key[:, :, 3:]):  # fmt: skip
        assert_slots(view, 9, 1)


def test_long_sequences_pass_the_columns_in_blocks() -> None:
    # 600 columns of 96 channels are more than what is kept in the cache at once.
    assert_slots(normal(1, 1, 1201, 96), 200, 0)
    assert_slots(normal(1, 1, 301, 1280), 50, 1)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_ties_go_to_the_lowest_index(prefix: int) -> None:
    # Rows of plus and minus one: their cosines are exact, in whatever order the products are summed.
    few = normal(2, 1, 7, 16).sign().expand(-1, 2, -1, -1)
    for length in (24, 65):
        repeated = few[:, :, torch.arange(length) * 5 % 7]
        zeroed = repeated.clone()
        zeroed[:, :, ::3] = 0
        for key in (repeated, zeroed, few[:, :, :1].expand(-1, -1, length, -1), torch.zeros(1, 1, length, 8)):
            for r in (1, 5, (length - prefix) // 2):
                assert_slots(key, r, prefix)


def test_minus_zero_ties_with_zero() -> None:
    # Products of token 0 with every token of b are negative and too small for fp32; all others are zero.
    key = torch.zeros(1, 1, 256, 2)
    key[0, 0, 0], key[0, 0, 1::2] = torch.tensor([0.0, 1e-37]), torch.tensor([0.0, -1e-37])
    assert match_slots(key, 1, 0)[0][0, :3].tolist() == [127, 127, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_stays_in_its_image_and_leaves_valid_slots(bad: float) -> None:
    clean = normal(4, 2, 33, 16)
    key = clean.clone()
    key[1] = bad
    key[2, 0, 5:9, 3] = bad
    want, got = match_slots(clean, 10, 1), match_slots(key, 10, 1)
    for before, after in zip(want, got):
        assert torch.equal(before[[0, 3]], after[[0, 3]])
    assign, csr, src = got
    for image in (1, 2):
        assert assign[image].unique().tolist() == list(range(23))
        assert src[image].sort().values.tolist() == list(range(33))
        assert csr[image, 0] == 0
        assert csr[image, -1] == 33
    # Tokens without a similarity merge only when no other is left.
    assert all(assign[2, token] < 23 - 16 for token in (6, 8))


def test_an_empty_batch() -> None:
    assign, csr, src = match_slots(normal(0, 2, 9, 4), 2, 1)
    assert (assign.shape, csr.shape, src.shape) == ((0, 9), (0, 8), (0, 9))
    made = merge(normal(0, 9, 4), csr, src, y=normal(0, 9, 4), norm=(None, None, 1e-6))
    assert [part.shape for part in made if part is not None] == [(0, 7, 4), (0, 7), (0, 7, 4)]


# ---- merge


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3, 33, 384, 1280])
def test_merge_equals_loops(mode: str, channels: int) -> None:
    batch, length, slots = 2, 21, 12
    x, y = normal(batch, length, channels), normal(batch, length, channels, seed=1)
    gamma, scale, shift = normal(3, channels, seed=2)
    size = torch.randint(0, 4, (batch, length), generator=torch.Generator().manual_seed(3)).float()
    weight, rows = normal(batch, length, seed=4).abs(), normal(batch, length, 2, seed=5)
    assign = random_slots(batch, length, slots)
    cases: list[tuple[dict[str, Any], Tensor, Tensor | None]] = [
        ({}, x, None),
        ({"size": size}, x, size),
        ({"y": y, "size": size, "weight": weight, "rows": rows}, x.double() + y, weight),
        ({"y": y, "gamma": gamma, "size": size, "norm": (scale, shift, 1e-5)}, x.double() + gamma * y.double(), size),
        ({"norm": (scale, None, 1e-6), "rows": rows}, x, None),
    ]
    for options, tokens, weights in cases:
        out, new_size, moved, normed = merge(x, *grouped(assign, slots), mode=mode, **options)
        assert_near(out, reduced(tokens, assign, slots, mode, weights), 1e-6)
        mass = options.get("size", torch.ones(batch, length)).unsqueeze(-1)
        assert torch.equal(new_size, reduced(mass, assign, slots, "sum").squeeze(-1).float())
        assert (moved is None, normed is None) == ("rows" not in options, "norm" not in options)
        if moved is not None:
            assert_near(moved, reduced(rows, assign, slots, "mean", weights), 1e-6)
        if normed is not None:
            *affine, eps = options["norm"]
            doubled = [part if part is None else part.double() for part in affine]
            assert_near(normed, layer_norm(out.double(), (channels,), *doubled, eps))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_rounded_once(mode: str, dtype: torch.dtype) -> None:
    x, y = normal(2, 21, 40).to(dtype), normal(2, 21, 40, seed=1).to(dtype)
    gamma, scale, shift = normal(3, 40, seed=2).to(dtype)
    size, assign = normal(2, 21, seed=3).abs(), random_slots(2, 21, 12)
    norm = (scale, shift.float(), 1e-6)
    out, _, _, normed = merge(x, *grouped(assign, 12), y=y, gamma=gamma, size=size, mode=mode, norm=norm)
    want = reduced(x.double() + gamma.double() * y.double(), assign, 12, mode, size)
    assert out.dtype == dtype
    # Half a unit in the last place, and what fp32 sums may move across the border.
    assert bool(((out.double() - want).abs() <= 0.501 * torch.finfo(dtype).eps * want.abs() + 1e-6).all())
    assert_near(normed, layer_norm(out.double(), (40,), scale.double(), shift.double(), 1e-6), 1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_conversions_equal_those_of_torch(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    pairs = torch.stack((every, every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]))
    tied = torch.stack((every, torch.nextafter(every.float() * 2**-9, torch.tensor(0.0)).to(dtype)))
    for x in (pairs, tied, torch.stack((every, torch.zeros_like(every)))):
        out = merge(x.unsqueeze(0), torch.tensor([[0, 2]]), torch.tensor([[0, 1]]), mode="sum")[0]
        want = (x[0].float() + x[1].float()).to(dtype)
        assert torch.equal(out[0, 0].isnan(), want.isnan())
        assert torch.equal(out[0, 0].nan_to_num(), want.nan_to_num())


def test_a_token_alone_is_copied_and_padding_gives_zero() -> None:
    x, size = normal(1, 6, 9), torch.tensor([[0.3, 7.0, 1e-30, 0.0, 0.0, 0.0]])
    assign = torch.tensor([[0, 1, 2, 3, 4, 4]])
    for mode in ("mean", "mlerp"):
        out, new_size, _, _ = merge(x, *grouped(assign, 5), size=size, mode=mode)
        assert torch.equal(out[0, :3], x[0, :3])
        assert not out[0, 3:].any()
        assert torch.equal(new_size[0], torch.tensor([0.3, 7.0, 1e-30, 0.0, 0.0]))


def test_of_two_opposite_values_the_positive_one_is_the_largest() -> None:
    slots = grouped(torch.tensor([[0, 0, 1, 1]]), 2)
    x = torch.tensor([[[2.0, -3.0], [-2.0, 1.0], [-2.0, 0.0], [2.0, -1.0]]])
    assert merge(x, *slots, mode="absmax")[0].tolist() == [[[2.0, -3.0], [2.0, -1.0]]]


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_slot(mode: str) -> None:
    x, assign = normal(3, 15, 8), random_slots(3, 15, 7)
    spoiled = x.clone()
    spoiled[1, 9], assign[1, 4], assign[1, 9] = float("nan"), 2, 2
    norm = (None, None, 1e-6)
    want, got = (merge(v, *grouped(assign, 7), mode=mode, norm=norm) for v in (x, spoiled))
    clean = torch.ones(3, 7, dtype=torch.bool)
    clean[1, 2] = False
    for before, after in zip(want, got):
        if before is not None:
            assert torch.equal(before[clean], after[clean])
    assert bool(got[0][1, 2].isnan().all())


def test_layouts_and_dtypes_of_the_other_operands() -> None:
    x, y, size = normal(2, 15, 8), normal(2, 15, 8, seed=1), normal(2, 15, seed=2).abs()
    gamma, assign = normal(8, seed=3), random_slots(2, 15, 7)
    csr, src = grouped(assign, 7)
    want = merge(x, csr, src, y=y, gamma=gamma, size=size)[0]
    strange = normal(15, 8, 2).copy_(x.permute(1, 2, 0)).permute(2, 0, 1)
    padded = torch.cat((y, y), dim=2)[:, :, :8]
    for options in (
        {"x": strange, "y": padded},
        {"csr": csr.long(), "src": src.long().t().contiguous().t()},
        {"size": size.double().t().contiguous().t(), "gamma": gamma.double()},
        {"gamma": torch.stack((gamma, gamma), dim=1)[:, 0]},
    ):
        operands = {"x": x, "csr": csr, "src": src, "y": y, "gamma": gamma, "size": size} | options
        assert torch.equal(merge(**operands)[0], want)
    mixed = merge(x, csr, src, y=y.bfloat16(), gamma=gamma.bfloat16(), size=size)[0]
    rounded = merge(x, csr, src, y=y.bfloat16().float(), gamma=gamma.bfloat16().float(), size=size)[0]
    assert torch.equal(mixed, rounded)


# ---- both


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_equal_bits() -> None:
    for batch, length in ((1, 65), (2, 33), (5, 18)):
        x, y, key = normal(batch, length, 40), normal(batch, length, 40, seed=1), normal(batch, 3, length, 12, seed=2)
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            slots = match_slots(key, 8, 1)
            made = merge(x, *slots[1:], y=y, mode="mlerp", rows=normal(batch, length, 2), norm=(None, None, 1e-6))
            found.append((*slots, *made))
        for other in found[1:]:
            assert all(torch.equal(one, two) for one, two in zip(found[0], other))


def test_what_is_refused_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = normal(1, 4, 2)
    assert refuses(x) is None
    assert refuses(torch.nn.Parameter(x, requires_grad=False)) is None
    assert "float64" in str(refuses(x.double()))
    assert "CPU" in str(refuses(x.to("meta")))
    trained = x.clone().requires_grad_()
    assert "gradient" in str(refuses(trained))
    with torch.no_grad():
        assert refuses(trained) is None
    with FakeTensorMode() as mode:
        assert "ordinary" in str(refuses(mode.from_tensor(x)))
    said: list[str | None] = []
    torch.func.vmap(lambda part: said.append(refuses(part)) or part)(x)
    assert "ordinary" in str(said[0])
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "tracing", lambda: True)
        assert "recorded" in str(refuses(x))
    monkeypatch.setattr(building, "library", lambda: building.Built(None, "no compiler"))
    launching.missing.cache_clear()
    try:
        assert refuses(x) == "no compiler"
    finally:
        launching.missing.cache_clear()


def test_refusing_is_traced_without_a_break() -> None:
    step = torch.compile(lambda x: x + 1 if refuses(x) else x, backend="eager", fullgraph=True)
    assert torch.equal(step(torch.zeros(3)), torch.ones(3))


def test_replacing_constructors_leaves_the_meta_device_alone() -> None:
    with torch.device("meta"):
        assert torch.empty(1).is_meta
