"""Packing, the range coder and `.vtok` files: round trips, cuts, damage, and bytes that are no file at all."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from visiontok.errors import FormatError, IncompatibleError, ParameterError
from visiontok.tokenizers import file_format, packing, range_coder
from visiontok.tokenizers.base import Tokenizer


class Fake(Tokenizer):
    """Ids without a network behind them."""

    name = "fake"

    def __init__(self, codebook_size: int = 4096, length: int = 40, levels: list[int] | None = None) -> None:
        super().__init__()
        self.config = {"codebook_size": codebook_size, **({"levels": levels} if levels else {})}
        self.length, self.codebook_size, self.image_size = length, codebook_size, 8
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def _decode(self, ids: Tensor, lengths: list[int], *, seed: int = 0) -> Tensor:
        return torch.zeros(len(ids), 3, 8, 8)


def examples(count: int) -> settings:
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def ids_of(tokenizer: Tokenizer, seed: int = 0, count: int = 21) -> Tensor:
    return torch.randint(tokenizer.codebook_size, (count,), generator=torch.Generator().manual_seed(seed))


@examples(200)
@given(st.integers(1, 24), st.integers(0, 40), st.integers(0, 999))
def test_packing_is_the_binary_number_with_the_first_token_lowest(bits: int, count: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 1 << bits, count)
    number = sum(int(value) << (place * bits) for place, value in enumerate(ids))
    data = packing.pack(ids, bits)
    assert data == number.to_bytes((count * bits + 7) // 8, "little")
    assert packing.unpack(data, bits, count).tolist() == ids.tolist()
    for cut in range(len(data)):
        assert packing.unpack(data[:cut], bits, count).tolist() == ids[: cut * 8 // bits].tolist()


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ParameterError, match="got 0 to 16"):
        packing.pack([0, 16], 4)
    with pytest.raises(ParameterError, match="integers"):
        packing.pack([0.5], 4)
    with pytest.raises(ParameterError, match="1 to 24"):
        packing.pack([0], 25)
    assert [packing.bits_for(size) for size in (1, 2, 256, 257, 4096, 64000)] == [1, 1, 8, 9, 12, 16]


def skewed(seed: int, n: int, length: int, radices: tuple[int, ...]) -> np.ndarray:
    """Rows whose later tokens vary less."""
    random = np.random.default_rng(seed)
    ids, scale = np.zeros((n, length), np.int64), 1
    for radix in radices:
        wide = random.integers(0, radix, (n, length))
        digit = np.where(random.random((n, length)) < np.linspace(0.1, 0.97, length), radix // 2, wide)
        ids, scale = ids + scale * digit, scale * radix
    return ids


@pytest.mark.parametrize("radices", [(256,), (8, 8, 8, 5, 5, 5), (4096,)])
def test_range_coder_returns_the_ids_and_saves_what_is_predictable(radices: tuple[int, ...]) -> None:
    tables = range_coder.build_tables(skewed(0, 400, 32, radices), radices)
    rows = skewed(1, 50, 32, radices)
    streams = range_coder.encode(rows, tables)
    assert np.array_equal(np.stack(range_coder.decode(streams, 32, tables)), rows)
    packed = packing.packed_size(32, packing.bits_for(int(np.prod(radices))))
    assert sum(map(len, streams)) / len(streams) < 0.85 * packed
    # The size is that of the model: the sum of -log2 of the probabilities, and less than three bytes on top.
    costs = np.zeros(len(rows))
    for digit, bound in zip(range_coder._digits(rows, radices), tables.bounds()):
        places = np.arange(32)
        share = (bound[places, digit + 1] - bound[places, digit]).astype(float) / 65536
        costs -= np.log2(share).sum(1)
    extra = np.array([len(stream) for stream in streams]) - costs / 8
    assert extra.max() < 3
    assert extra.mean() < 1.5


def test_cut_streams_give_only_certain_tokens() -> None:
    radices = (8, 5, 5)
    tables = range_coder.build_tables(skewed(0, 200, 20, radices), radices)
    rows = skewed(2, 10, 20, radices)
    streams = range_coder.encode(rows, tables)
    for cut in range(max(map(len, streams))):
        parts = [stream[:cut] for stream in streams]
        found = range_coder.decode(parts, 20, tables, truncated=True)
        for row, ids in zip(rows, found):
            assert row[: len(ids)].tolist() == ids.tolist()
        if cut >= 16:
            assert all(len(ids) > 3 for ids in found)


@examples(60)
@given(st.binary(max_size=40), st.booleans())
def test_the_range_coder_takes_any_bytes(data: bytes, truncated: bool) -> None:
    tables = range_coder.build_tables(skewed(0, 50, 12, (8, 5)), (8, 5))
    (ids,) = range_coder.decode([data], 12, tables, truncated)
    assert len(ids) <= 12
    assert (ids < 40).all()
    assert (ids >= 0).all()


def test_tables_are_stored_and_refused_when_damaged(tmp_path) -> None:
    tables = range_coder.build_tables(skewed(0, 50, 12, (8, 5)), (8, 5))
    path = tmp_path / "tables.safetensors"
    range_coder.save_tables(tables, path)
    again = range_coder.load_tables(path)
    assert again.identifier == tables.identifier
    assert np.array_equal(again.counts, tables.counts)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FormatError, match="no tables"):
        range_coder.load_tables(path)


@pytest.mark.parametrize("coded", [False, True])
def test_files_return_all_they_were_given(tmp_path, coded: bool) -> None:
    tokenizer = Fake(1000, levels=[8, 5, 5, 5])
    ids = ids_of(tokenizer)
    tables = range_coder.build_tables(skewed(0, 50, 40, (8, 5, 5, 5)), (8, 5, 5, 5)) if coded else None
    path = tmp_path / "a.vtok"
    size = file_format.save(
        path, ids, tokenizer, size=(640, 480), seed=7, steps=25, guidance=7.5, tables=tables
    )  # fmt: skip
    assert path.stat().st_size == size
    file = file_format.open(path, tables=tables)
    assert torch.equal(file.ids, ids)
    assert file.ids.dtype == torch.int64
    assert (file.family, file.length, file.size, file.seed, file.steps, file.guidance) == (
        "fake", 21, (640, 480), 7, 25, 7.5,
    )  # fmt: skip
    assert not file.truncated
    assert not file.damaged
    assert file.options(tokenizer) == {"seed": 7}
    file_format.check_model(file, tokenizer)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_small_and_its_size_is_foretold() -> None:
    tokenizer = Fake()
    tokenizer.name = "one_d_piece"
    plain = file_format.dumps(ids_of(tokenizer), tokenizer, checksum=False)
    assert len(plain) == 16 + 32
    for size, checksum in ((None, True), ((3, 4), True), ((3, 4), False)):
        data = file_format.dumps(ids_of(tokenizer), tokenizer, size=size, checksum=checksum)
        assert len(data) == 32 + file_format.header_size(tokenizer, size=size is not None, checksum=checksum)


@pytest.mark.parametrize("coded", [False, True])
def test_every_cut_is_an_image_or_an_error(coded: bool) -> None:
    tokenizer = Fake(256, levels=[16, 16])
    tables = range_coder.build_tables(skewed(0, 50, 40, (16, 16)), (16, 16)) if coded else None
    ids = ids_of(tokenizer)
    data = file_format.dumps(ids, tokenizer, size=(1, 2), tables=tables)
    head = file_format._parse(data).end
    for cut in range(head):
        with pytest.raises(FormatError):
            file_format.loads(data[:cut], tables=tables)
    for cut in range(head, len(data)):
        file = file_format.loads(data[:cut], tables=tables)
        assert file.truncated
        assert not file.damaged
        assert file.length == 21
        assert torch.equal(file.ids, ids[: len(file.ids)])
        assert coded or len(file.ids) == cut - head
    with pytest.raises(FormatError, match="follow"):
        file_format.loads(data + b"\0", tables=tables)


def test_every_flipped_bit_is_found() -> None:
    tokenizer = Fake()
    ids = ids_of(tokenizer, count=20)
    data = file_format.dumps(ids, tokenizer, seed=3)
    head = file_format._parse(data).end
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            file_format.loads(bytes(bad))
        if bit >= 8 * head:
            file = file_format.loads(bytes(bad), allow_damaged=True)
            assert file.damaged
            assert not torch.equal(file.ids, ids)


@examples(300)
@given(st.binary(max_size=80), st.booleans())
def test_no_bytes_crash_the_reader(data: bytes, repaired: bool) -> None:
    if repaired:
        # With a magic and a valid checksum the checks behind them are reached.
        head = b"VTOK\x01" + data[:20]
        data = head + struct.pack("<H", file_format._crc(head)) + data[20:]
    try:
        file = file_format.loads(data)
    except (FormatError, ParameterError):
        return
    assert len(file.ids) <= len(data) * 8


def test_errors_name_the_remedy(tmp_path) -> None:
    tokenizer, other = Fake(), Fake()
    ids = ids_of(tokenizer)
    with torch.no_grad():
        other.weight.fill_(1)
    file = file_format.loads(file_format.dumps(ids, tokenizer))
    with pytest.raises(IncompatibleError, match="other weights"):
        file_format.check_model(file, other)
    other.name = "others"
    with pytest.raises(IncompatibleError, match="'fake'"):
        file_format.check_model(file, other)
    for bad, match in (
        (ids[None], "one image"),
        (ids.float(), "integers"),
        (ids + 4096, r"\[0, 4096\)"),
        (ids[:0], "1 to 40"),
    ):
        with pytest.raises(ParameterError, match=match):
            file_format.dumps(bad, tokenizer)
    with pytest.raises(ParameterError, match="seed"):
        file_format.dumps(ids, tokenizer, seed=1 << 32)
    with pytest.raises(ParameterError, match="not a file"):
        file_format.open(tmp_path / "none.vtok")
    with pytest.raises(ParameterError, match="folder that exists"):
        file_format.save(tmp_path / "none" / "a.vtok", ids, tokenizer)
    big = tmp_path / "big.vtok"
    big.write_bytes(bytes(300_000))
    with pytest.raises(FormatError, match="300000 bytes"):
        file_format.open(big)
