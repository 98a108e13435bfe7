"""`visiontok train` on the embedded model: what it prints, writes and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from visiontok.bench.runtime import threads
from visiontok.cli import main

pytest.importorskip("timm")
pytest.importorskip("sklearn")

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ["--epochs", "1", "--max-images", "64", "--lr", "1e-4"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two workers of a test run on two cores do not wait for each other's threads."""
    with threads(1):
        yield


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "--result"
    return json.loads(lines[-1])


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files: 64 to train on, 20 held out."""
    from visiontok.models.tiny import digits_split

    split, root = digits_split(), tmp_path_factory.mktemp("scans")
    for part, labels, count in (("train", split.train_labels, 64), ("val", split.test_labels, 20)):
        for index in range(count):
            folder = root / part / split.class_names[int(labels[index])]
            folder.mkdir(parents=True, exist_ok=True)
            split.image(index, "train" if part == "train" else "test").save(folder / f"{index}.png")
    for name in split.class_names:
        (root / "val" / name).mkdir(exist_ok=True)
    return root


def test_train_then_eval(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "run", ["--data-dir", str(scans)]
    command = ["train", "--reducer", "tome", "--r", "4", *SHORT, *data, "--output", str(out), "--log-every", "1"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "top-1" in captured.out
    assert captured.err == ""
    row = json.loads(captured.out.splitlines()[-1])
    assert (row["reducer"], row["params"], row["epochs"]) == ("tome", {"r": 4}, 1)
    assert row["top1"] >= 90
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in log] == ["start", "train", "train", "epoch"]
    assert log[-1]["top1"] == row["top1"]
    assert main(command) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert main([*command, "--quiet", "--resume"]) == 0
    assert result(capsys) == row
    weights = ["--checkpoint", str(out / "model.safetensors")]
    assert main(["eval", "--reducer", "tome", "--r", "4", "--quiet", *weights, *data]) == 0
    assert result(capsys)["top1"] == row["top1"]


def test_a_learned_reducer_is_evaluated_with_what_it_learned(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("visiontok.reducers.sit")
    recipe, data = str(CONFIGS / "sit" / "tiny_digits.yaml"), ["--data-dir", str(scans)]
    short = ["--epochs", "2", "--warmup-epochs", "0"]
    assert main(["train", "--recipe", recipe, *short, *data, "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "loss_token" in text
    assert "published" in text
    row = json.loads(text.splitlines()[-1])
    weights = ["--checkpoint", str(tmp_path / "model.safetensors")]
    assert main(["eval", "--recipe", recipe, *weights, *data]) == 0
    text = capsys.readouterr().out
    assert "published" in text
    assert json.loads(text.splitlines()[-1])["top1"] == row["top1"]


def test_unreadable_images(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(scans, tmp_path / "data")
    next((tmp_path / "data" / "train" / "3").iterdir()).write_bytes(b"GIF")
    command = ["train", "--reducer", "tome", "--r", "4", *SHORT, "--data-dir", str(tmp_path / "data"), "--quiet"]
    assert main(command) == 1
    assert "1 unreadable image(s), max_failed is 0" in capsys.readouterr().err
    assert main([*command, "--max-failed", "1", "--distill", "logits"]) == 0
    assert {"loss_cls", "loss_logits"} <= set(result(capsys))


def test_flags_win_over_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nmethod: tome\nschedule: {r: 3}\nmodel: tiny_vit\ndataset: digits\nexpected: {source: here}\n"
        "train: {epochs: 7, lr: 0.25, amp: true, model_ema: true}\n"
    )
    given = ["--lr", "0.5", "--no-amp", "--keep", "0.9", "--no-aug"]
    assert main(["train", "--recipe", str(recipe), "--dry-run", *given]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert {name: shown[name] for name in ("epochs", "lr", "amp", "model_ema", "params", "augment", "reducer")} == {
        "epochs": "7", "lr": "0.5", "amp": "False", "model_ema": "True", "params": "{'keep': 0.9}", "augment": "False",
        "reducer": "tome",
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_train_sections_are_valid(path: Path) -> None:
    from visiontok.core.recipe import load_recipe
    from visiontok.training.config import TrainConfig

    recipe = load_recipe(path)
    if recipe.train is not None:
        assert TrainConfig.from_recipe(recipe).epochs > 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--lr", "0"], 2, "lr must be a number above 0"),
        (["--epochs", "0"], 2, "at least 1"),
        (["--lr", "fast"], 2, "invalid float value"),
        (["--distill", "cnn"], 2, "distill must be one of none, logits, frd"),
        (["--distill", "frd"], 2, "give a reducer"),
        (["-m", "vit_tiny_patch16_224"], 2, "needs images; pass a folder"),
        (["-m", "resnet18", "--data-dir", "gone"], 2, "data folder 'gone' does not exist"),
        (["-m", "resnet18", "--data-dir", "digits", "--reducer", "tome", "--r", "1"], 3, "nothing was patched"),
        (["-m", "vit_tiny_patch16_224", "--data-dir", "digits"], 2, "the embedded digits are (3, 32, 32) images"),
        (["--recipe", "RECIPE"], 2, "has no 'train' section"),
        (["--resume"], 2, "give --output"),
        (["--resume", "gone.pt"], 2, "checkpoint 'gone.pt' does not exist"),
        (["--reducer", "tome", "--r", "2", "--opt", "adamm"], 2, "timm cannot build the optimizer 'adamm'"),
        (["--output", "/dev/null/run"], 1, "cannot write in '/dev/null/run'"),
    ],
)
def test_errors(arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(CONFIGS / "tome" / "deit_small_patch16_224.yaml")
    given = [recipe if word == "RECIPE" else word for word in arguments]
    data = ["--data-dir", "digits"] if "RECIPE" in arguments else []
    assert main(["train", *given, *data]) == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err
    assert err.startswith(("visiontok train: error: ", "usage: "))


def test_divergence_is_a_failed_run(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--lr", "1e30", "--opt", "momentum", "--sched", "none", "--epochs", "1", "--max-images", "96"]
    assert main([*command, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("visiontok train: error: the loss is not finite at epoch 0, update ")
    assert "try a lower --lr" in err
    assert len(err.splitlines()) == 1
