"""Folders, shards and the commands `encode` and `decode`, with the shipped tokenizers."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from visiontok.cli import main
from visiontok.errors import IncompatibleError, ParameterError
from visiontok.tokenizers import batch, file_format, loading, shards, sources
from visiontok.tokenizers.base import Tokenizer

pytest.importorskip("sklearn")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return loading.load("tiny_one_d_piece")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine readable pictures of odd kinds in nested folders, a text file and a damaged picture."""
    from visiontok.models.tiny import digits_split

    root, split = tmp_path_factory.mktemp("photos"), digits_split()
    (root / "inner").mkdir()
    for number, mode in enumerate(("L", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "LA", "RGB")):
        picture = split.image(number).resize((48, 40)).convert("L")
        picture = picture.convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)
        ending = "tif" if mode in ("CMYK", "I;16") else "png"
        picture.save(root / ("inner" if number % 2 else ".") / f"digit{number}.{ending}")
    (root / "notes.txt").write_text("no picture")
    (root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_becomes_the_tokens_that_the_api_gives(tokenizer: Tokenizer, photos: Path, tmp_path: Path) -> None:
    summary = batch.encode_files(tokenizer, photos, tmp_path / "out", tokens=5, batch_size=4)
    assert (summary.images, summary.failed, summary.tokens) == (9, 1, 45)
    assert summary.failures[0][0] == "bad"
    file = file_format.open(tmp_path / "out" / "inner" / "digit1.vtok")
    with Image.open(photos / "inner" / "digit1.png") as picture:
        expected = tokenizer.encode(tokenizer.preprocess(picture.convert("RGB")), 5)
    assert torch.equal(file.ids, expected[0])
    assert file.size == (48, 40)
    pictures = batch.decode_files(tokenizer, tmp_path / "out", tmp_path / "png")
    assert (pictures.images, pictures.failed) == (9, 0)
    assert Image.open(tmp_path / "png" / "inner" / "digit1.png").size == (32, 32)


@pytest.mark.parametrize("to", shards.FORMATS)
def test_an_interrupted_run_continues_to_the_same_bytes(
    tokenizer: Tokenizer, photos: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"to": to, "tokens": 4, "batch_size": 1, "shard_size": 3}
    batch.encode_files(tokenizer, photos, tmp_path / "whole", **options)
    calls, write = [], shards.write_job

    def killed(*args: Any, **kwargs: Any) -> int:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(shards, "write_job", killed)
    with pytest.raises(KeyboardInterrupt):
        batch.encode_files(tokenizer, photos, tmp_path / "part", **options)
    done = files(tmp_path / "part")
    with pytest.raises(ParameterError, match="--resume"):
        batch.encode_files(tokenizer, photos, tmp_path / "part", **options)
    with pytest.raises(ParameterError, match="other settings"):
        batch.encode_files(tokenizer, photos, tmp_path / "part", **{**options, "tokens": 5}, resume=True)
    summary = batch.encode_files(tokenizer, photos, tmp_path / "part", **options, resume=True)
    assert summary.skipped >= 3
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    assert set(done) < set(files(tmp_path / "whole"))


def test_shards_in_and_out(tokenizer: Tokenizer, photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name in ("digit0.png", "inner/digit1.png", "../escape.png", "digit0.png"):
            data = (photos / ("digit0.png" if "escape" in name else name)).read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    summary = batch.encode_files(tokenizer, tmp_path / "in.tar", tmp_path / "pq", to="parquet", tokens=3)
    assert (summary.images, summary.failed) == (2, 2)
    table = pq.read_table(tmp_path / "pq" / "tokens-00000.parquet").to_pylist()
    assert [row["key"] for row in table] == ["in/digit0", "in/inner/digit1", "in/../escape", "in/digit0"]
    assert [row["error"] for row in table] == [
        None,
        None,
        "its name leaves the folder",
        "a second picture of this name",
    ]
    assert [row["length"] for row in table] == [3, 3, 0, 0]
    direct = batch.encode_job(tokenizer, sources.entries(sources.jobs(photos / "digit0.png", 1)[0]), batch.Choice(3))
    assert table[0]["ids"] == direct[0].ids.tolist()
    stored = dict(shards.read(tmp_path / "pq"))
    assert isinstance(stored["in/../escape"], str)
    assert not list(tmp_path.glob("*escape*"))
    # A table of pictures as Hugging Face stores them.
    import pyarrow as pa

    rows = [{"image": {"bytes": (photos / "digit0.png").read_bytes(), "path": "a.png"}}, {"image": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hf.parquet")
    summary = batch.encode_files(tokenizer, tmp_path / "hf.parquet", tmp_path / "wds", to="webdataset", tokens=3)
    assert (summary.images, summary.failed) == (1, 1)
    kinds = [type(value).__name__ for _, value in shards.read(tmp_path / "wds")]
    assert kinds == ["TokenFile", "str"]


def test_a_damaged_shard_keeps_what_was_read(tokenizer: Tokenizer, photos: Path, tmp_path: Path) -> None:
    data = (photos / "digit0.png").read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "cut.tar").write_bytes(buffer.getvalue()[: 1024 + 2 * len(data)])
    summary = batch.encode_files(tokenizer, tmp_path / "cut.tar", tmp_path / "out", tokens=2)
    assert summary.images >= 1
    assert "cannot be read on" in summary.failures[-1][1]


def test_lengths_by_quality_and_by_bytes(tokenizer: Tokenizer, photos: Path, tmp_path: Path) -> None:
    batch.encode_files(tokenizer, photos, tmp_path / "bytes", budget_bytes=35)
    sizes = [path.stat().st_size for path in (tmp_path / "bytes").rglob("*.vtok")]
    assert len(sizes) == 9
    assert max(sizes) <= 35 < min(sizes) + 1 + 1
    batch.encode_files(tokenizer, photos, tmp_path / "mean", mean_tokens=6)
    shared = [len(file_format.open(path).ids) for path in sorted((tmp_path / "mean").rglob("*.vtok"))]
    assert len(set(shared)) > 1
    assert sum(shared) <= 6 * len(shared) < sum(shared) + 16
    # One file of a job lost: all of it is done again, with the same shares.
    next((tmp_path / "mean").rglob("*.vtok")).unlink()
    batch.encode_files(tokenizer, photos, tmp_path / "mean", mean_tokens=6, resume=True)
    assert [len(file_format.open(path).ids) for path in sorted((tmp_path / "mean").rglob("*.vtok"))] == shared
    batch.encode_files(tokenizer, photos, tmp_path / "psnr", target_psnr=14.0)
    lengths = {len(file.ids) for _, file in shards.read(tmp_path / "psnr") if not isinstance(file, str)}
    assert len(lengths) > 1
    for name, value in (("budget_bytes", 10), ("tokens", 99), ("mean_tokens", 99.0)):
        with pytest.raises(ParameterError, match=name):
            batch.encode_files(tokenizer, photos, tmp_path / "none", **{name: value})
    assert not (tmp_path / "none").exists()


def test_commands(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "one.vtok")
    assert main(["encode", str(photos / "digit0.png"), "-o", out, "--tokens", "4"]) == 0
    assert main(["decode", out, "-o", str(tmp_path / "one.png")]) == 0
    assert Image.open(tmp_path / "one.png").size == (32, 32)
    capsys.readouterr()
    assert main(["encode", str(photos), "-o", str(tmp_path / "many"), "--quiet"]) == 1
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["images"], row["failed"], row["failures"][0][0]) == (9, 1, "bad")
    assert main(["encode", str(photos), "-o", str(tmp_path / "more"), "--max-failed", "1"]) == 0
    assert main(["encode", str(photos), "-o", str(tmp_path / "more")]) == 2
    assert main(["encode", str(photos / "digit0.png"), "-o", out, "-t", "tiny_flextok", "--steps", "3"]) == 0
    assert main(["decode", out, "-o", str(tmp_path / "flex.png"), "--set", "guidance=1.0"]) == 0
    assert main(["decode", out, "-o", str(tmp_path / "x.png"), "-t", "tiny_one_d_piece"]) == 3
    assert "'flextok'" in capsys.readouterr().err


def test_tokens_of_other_weights_are_refused(tokenizer: Tokenizer, photos: Path, tmp_path: Path) -> None:
    batch.encode_files(tokenizer, photos / "digit0.png", tmp_path / "a.vtok")
    other = type(tokenizer)(tokenizer.config)
    with pytest.raises(IncompatibleError, match="other weights"):
        batch.decode_files(other, tmp_path / "a.vtok", tmp_path / "png")


def test_train_tokenizer_resumes_to_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train-tokenizer", "--recipe", "tiny_one_d_piece", "-b", "8", "--set", "checkpoint_every=2", "--quiet"]
    assert main([*common, "--updates", "4", "--output", str(tmp_path / "whole")]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    loaded = loading.load("one_d_piece", tmp_path / "whole")
    assert loaded.model_id == row["model_id"]
    import visiontok.training.tokenizer_loop as loop
    from visiontok.training.tokenizer_config import load_tokenizer_recipe

    recipe = load_tokenizer_recipe("tiny_one_d_piece", updates=4, batch_size=8, checkpoint_every=2)

    def stop(updates: int) -> None:
        if updates == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.fit_tokenizer(recipe, output=tmp_path / "part", on_update=stop)
    assert main([*common, "--updates", "4", "--output", str(tmp_path / "part"), "--resume"]) == 0
    again = loading.load("one_d_piece", tmp_path / "part").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in loaded.state_dict().items())
    assert main(["train-tokenizer", "--recipe", "none"]) == 2


def _kill_a_worker_after_the_first_shard(folder: Path, killed: list[int]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not killed:
        if list(folder.glob("tokens-*.parquet")):
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = entry.read_bytes()
                except OSError:
                    continue
                if line.startswith(b"ray::") and b"Map" in line:
                    killed.append(int(entry.parent.name))
                    os.kill(killed[-1], signal.SIGKILL)
                    return
        time.sleep(0.02)


@pytest.mark.full
def test_ray_loses_nothing_when_a_worker_is_killed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from visiontok.models.tiny import digits_split
    from visiontok.tokenizers.mass import tokenize_dataset

    split = digits_split()
    (tmp_path / "in").mkdir()
    for number in range(200):
        split.image(number).save(tmp_path / "in" / f"{number:03d}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"bad")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR")
    killed: list[int] = []
    try:
        out = tmp_path / "out"
        watcher = threading.Thread(target=_kill_a_worker_after_the_first_shard, args=(out, killed))
        watcher.start()
        options: dict[str, Any] = {"tokenizer": "tiny_one_d_piece", "tokens": 6, "shard_size": 4}
        tokenize_dataset(tmp_path / "in", out, **options)
        watcher.join()
        assert killed
        again = tokenize_dataset(tmp_path / "in", out, **options)
        assert (again.images, again.skipped) == (0, 201)
    finally:
        ray.shutdown()
    batch.encode_files(
        tokenizer, tmp_path / "in", tmp_path / "local", to="parquet", tokens=6, shard_size=4, batch_size=32
    )
    stored, expected = (
        [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        for folder in (out, tmp_path / "local")
    )
    assert len(stored) == 201
    assert sum(row["error"] is not None for row in stored) == 1
    assert [(row["key"], row["ids"]) for row in stored] == [(row["key"], row["ids"]) for row in expected]
