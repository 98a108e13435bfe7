"""The commands on the embedded model: what they print, write and return."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from visiontok.bench.runtime import threads
from visiontok.bench.schema import COLUMNS, check_row
from visiontok.cli import main

pytest.importorskip("timm")
pytest.importorskip("sklearn")

QUICK_BENCH = ["--num-warm-iter", "1", "--num-bench-iter", "2", "-b", "4", "--threads", "1"]


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "--result"
    return json.loads(lines[-1])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two workers of a test run on two cores do not wait for each other's threads."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty test digits as PNG files in class folders."""
    from visiontok.models.tiny import digits_split

    split, root = digits_split(), tmp_path_factory.mktemp("scans")
    wanted = dict.fromkeys(range(10), 3)
    for index, label in enumerate(split.test_labels.tolist()):
        if wanted[label]:
            wanted[label] -= 1
            folder = root / split.class_names[label]
            folder.mkdir(exist_ok=True)
            split.image(index).save(folder / f"{index}.png")
    return root


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json", "tome"]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert (card["name"], card["site"], card["training_free"]) == ("tome", "MID", True)
    assert main(["list", "backbones"]) == 0
    assert "timm_vit" in capsys.readouterr().out.split()
    assert main(["list", "models", "tiny_vit*"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["tiny_vit", "tiny_vit_small_dense"]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "pitome"]) == 0
    assert "arxiv.org/abs/2405.16148" in capsys.readouterr().out
    assert main(["info", "tome", "-m", "tiny_vit", "--r", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"][-1] == 17
    assert main(["info", "-m", "tiny_vit", "--reducer", "tome", "--r", "(8, -1.0)"]) == 0
    assert "65 -> 49" in capsys.readouterr().out
    assert main(["info", "-m", "tiny_vit"]) == 0
    assert "tome" in capsys.readouterr().out


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--reducer", "tome", "--r", "4", *QUICK_BENCH]) == 0
    text = capsys.readouterr().out
    assert "E_total" in text
    row = json.loads(text.splitlines()[-1])
    assert check_row(row) == []
    assert (row["rounds"], row.get("top1")) == (2, None)


def test_bench_quietly_prints_only_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--quiet", *QUICK_BENCH]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("--result\n")
    assert len(captured.out.splitlines()) == 2
    assert captured.err == ""


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "eval"):
        assert main([command, "--reducer", "tome", "--r", "4", "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert "65 -> 61" in text
        assert "--result" not in text


def test_launch_bound_is_said() -> None:
    from visiontok.cli.bench_command import describe

    times = {f"{name}_ms_{q}": 1.0 for name in ("latency", "reference") for q in ("p20", "p50", "p80")}
    row = times | {
        "model": "m", "role": "unreduced", "clock": "cuda", "device": "cuda", "threads": 1, "dtype": "float32",
        "batch_size": 1, "rounds": 2, "gmacs_base": 1.0, "launch_bound": True,
    }  # fmt: skip
    assert "launch-bound" in describe(row)
    assert "launch-bound" not in describe(row | {"launch_bound": False})


def test_eval_on_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--reducer", "pitome", "--keep", "0.95", "--max-images", "40", "--quiet"]) == 0
    row = result(capsys)
    assert check_row(row) == []
    assert (row["n_images"], row["n_failed"], row["spec"]["timing"]) == (40, 0, False)


def test_eval_of_a_folder_sees_what_the_split_sees(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--reducer", "tome", "--r", "2", "--data-dir", str(scans), "--quiet"]) == 0
    row = result(capsys)
    assert row["n_images"] == 30
    assert row["top1"] >= 80


def test_unreadable_images_fail_the_run_unless_accepted(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in scans.iterdir():
        (tmp_path / "data" / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            (tmp_path / "data" / folder.name / path.name).write_bytes(path.read_bytes())
    whole = sorted((tmp_path / "data" / "3").iterdir())[0]
    whole.write_bytes(whole.read_bytes()[:60])
    (tmp_path / "data" / "7" / "empty.png").touch()
    command = ["eval", "--reducer", "tome", "--r", "2", "--data-dir", str(tmp_path / "data"), "--quiet"]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert f"unreadable: {whole}: " in captured.err
    assert "empty.png: empty file" in captured.err
    assert "2 unreadable image(s), --max-failed is 0" in captured.err
    row = json.loads(captured.out.splitlines()[-1])
    assert (row["n_images"], row["n_failed"]) == (29, 2)
    assert [Path(image["path"]).name for image in row["failed_images"]] == [whole.name, "empty.png"]
    assert main([*command, "--max-failed", "2"]) == 0


def test_eval_with_a_recipe_prints_what_was_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nmethod: tome\nfields: {prop_attn: false}\nschedule: {r: 3}\nmodel: tiny_vit\ndataset: digits\n"
        "expected: {top1: 97.1, source: 'nowhere'}\n"
    )
    assert main(["eval", "--recipe", str(recipe), "--max-images", "20"]) == 0
    text = capsys.readouterr().out
    assert "top-1 97.1 (nowhere)" in text
    row = json.loads(text.splitlines()[-1])
    assert row["params"] == {"prop_attn": False, "r": 3}
    assert main(["eval", "--recipe", str(recipe), "-m", "tiny_vit_small_dense", "--max-images", "20"]) == 0
    assert "of tiny_vit: top-1 97.1 (nowhere)" in capsys.readouterr().out
    assert main(["eval", "--recipe", str(recipe), "--keep", "0.9", "--max-images", "20", "--quiet"]) == 0
    assert result(capsys)["params"] == {"prop_attn": False, "keep": 0.9}


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_results_file(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / f"row.{kind}"
    assert main(["eval", "--max-images", "10", "--quiet", "--results-file", str(path)]) == 0
    row = result(capsys)
    if kind == "csv":
        (stored,) = csv.DictReader(path.open())
        assert tuple(stored) == COLUMNS
        assert stored["n_images"] == "10"
    else:
        assert json.loads(path.read_text()) == row
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_results_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["eval", "--max-images", "10", "--quiet", "--results-file", str(tmp_path / "file" / "row.json")]) == 1
    assert "cannot write results in" in capsys.readouterr().err


def test_viz(tmp_path: Path, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [str(path) for path in sorted((scans / "5").iterdir())[:2]]
    out = tmp_path / "maps" / "tokens.png"
    assert main(["viz", *images, "--reducer", "tome", "--r", "4", "-o", str(out)]) == 0
    found = result(capsys)
    assert found["files"] == [str(out), str(out.with_name("tokens_2.png"))]
    strip = Image.open(out)
    assert main(["viz", "--last", "--style", "label", "--quiet", "-o", str(out)]) == 0
    assert Image.open(out).width < strip.width


def test_viz_of_tokens_that_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "joined.png"
    command = ["viz", "--reducer", "clca", "--set", "inner=evit", "--keep", "0.7", "-o", str(out)]
    assert [main(command), main([*command, "--last"])] == [0, 0]
    assert Image.open(out).size == (256, 256)


def test_viz_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", "--reducer", "identity", "-o", str(tmp_path / "out.png")]) == 2
    assert "identity moved no token" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_warnings_are_one_line_and_end_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    assert main(["info", "-m", "tiny_vit", "--reducer", "evit"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("visiontok info: warning: evit was patched without a budget")
    assert warnings.showwarning is before


def test_sweep_refuses_a_misspelt_method_before_it_runs_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--reducer", "tome", "pitomee", "--results-dir", str(tmp_path / "out")]) == 2
    assert "unknown reducer 'pitomee'. Did you mean 'pitome'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_viz_of_an_unreadable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.png").touch()
    assert main(["viz", str(tmp_path / "bad.png"), "-o", str(tmp_path / "out.png")]) == 2
    assert capsys.readouterr().err == f"visiontok viz: error: {tmp_path}/bad.png: empty file\n"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"versions", "machine", "accelerators", "kernels", "storage"}
    assert report["kernels"]
    assert main(["doctor"]) == 0
    assert "torch threads" in capsys.readouterr().out


def test_demos_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    assert "classify" in capsys.readouterr().out.split()
