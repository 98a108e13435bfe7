"""`visiontok eval --task vqa` and `visiontok bench` of multimodal models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from visiontok.bench import questions  # noqa: E402
from visiontok.bench.runtime import threads  # noqa: E402
from visiontok.cli import main  # noqa: E402

REDUCED = ["--reducer", "vtc_cls", "--keep", "16"]
TIMED = ["--threads", "1", "--num-warm-iter", "1", "--num-bench-iter", "2", "--new-tokens", "3", "--img-size", "64"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first eight scenes with their questions, and one image that is broken."""
    root, found = tmp_path_factory.mktemp("vqa"), questions.fixed_questions()
    lines = []
    for row in range(8):
        found.image(row).save(root / f"{row}.png")
        one = found.questions[row][0]
        lines.append(json.dumps({"image": f"{row}.png", "question": one.text, "answers": ["?", one.answer.upper()]}))
    (root / "broken.png").write_bytes(b"no image")
    lines.append(json.dumps({"image": "broken.png", "question": "where is the one?", "answers": "left"}))
    (root / "questions.jsonl").write_text("\n".join(lines))
    return root / "questions.jsonl"


def test_vqa_of_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--task", "vqa", "-m", "tiny-llava", *REDUCED, "--max-images", "12"]) == 0
    text = capsys.readouterr().out
    assert "tiny_llava vtc_cls keep=16" in text
    assert "12 answered, 0 images unreadable" in text
    assert "75 -> 27 tokens (layer average 27.0)" in text
    assert "McNemar" in text
    found = json.loads(text.splitlines()[-1])
    assert (found["n_questions"], found["spec"]["data"], found["tokens_out"]) == (12, "questions", 27)


def test_vqa_of_a_file_counts_broken_images(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--task", "vqa", "-m", "tiny-llava", "--data-dir", str(file)]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "8 answered, 1 images unreadable" in captured.out
    assert "broken.png" in captured.err
    assert main([*command, "--max-failed", "1", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["n_questions"], found["n_failed"]) == (8, 1)


def test_bench_of_the_embedded_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "row.csv"
    assert main(["bench", "-m", "tiny-llava", *REDUCED, *TIMED, "--results-file", str(file)]) == 0
    text = capsys.readouterr().out
    for part in ("first token", "reduced", "speed-up", "tokens/s", "3 tokens", "batch 1"):
        assert part in text
    assert "decode_tokens_per_s" in file.read_text().splitlines()[0]
    found = json.loads(text.splitlines()[-1])
    assert (found["rounds"], found["new_tokens"], found["batch_size"]) == (2, 3, 1)


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["eval", "--task", "vqa"], ["bench", "-m", "tiny-llava"]):
        assert main([*command, *REDUCED, "--dry-run"]) == 0
        assert "64 -> 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["eval", "--task", "vqa", "--data-dir", "no.jsonl"], 2, "'no.jsonl' does not exist"),
        (["eval", "--task", "vqa", "-m", "hf:no"], 2, "needs questions"),
        (["eval", "--task", "vqa", "-m", "hf:no", "--data-dir", "x"], 2, "nothing is downloaded"),
        (["eval", "--task", "vqa", "-m", "tiny_vit", "--data-dir", "x"], 2, "unknown multimodal model 'tiny_vit'"),
        (["eval", "--task", "vqa", "--tower", "text"], 2, "--tower is for --task zeroshot or retrieval"),
        (["eval", "--task", "vqa", "--pretrained"], 2, "--pretrained is not for multimodal models"),
        (["eval", "--task", "vqa", "--reducer", "vtc_clss"], 2, "vtc_cls"),
        (["bench", "--new-tokens", "3"], 2, "--new-tokens is for multimodal models"),
        (["bench", "-m", "tiny-llava", "--new-tokens", "1"], 2, "at least 2 new tokens"),
    ],
)
def test_what_means_nothing_is_refused(
    command: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == code
    assert message in capsys.readouterr().err
