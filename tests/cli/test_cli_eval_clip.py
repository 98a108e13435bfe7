"""`visiontok eval --task zeroshot|retrieval`: the embedded model, folders, pairs, and what is refused."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("sklearn")

import open_clip  # noqa: E402
import torch  # noqa: E402

from visiontok.bench import scenes  # noqa: E402
from visiontok.bench.runtime import threads  # noqa: E402
from visiontok.cli import main  # noqa: E402

REDUCED = ["--reducer", "tome", "--r", "4"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first thirty scenes: as PNG files in class folders, as a CSV of them, and as a tar."""
    root, found = tmp_path_factory.mktemp("data"), scenes.fixed_scenes()
    lines, captions = ["filepath,caption"], found.captions()
    with tarfile.open(root / "pairs.tar", "w") as archive:
        for number in range(30):
            path = root / "classes" / scenes.DIGITS[int(found.labels[number, 0])] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            found.image(number).save(path)
            lines += [f"{path.relative_to(root)},{text}" for text in captions[number]]
            text = root / f"{number}.txt"
            text.write_text("\n".join(captions[number]))
            archive.add(path, f"{number}.png")
            archive.add(text, text.name)
    (root / "pairs.csv").write_text("\n".join(lines))
    (root / "templates.txt").write_text("\n".join(scenes.TEMPLATES))
    return root


