"""The classify demo: through its API, through a browser, and against files that it must not serve."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("timm")
pytest.importorskip("sklearn")

import visiontok
from visiontok import demo
from visiontok.errors import UnknownNameError

ROOT = Path(visiontok.__file__).parents[1]


@pytest.fixture(scope="module")
def classify() -> Any:
    module = demo.load("classify")
    module.TIMING_SECONDS = 0.3
    return module


@pytest.fixture(scope="module")
def address(classify: Any) -> Iterator[str]:
    blocks = demo.launch("classify", block=False, quiet=True)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False)


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    from visiontok.models.tiny import digits_split

    path = tmp_path / "digit.png"
    digits_split().image(3).save(path)
    return path


def test_demos_are_found_and_unknown_names_refused() -> None:
    assert "classify" in demo.names()
    assert "app" not in demo.names()
    with pytest.raises(UnknownNameError, match="unknown demo 'clasify'. Did you mean 'classify'?"):
        demo.load("clasify")
    for name in ("../evil", "/etc/passwd", "_private"):
        with pytest.raises(UnknownNameError):
            demo.load(name)


def test_looking_for_demos_imports_nothing_heavy() -> None:
    code = "import sys; from visiontok import demo; demo.names(); print({'torch', 'gradio', 'timm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("name", ["classify", "app"])
def test_build_returns_blocks_and_launches_nothing(name: str) -> None:
    import gradio as gr

    blocks = demo.load(name).build()
    assert isinstance(blocks, gr.Blocks)
    assert not blocks.is_running


def test_offered_reducers_come_from_the_registry(classify: Any) -> None:
    assert (
        {"identity", "pitome", "random", "tome"} <= set(classify.fitting_reducers()) <= set(visiontok.list_reducers())
    )


def test_reducers_that_need_training_are_offered_last_and_labelled(classify: Any) -> None:
    choices = classify._choices(classify.fitting_reducers())
    names = [name for _, name in choices]
    free = [visiontok.describe(name).training_free for name in names]
    assert sorted(names) == sorted(classify.fitting_reducers())
    assert free == sorted(free, reverse=True)
    assert not all(free)
    assert [label for label, _ in choices] == [f"{n}{'' if f else ' (needs training)'}" for n, f in zip(names, free)]
    assert "random" in classify.describe("sit")
    assert "random" not in classify.describe("tome")


def predict(
    client: Any, image: Path | str | None, model: str = "tiny_vit", reducer: str = "tome", **options: Any
) -> Any:
    from gradio_client import handle_file

    values = {"keep": 0.9, "pretrained": False, "style": "mean color", "batch_size": 8, **options}
    file = None if image is None else handle_file(str(image))
    return client.predict(file, model, reducer, *values.values(), api_name="/reduce")


@pytest.mark.parametrize("style", ["mean color", "colored groups", "kept share"])
def test_api_answers_with_maps_classes_and_numbers(client: Any, digit: Path, style: str) -> None:
    pair, gallery, before, after, summary, details = predict(client, digit, style=style)
    assert [Image.open(path).size for path in pair] == [(256, 256)] * 2
    assert [item["caption"] for item in gallery][:2] == ["input: 65 tokens", "layer 0: 59 tokens"]
    assert len(gallery) == 13
    assert len(before["confidences"]) == len(after["confidences"]) == 5
    assert details["tokens"] == [59, 54, 49, 45, 41, 37, 34, 31, 28, 26, 24, 22]
    assert 0.5 < details["gmacs_after"] / details["gmacs_before"] < 0.6
    low, high = details["speedup_interval"]
    assert details["speedup"] is None or low <= details["speedup"] <= high
    assert ("not distinguishable" in summary) == (details["speedup"] is None)
    assert "43 % less" in summary


def test_keeping_everything_says_so(client: Any, digit: Path) -> None:
    _, gallery, before, after, summary, details = predict(client, digit, keep=1.0)
    assert [item["caption"] for item in gallery] == ["input: 65 tokens, none removed"]
    assert before == after
    assert "same answer" in summary
    assert details["gmacs_before"] == details["gmacs_after"]


def test_untrained_parts_and_adaptive_counts_are_told(client: Any, digit: Path) -> None:
    *_, summary, _ = predict(client, digit, reducer="clca", keep=0.6)
    assert "learned parts" in summary
    assert "-" not in summary.split("GMACs per picture")[1].split("%")[0]
    _, gallery, *_, summary, details = predict(client, digit, reducer="ats", keep=0.6)
    assert "its own number of tokens" in summary
    assert len(gallery) > 2
    assert "learned parts" not in summary
    assert predict(client, digit, reducer="expedite", keep=0.4)[1][-1]["caption"] == "layer 6: 26 tokens, span"


def test_random_weights_are_called_random(client: Any, digit: Path) -> None:
    *_, summary, details = predict(client, digit, "vit_tiny_patch16_224", "random", batch_size=1)
    assert details["random_weights"]
    assert "classes mean nothing" in summary


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": None}, "Choose a picture first"),
        ({"model": "deit_smal_patch16_224"}, "unknown model 'deit_smal_patch16_224'. Did you mean"),
        ({"model": "resnet18"}, "resnet18|ResNet"),
        ({"model": "vit_small_patch14_dinov2"}, "no classifier"),
        ({"keep": 2.0}, "maximum"),
        ({"reducer": "tofuu"}, "not in the list of choices"),
    ],
)
def test_mistakes_are_told_to_the_user(client: Any, digit: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        predict(client, **{"image": digit, **options})


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_truncated_uploads_are_refused_in_words(client: Any, tmp_path: Path, share: float) -> None:
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 80).save(whole)
    cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with pytest.raises(Exception, match="The picture cannot be read"):
        predict(client, cut)


def test_only_uploaded_files_are_read(address: str, digit: Path) -> None:
    data = [{"path": str(digit), "meta": {"_type": "gradio.FileData"}}, "tiny_vit", "tome", 0.9, False, "mean color", 1]
    call = f"{address}gradio_api/call/reduce"
    request = urllib.request.Request(call, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    answer = urllib.request.urlopen(f"{call}/{event}").read().decode()
    assert "event: error" in answer
    assert "event: complete" not in answer


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "pyproject.toml"), str(ROOT / "visiontok" / "errors.py")])
def test_other_files_are_not_served(address: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{address}gradio_api/file={path}")
    assert error.value.code in (403, 404)


def test_huge_uploads_are_refused(client: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(21 << 20))
    with pytest.raises(Exception, match="413|size|large"):
        predict(client, large)


@pytest.mark.browser
def test_page_reduces_an_uploaded_picture(address: str, watched: Any, digit: Path, tmp_path: Path) -> None:
    page = watched.page
    page.goto(address)
    button = page.get_by_role("button", name="Reduce", exact=True)
    button.click()
    toast = page.locator("[data-testid=toast-body]")
    toast.wait_for()
    assert "Choose a picture first" in toast.inner_text()
    assert page.title() == "visiontok: classify with fewer tokens"

    page.locator("input[type=file]").first.set_input_files(digit)
    page.locator("img[alt=''][src*='digit'], img[src*='digit.png']").first.wait_for()
    button.click()
    page.get_by_text("GMACs per picture").wait_for()
    assert page.locator(".layers img").count() == 13
    assert page.locator(".slider-wrap img").count() == 2
    page.get_by_role("button", name="Details").click()
    page.get_by_text("ideal_speedup").wait_for()
    page.screenshot(path=tmp_path / "classify.png", full_page=True)
    assert watched.errors == []
    assert watched.external(address) == []


@pytest.mark.browser
def test_example_sets_picture_and_model(address: str, watched: Any) -> None:
    page = watched.page
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(address)
    page.locator(".gallery-item").nth(4).click()
    page.locator("img[src*='china']").nth(1).wait_for()
    assert page.get_by_label("Model").first.input_value() == "deit_small_patch16_224"
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert watched.errors == []
    assert watched.external(address) == []
