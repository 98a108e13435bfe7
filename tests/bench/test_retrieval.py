"""Retrieval: ranks against a loop over every candidate, intervals, and what a CSV or a tar may hold."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visiontok.bench import pairs, retrieval
from visiontok.bench.data import Failure
from visiontok.errors import FormatError, ParameterError


def loop_ranks(images: torch.Tensor, texts: torch.Tensor, owner: list[int]) -> tuple[list[int], list[int]]:
    """The definition: candidates sorted by similarity, equal ones in the order of the data."""
    by_image, by_text = [], []
    for i in range(len(images)):
        values = [float(images[i] @ text) for text in texts]
        order = sorted(range(len(texts)), key=lambda j: (-values[j], j))
        by_image.append(min(order.index(j) for j in range(len(texts)) if owner[j] == i))
    for j in range(len(texts)):
        values = [float(image @ texts[j]) for image in images]
        order = sorted(range(len(images)), key=lambda i: (-values[i], i))
        by_text.append(order.index(owner[j]))
    return by_image, by_text


@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_ranks_are_those_of_a_loop_with_ties_and_several_captions(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: sums are exact, so many similarities are exactly equal.
    images = torch.randint(-1, 2, (13, 3), generator=generator).float()
    texts = torch.randint(-1, 2, (31, 3), generator=generator).float()
    owner = torch.cat([torch.arange(13), torch.randint(13, (18,), generator=generator)])
    owner = owner[torch.randperm(31, generator=generator)]
    found = retrieval.ranks(images, texts, owner)
    by_image, by_text = loop_ranks(images, texts, owner.tolist())
    assert found.image_to_text.tolist() == by_image
    assert found.text_to_image.tolist() == by_text
    assert len(set((images @ texts.T).flatten().tolist())) < 10


def test_one_point_for_everything_earns_only_the_order() -> None:
    point = torch.ones(20, 4)
    found = retrieval.ranks(point, point, torch.arange(20))
    assert found.image_to_text.tolist() == found.text_to_image.tolist() == list(range(20))
    assert [retrieval.recall(found.image_to_text, k).value for k in retrieval.KS] == [5.0, 25.0, 50.0]


def test_recall_and_change_count_queries() -> None:
    before, after = np.array([0, 0, 0, 4, 9]), np.array([0, 1, 5, 0, 10])
    value, low, high, n = retrieval.recall(before, 5)
    assert (value, n) == (80.0, 5)
    assert low == pytest.approx(37.55, abs=0.01)  # Wilson, 4 of 5
    assert high == pytest.approx(96.38, abs=0.01)
    change = retrieval.change(after, before, 1)
    assert (change.delta, change.lost, change.won, change.p_value) == (pytest.approx(-20.0), 2, 1, 1.0)
    same = retrieval.summary(*[retrieval.Ranks(before, after)] * 2)
    assert {row["delta"] for table in same.values() for row in table.values()} == {0.0}
    assert list(same["text_to_image"]) == ["1", "5", "10"]
    with pytest.raises(ParameterError, match="same queries: 4 here, 5"):
        retrieval.change(after[:4], before, 1)


def test_what_has_no_rank_is_refused() -> None:
    points = torch.eye(3)
    broken = points.clone()
    broken[1, 1] = torch.nan
    for images, texts, owner, message in (
        (broken, points, torch.arange(3), "not finite"),
        (points, points, torch.tensor([0, 1, 1]), "every image at least once"),
        (points, points, torch.tensor([0, 1, 3]), "every image at least once"),
        (points, points[:2], torch.arange(3), r"owner \(m,\)"),
    ):
        with pytest.raises(ParameterError, match=message):
            retrieval.ranks(images, texts, owner)


# ---- pairs


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def red(image: Image.Image) -> torch.Tensor:
    return torch.tensor([[[float(np.asarray(image)[0, 0, 0])]]])


def write_tar(path: Path, members: dict[str, bytes | str], **kinds: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            raw = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.type = kinds.get("type", tarfile.REGTYPE)
            info.size, info.linkname = (len(raw), "") if info.isreg() else (0, "/etc/passwd")
            archive.addfile(info, io.BytesIO(raw) if info.isreg() else None)
    return path


@pytest.mark.parametrize(
    ("header", "separator", "options"),
    [
        ("image,caption", ",", {}),
        ("title\tfilepath", "\t", {}),
        ("id,Text,File_Name", ",", {}),
        ("a,b", ",", {"image_key": "a", "caption_key": "b"}),
    ],
)
def test_csv_columns_are_found_and_captions_of_one_image_join(
    header: str, separator: str, options: dict[str, str], tmp_path: Path
) -> None:
    names = header.split(separator)
    image = next(i for i, name in enumerate(names) if name.lower() in (*pairs.IMAGE_KEYS, "a"))
    text = next(i for i, name in enumerate(names) if name.lower() in (*pairs.CAPTION_KEYS, "b"))
    lines = [header]
    for name, caption in (("x/1.png", "one"), ("2.png", "two"), ("x/1.png", "uno")):
        cells = ["7"] * len(names)
        cells[image], cells[text] = name, caption
        lines.append(separator.join(cells))
    path = tmp_path / "pairs.csv"
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert pairs.read_pairs(path, **options) == [
        pairs.Pair(tmp_path / "x/1.png", ("one", "uno")),
        pairs.Pair(tmp_path / "2.png", ("two",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,caption\na,b\n", "none of the columns image, filepath.*it has: picture, caption; give --csv-img-key"),
        ("image,words\na,b\n", "give --csv-caption-key"),
        ("image,caption\na,b\nc,\n", "line 3: no caption"),
        ("image,caption\n,b\n", "line 2: no image"),
        ("image,caption\n", "no pair"),
        ('image,caption\n"a,b\n', "cannot be read as CSV"),
        ("", "it has: ;"),
    ],
)
def test_csv_faults_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        pairs.read_pairs(path)


def test_csv_with_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("image,caption\na,b\n")
    with pytest.raises(FormatError, match=r"no column 'img' \(--csv-img-key\); it has: image, caption"):
        pairs.read_pairs(path, "img")
    with pytest.raises(ParameterError, match="does not exist"):
        pairs.read_pairs(tmp_path / "no.csv")


def test_tar_is_read_in_place_and_broken_images_are_failures(tmp_path: Path) -> None:
    members = {"a/0.png": png(9), "a/0.txt": "nine\n\n red \n", "a/0.json": "{}", "b.0.JPG": png(3), "b.0.txt": "x"}
    write_tar(tmp_path / "0.tar", {"c.jpg": b"no image", "c.txt": "broken", "e.png": b"", "e.txt": "empty"})
    write_tar(tmp_path / "1.tar", members)
    # The key of a sample ends at the first dot, as webdataset has it: "b" with "0.jpg" is of no known kind.
    found = pairs.read_pairs(tmp_path)
    assert [pair.captions for pair in found] == [("broken",), ("empty",), ("nine", "red")]
    dataset = pairs.PairDataset(found, red)
    broken, empty, (image, number) = (dataset[index] for index in range(3))
    assert isinstance(broken, Failure)
    assert broken.path == f"{tmp_path}/0.tar:c.jpg"
    assert empty == Failure(f"{tmp_path}/0.tar:e.png", "empty file")
    assert (image.item(), number) == (9.0, 2)
    assert [pair.captions[0] for pair in pairs.PairDataset(found, red, max_images=2).pairs] == ["broken", "empty"]


@pytest.mark.parametrize("name", ["/a.png", "../a.png", "x/../../a.png"])
def test_tar_names_that_leave_the_archive_are_refused(name: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {name: png(), "a.txt": "x"})
    with pytest.raises(FormatError, match="leaves the archive"):
        pairs.read_tar(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_tar_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": ""}, type=kind)
    with pytest.raises(FormatError, match="'a.png' is a link or a special file"):
        pairs.read_tar(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": png()}, "sample 'a' has no txt"),
        ({"d/a.txt": "x"}, "sample 'd/a' has no image"),
        ({"a.png": png(), "a.txt": b"\xff\xfe"}, "not UTF-8"),
        ({"a.png": png(), "a.txt": " \n"}, "'a.txt' is empty"),
        ({"a.json": "{}"}, "no pair"),
    ],
)
def test_tar_faults_are_named(members: dict[str, bytes | str], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        pairs.read_tar(write_tar(tmp_path / "x.tar", members))


def test_tar_that_is_none_or_compressed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"\x00\x01 no tar" * 100)
    with pytest.raises(FormatError, match="uncompressed tar"):
        pairs.read_tar(path)
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(FormatError, match="uncompressed tar"):
        pairs.read_tar(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ParameterError, match="holds no .tar"):
        pairs.read_pairs(tmp_path / "empty")