def row(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_zeroshot_of_the_embedded_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "row.json"
    command = ["eval", "--task", "zeroshot", *REDUCED, "--max-images", "60", "--results-file", str(file)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "tiny_clip tome r=4" in text
    assert "McNemar" in text
    found = json.loads(text.splitlines()[-1])
    assert json.loads(file.read_text()) == found
    assert (found["n_images"], found["n_classes"], found["spec"]["tower"]) == (60, 10, "visual")
    assert found["top1_low"] < found["top1"] <= found["top1_high"]
    assert found["top1"] > 50
    assert found["top5_low"] < found["top5"] <= found["top5_high"]
    assert 0 < found["gmacs"] < found["gmacs_base"]
    assert found["gmacs_text"] == found["gmacs_text_base"]
    assert found["tokens"] == sorted(found["tokens"], reverse=True)
    assert found["tokens"][-1] < 65


def test_retrieval_of_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--task", "retrieval", *REDUCED, "--max-images", "40"]) == 0
    text = capsys.readouterr().out
    assert "image to text R@1" in text
    assert "40 images, 80 captions" in text
    recall = json.loads(text.splitlines()[-1])["recall"]
    for direction, n in (("image_to_text", 40), ("text_to_image", 80)):
        values = [recall[direction][k]["value"] for k in ("1", "5", "10")]
        assert values == sorted(values)
        assert values[-1] > 50
        assert recall[direction]["1"]["n"] == n


def test_no_reduction_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("zeroshot", "retrieval"):
        assert main(["eval", "--task", task, "--reducer", "tome", "--r", "0", "--max-images", "20", "--quiet"]) == 0
        found = row(capsys)
        assert found["gmacs"] == found["gmacs_base"]
        deltas = [found.get("delta")]
        if task == "retrieval":
            deltas = [value["delta"] for table in found["recall"].values() for value in table.values()]
        assert set(deltas) == {0.0}


@pytest.mark.parametrize("tower", ["text", "both"])
def test_the_text_encoder_is_reduced_on_request(tower: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--task", "zeroshot", "--tower", tower, "--reducer", "random", "--r", "1"]
    assert main([*command, "--max-images", "20", "--quiet"]) == 0
    found = row(capsys)
    assert found["gmacs_text"] < found["gmacs_text_base"]
    assert (found["gmacs"] < found["gmacs_base"]) is (tower == "both")


def test_a_folder_sees_what_the_embedded_scenes_are(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--task", "zeroshot", "--data-dir", str(data / "classes"), "-m", "tiny_clip", "--quiet"]
    assert main([*command, "--templates", str(data / "templates.txt")]) == 0
    found = row(capsys)
    assert found["n_images"] == 30
    names = sorted(path.name for path in (data / "classes").iterdir())
    assert found["n_classes"] == len(names)
    # Class names from a file: every digit is called by the next one's name, so nothing is right any more.
    (data / "names.json").write_text(json.dumps(names[1:] + names[:1]))
    options = ["--class-names", str(data / "names.json"), "--templates", str(data / "templates.txt")]
    assert main([*command, *options]) == 0
    assert row(capsys)["top1"] < found["top1"] - 40


def test_csv_and_tar_give_what_the_embedded_scenes_give(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for source in ("pairs.csv", "pairs.tar"):
        assert main(["eval", "--task", "retrieval", "--data-dir", str(data / source), "--quiet"]) == 0
        found = row(capsys)
        assert (found["n_images"], found["n_captions"]) == (30, 60)
        results.append(found["recall"])
    assert results[0] == results[1]


def test_unreadable_images_are_counted_with_their_captions(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (data / "pairs.csv").read_text().splitlines()
    moved = [lines[0], *(f"{data}/{line}" for line in lines[1:21]), "gone.png,a red three"]
    (tmp_path / "pairs.csv").write_text("\n".join(moved))
    command = ["eval", "--task", "retrieval", "--data-dir", str(tmp_path / "pairs.csv"), "--quiet"]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert f"unreadable: {tmp_path}/gone.png: FileNotFoundError" in captured.err
    assert "1 unreadable image(s), --max-failed is 0" in captured.err
    found = json.loads(captured.out.splitlines()[-1])
    assert (found["n_images"], found["n_captions"], found["n_failed"]) == (10, 20, 1)
    assert main([*command, "--max-failed", "1"]) == 0


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--task", "zeroshot", *REDUCED, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "65 -> 61" in text
    assert "--result" not in text


def test_random_weights_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path) -> None:
    vision = {"image_size": 64, "patch_size": 32, "width": 16, "layers": 1, "head_width": 16}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {"width": 16, "heads": 2, "layers": 1}}
    (tmp_path / "visiontok-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "visiontok-small.json")
    command = ["eval", "--task", "zeroshot", "-m", "visiontok-small", "--data-dir", str(data / "classes")]
    assert main([*command, "--templates", "simple"]) == 0
    assert "the weights are random" in capsys.readouterr().out
    torch.save(open_clip.create_model("visiontok-small").state_dict(), tmp_path / "w.pt")
    options = ["--templates", "simple", "--checkpoint", str(tmp_path / "w.pt"), "--quiet"]
    assert main([*command, *options]) == 0
    assert row(capsys)["note"] is None


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--task", "classify", "--tower", "text"], 2, "--tower is for --task zeroshot or retrieval, not for classify"),
        (["--task", "retrieval", "--templates", "simple"], 2, "--templates is for --task zeroshot, not for retrieval"),
        (["--task", "zeroshot", "--class-map", "x"], 2, "--class-map is for --task classify, not for zeroshot"),
        (["--pretrained", "openai"], 2, "'openai' is a tag of open_clip"),
        (["--task", "zeroshot", "-m", "ViT-B-32"], 2, "ViT-B-32 needs data; pass a folder of class folders"),
        (["--task", "retrieval", "-m", "ViT-B-32"], 2, "ViT-B-32 needs data; pass a .csv"),
        (["--task", "zeroshot", "-m", "ViT-B-33", "--data-dir", "x"], 2, "unknown model 'ViT-B-33'"),
        (["--task", "zeroshot", "-m", "hf:/nowhere", "--data-dir", "x"], 2, "'/nowhere' is no directory"),
        (["--task", "zeroshot", "--data-dir", "/nowhere"], 2, "'/nowhere' does not exist"),
        (["--task", "retrieval", "--data-dir", "/nowhere"], 2, "'/nowhere' does not exist; retrieval reads"),
        (["--task", "zeroshot", "--split", "train"], 2, "'test' and 'validation', not 'train'"),
        (["--task", "zeroshot", "--class-names", "x"], 2, "--class-names goes with the class folders of --data-dir"),
    ],
)
def test_wrong_usage_is_explained(
    flags: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *flags]) == code
    assert message in capsys.readouterr().err
