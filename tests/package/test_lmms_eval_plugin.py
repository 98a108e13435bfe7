"""The lmms-eval plugin, called as lmms-eval 0.7.3 calls one."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import lmms_eval_stub as stub  # noqa: E402

from visiontok import lmms_eval_plugin as plugin  # noqa: E402
from visiontok.bench import questions  # noqa: E402
from visiontok.bench.runtime import threads  # noqa: E402
from visiontok.errors import IncompatibleError, MissingDependencyError, ParameterError, UnknownNameError  # noqa: E402
from visiontok.models.tiny_llava import tiny_llava, tiny_processor  # noqa: E402

SHORT = {"max_new_tokens": 3, "until": ["\n\n"]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_llava().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    found = questions.fixed_questions()
    return [{"image": found.image(row), "question": found.questions[row][0].text} for row in range(5)]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    plugin._build.cache_clear()
    if importlib.util.find_spec("lmms_eval") is None:
        found: Any = stub.install(monkeypatch)
        found.load_payload(plugin.manifests)
    else:
        from lmms_eval.models.registry_v2 import ModelRegistryV2  # pyright: ignore[reportMissingImports]

        found = ModelRegistryV2()
        found.register_manifest(plugin.manifests())
    yield found
    plugin._build.cache_clear()


def built(registry: Any, folder: Path, documents: Any, extra: str = "", simple: bool = True, batch: int = 1) -> Any:
    arguments = f"pretrained={folder},dtype=float32" + (f",{extra}" if extra else "")
    more = {"batch_size": batch, "max_batch_size": None, "device": "cpu"}
    model = registry.get_model_class(plugin.MODEL_ID, force_simple=simple).create_from_arg_string(arguments, more)
    model.task_dict = {"t": {"test": documents}}
    return model


def request(kind: str, arguments: tuple, number: int) -> Any:
    from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return Instance(kind, (*arguments, number, "t", "test"), 0, {"task": "t", "doc_id": number, "repeats": 1})


def asked(documents: Any, options: dict[str, Any] = SHORT, simple: bool = True) -> list[Any]:
    def messages(document: Any) -> list[dict[str, Any]]:
        parts = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
        return [{"role": "user", "content": parts}]

    return [
        request(
            "generate_until",
            (one["question"], dict(options), lambda document: [document["image"]])
            if simple
            else (one["question"], messages, dict(options)),
            number,
        )
        for number, one in enumerate(documents)
    ]


def test_entry_point_names_the_manifests() -> None:
    text = (Path(plugin.__file__).parent.parent / "pyproject.toml").read_text()
    group = text.split('[project.entry-points."lmms_eval.models"]')[1]
    name, target = re.findall(r'(\w+) = "([\w.:]+)"', group)[0]
    assert (name, target) == (plugin.MODEL_ID, f"{plugin.__name__}:manifests")


def test_nothing_of_lmms_eval_is_needed_to_import_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin._build.cache_clear()
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    with pytest.raises(MissingDependencyError, match=r"visiontok\[eval\]"):
        plugin.VisiontokLlavaHf  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        plugin.Nothing  # noqa: B018


def test_both_kinds_of_requests_give_the_models_own_answers(registry: Any, folder: Path, documents: Any) -> None:
    from visiontok.bench import mllm_models, vqa

    own = mllm_models.load(f"hf:{folder}")
    items = [vqa.Item(one["image"], one["question"], ("",)) for one in documents]
    expected = list(vqa.answer(own, items, 1, max_new_tokens=3).texts)
    for simple in (True, False):
        model = built(registry, folder, documents, simple=simple, batch=2)
        requests = asked(documents, simple=simple)
        found = model.generate_until(requests)
        assert [one.text for one in found] == expected
        assert {one.token_counts.input_tokens for one in found} <= {73, 74, 75}
        assert all(0 < one.token_counts.output_tokens <= 3 for one in found)
        # lmms-eval keeps the arguments for its records.
        assert requests[0].args[1 if simple else 2] == SHORT
        model.clean()
        assert not hasattr(model, "mllm")


def test_reducer_and_budget_come_from_the_model_args(registry: Any, folder: Path, documents: Any) -> None:
    model = built(registry, folder, documents, "reducer=vtc_cls,keep=16")
    assert (model.rank, model.world_size) == (0, 1)
    assert "64 -> 16" in str(model.reduction.plan)
    plain = built(registry, folder, documents)
    inputs = plain._encode(["USER: <image>\nwhere is the nine? ASSISTANT:"], [[documents[0]["image"]]])
    with torch.inference_mode():
        cached = [one.mllm.model(**inputs, use_cache=True).past_key_values.get_seq_length() for one in (plain, model)]
    assert cached[0] - cached[1] == 48
    assert len(model.generate_until(asked(documents))) == len(documents)


@pytest.mark.parametrize("extra", ["", "reducer=vtc_cls,keep=16"])
def test_loglikelihood_is_the_loss_of_the_continuation(registry: Any, folder: Path, documents: Any, extra: str) -> None:
    """Against a product of probabilities, from forwards that each end where the next token is asked for."""
    model = built(registry, folder, documents, extra)
    one = request("loglikelihood", (documents[0]["question"], " top left", lambda d: [d["image"]]), 0)
    ((loss, greedy),) = model.loglikelihood([one])
    tokenizer, total, best = model.mllm.processor.tokenizer, 0.0, []
    prompt = f"USER: <image>\n{documents[0]['question']} ASSISTANT:"
    for word in ("top", "left"):
        inputs = model._encode([prompt], [[documents[0]["image"]]])
        with torch.inference_mode():
            logits = model.mllm.model(**inputs).logits[0, -1]
        total -= logits.log_softmax(0)[tokenizer.convert_tokens_to_ids(word)].item()
        best.append(tokenizer.convert_ids_to_tokens(int(logits.argmax())))
        prompt += f" {word}"
    assert loss == pytest.approx(total / 2, abs=1e-4)
    assert greedy is (best == ["top", "left"])


def test_requests_are_grouped_by_their_options_and_answered_in_order(
    registry: Any, folder: Path, documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(registry, folder, documents, batch=2)
    lengths = []
    generate = type(model.mllm).generate

    def noted(self: Any, inputs: Any, **options: Any) -> Any:
        lengths.append((len(inputs["input_ids"]), options["max_new_tokens"]))
        return generate(self, inputs, **options)

    monkeypatch.setattr(type(model.mllm), "generate", noted)
    requests = asked(documents)
    requests[1].args[1]["max_new_tokens"] = 1
    found = model.generate_until(requests)
    assert lengths == [(2, 3), (2, 3), (1, 1)]
    assert found[1].token_counts.output_tokens == 1
    alone = built(registry, folder, documents)
    assert [one.text for one in found] == [alone.generate_until([one])[0].text for one in requests]


def test_images_stand_where_the_context_says() -> None:
    image = {"type": "image"}
    assert plugin._content("what?", [1])[0]["content"] == [image, {"type": "text", "text": "what?"}]
    parts = plugin._content("a <image>\nb <image> c", [1, 2])[0]["content"]
    assert parts == [
        {"type": "text", "text": "a "},
        image,
        {"type": "text", "text": "b "},
        image,
        {"type": "text", "text": " c"},
    ]
    assert plugin._content("a <image> b", [1, 2])[0]["content"] == [image, image, {"type": "text", "text": "a  b"}]
    assert plugin._content("what?", [])[0]["content"] == [{"type": "text", "text": "what?"}]


def test_generation_options_are_translated() -> None:
    assert plugin._generation({}) == {"max_new_tokens": 1024}
    given = {"temperature": 0, "top_p": None, "num_beams": 2, "max_new_tokens": 8, "until": ["x"]}
    assert plugin._generation(given) == {"max_new_tokens": 8, "num_beams": 2}
    assert plugin._generation({"temperature": 0.5})["do_sample"] is True
    assert plugin._cut("a b\n\nc.d", ["\n\n", ".", ""]) == "a b"
    assert plugin._cut("a b", "b") == "a "
    assert plugin._cut("a b", None) == "a b"


def test_what_cannot_be_run_is_refused(registry: Any, folder: Path, documents: Any) -> None:
    with pytest.raises(ParameterError, match="model_args keep need a reducer"):
        built(registry, folder, documents, "keep=16")
    with pytest.raises(UnknownNameError, match="no parameter 'colour'"):
        built(registry, folder, documents, "reducer=vtc_cls,keep=16,colour=red")
    model = built(registry, folder, documents)
    with pytest.raises(IncompatibleError, match="several rounds"):
        model.generate_until_multi_round([])
    video = request("generate_until", ("what?", SHORT, lambda document: ["film.mp4"]), 0)
    with pytest.raises(IncompatibleError, match="PIL images only, got str"):
        model.generate_until([video])
