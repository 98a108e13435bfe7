"""Reading images: every mode, every way to be unreadable, and folders of classes (S1)."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visiontok.bench import data
from visiontok.bench.data import FolderDataset, UnreadableImageError, batches, class_names, open_image, split_folder
from visiontok.errors import ParameterError


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (8, 8), (index * 40, 0, 0)).save(tmp_path / name / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert data.to_rgb(Image.new(mode, (4, 3))).mode == "RGB"


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", ".jpg"), ("I;16", ".png"), ("LA", ".png"), ("P", ".gif.png")])
def test_modes_survive_a_file(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.new(mode, (5, 7)).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (5, 7))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(np.asarray(data.to_rgb(Image.fromarray(ramp)))[..., 0].ravel(), np.arange(256))


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "p.png", transparency=0)
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert open_image(tmp_path / "a.webp").getpixel((0, 0)) == (255, 0, 0)


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert open_image(tmp_path / "a.jpg").size == (4, 4)


@pytest.mark.parametrize("share", [index / 20 for index in range(20)])
def test_truncated_at_any_point_is_unreadable(tmp_path: Path, share: float) -> None:
    whole = jpeg()
    path = tmp_path / "cut.jpg"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UnreadableImageError, match="cut.jpg: "):
        open_image(path)


def test_two_bytes_short_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "short.jpg").write_bytes(jpeg()[:-2])
    with pytest.raises(UnreadableImageError, match="truncated"):
        open_image(tmp_path / "short.jpg")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"#!/bin/sh\necho hello\n", "UnidentifiedImageError"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "UnidentifiedImageError"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason):
        open_image(tmp_path / "bad.png")


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (200, 200)).save(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImageError, match="200x200 exceeds 1000 pixels"):
        open_image(tmp_path / "bomb.png", max_pixels=1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    with pytest.raises(UnreadableImageError, match="DecompressionBombWarning"):
        open_image(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImageError, match="too large"):
        open_image(tmp_path / "bomb.png", max_bytes=10)


def test_pipes_and_broken_links_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImageError, match="not a regular file"):
        open_image(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UnreadableImageError, match="FileNotFoundError"):
        open_image(tmp_path / "link.png")


def test_folder_is_read_in_order_of_names(folder: Path) -> None:
    (folder / "dog" / "notes.txt").write_text("no image")
    dataset = FolderDataset(folder, to_tensor)
    assert dataset.classes == ["cat", "dog"]
    assert [(path.name, target) for path, target in dataset.items] == [
        ("0.png", 0), ("1.png", 0), ("2.png", 0), ("0.png", 1), ("1.png", 1), ("2.png", 1),
    ]  # fmt: skip


def test_links_to_a_parent_end(folder: Path) -> None:
    (folder / "cat" / "loop").symlink_to(folder / "cat")
    assert len(FolderDataset(folder, to_tensor)) == 6


def test_unreadable_images_are_reported_never_replaced(folder: Path) -> None:
    (folder / "cat" / "1.png").write_bytes(b"")
    (folder / "dog" / "2.png").write_bytes(b"text")
    found = list(batches(FolderDataset(folder, to_tensor), 2))
    assert torch.cat([batch.targets for batch in found]).tolist() == [0, 0, 1, 1]
    failures = [failure for batch in found for failure in batch.failures]
    assert [Path(failure.path).name for failure in failures] == ["1.png", "2.png"]
    assert failures[0].reason == "empty file"
    assert len(found) == 3


def test_batch_of_failures_only(folder: Path) -> None:
    for path in (folder / "cat").iterdir():
        path.write_bytes(b"")
    first = next(batches(FolderDataset(folder, to_tensor), 3))
    assert len(first.targets) == 0
    assert len(first.failures) == 3


def test_fewer_images_still_see_every_class(folder: Path) -> None:
    assert {target for _, target in FolderDataset(folder, to_tensor, max_images=2).items} == {0, 1}


def test_class_names_must_fit_the_model(folder: Path, tmp_path: Path) -> None:
    assert class_names(folder, 2) == ["cat", "dog"]
    with pytest.raises(ParameterError, match="names 2 classes but the model has 1000 outputs.*--class-map"):
        class_names(folder, 1000)
    mapping = tmp_path / "map.txt"
    mapping.write_text("bird\ndog\ncat\n")
    assert class_names(folder, 3, mapping) == ["bird", "dog", "cat"]
    assert FolderDataset(folder, to_tensor, ["bird", "dog", "cat"]).items[0][1] == 2


def test_synset_folders_are_placed_by_imagenets_list(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    (tmp_path / "n02123045").mkdir()
    names = class_names(tmp_path, 1000)
    assert len(names) == 1000
    assert names.index("n02123045") == 281


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="does not exist"):
        FolderDataset(tmp_path / "gone", to_tensor)
    with pytest.raises(ParameterError, match="has no class folder"):
        FolderDataset(tmp_path, to_tensor)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ParameterError, match="no image"):
        FolderDataset(tmp_path, to_tensor)
    with pytest.raises(ParameterError, match="cat are not in the class map"):
        FolderDataset(tmp_path, to_tensor, ["dog"])


def test_split_folder(tmp_path: Path) -> None:
    assert split_folder(tmp_path, "validation") == tmp_path
    (tmp_path / "val").mkdir()
    assert split_folder(tmp_path, "validation") == tmp_path / "val"
