"""Trials of multimodal models: what is timed, what is counted, and what a row says of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from visiontok.bench import mllm_trial  # noqa: E402
from visiontok.bench.mllm_trial import Cached, MllmSpec, MllmSubject, decode_rate, run_mllm_trial, speed_row  # noqa: E402
from visiontok.bench.results import ResultStore  # noqa: E402
from visiontok.bench.runtime import threads  # noqa: E402
from visiontok.bench.schema import FIELDS, check_row  # noqa: E402
from visiontok.bench.timing import Timing  # noqa: E402
from visiontok.errors import ParameterError  # noqa: E402

FAST = {"num_warm_iter": 1, "num_bench_iter": 3, "new_tokens": 4, "image_size": (64, 64), "batch_size": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def timing_of(name: str, *samples: float) -> Timing:
    return Timing(name, samples, "wall")


def test_decoding_is_what_comes_after_the_first_token() -> None:
    first, whole = timing_of("a", 0.1, 0.1, 0.3), timing_of("b", 0.6, 0.5, 0.9)
    assert decode_rate(first, whole, batch_size=2, new_tokens=6) == pytest.approx(2 * 5 / 0.5)
    assert decode_rate(whole, first, 2, 6) is None


def test_speed_row_compares_first_tokens_and_whole_generations() -> None:
    times = {
        "reference 1": timing_of("r1", 0.2, 0.2, 0.2),
        "reference 5": timing_of("r5", 0.6, 0.6, 0.6),
        "trial 1": timing_of("t1", 0.1, 0.1, 0.1),
        "trial 5": timing_of("t5", 0.3, 0.3, 0.3),
    }
    row = speed_row(times, batch_size=2, new_tokens=5, ideal=4.0)
    assert row["latency_ms_p50"] == pytest.approx(100)
    assert row["reference_ms_p80"] == pytest.approx(200)
    assert (row["speedup"], row["generate_speedup"]) == (pytest.approx(2), pytest.approx(2))
    assert row["speedup_clear"]
    assert row["e_total"] == pytest.approx(0.5)
    assert row["decode_tokens_per_s"] == pytest.approx(2 * 4 / 0.2)
    assert row["reference_decode_tokens_per_s"] == pytest.approx(2 * 4 / 0.4)
    alone = speed_row({name: times[name] for name in ("reference 1", "reference 5")}, 2, 5, 1.0)
    assert "speedup" not in alone
    assert set(row) <= set(FIELDS)


def test_cache_is_counted_by_layer() -> None:
    def layer(length: int) -> Any:
        return SimpleNamespace(keys=torch.zeros(1, 2, length, 8), values=torch.zeros(1, 2, length, 8))

    cache = SimpleNamespace(layers=[layer(10), SimpleNamespace(keys=None), layer(4)])
    found = Cached.of(cache)
    assert found.tokens == [10, 4]
    assert found.megabytes == pytest.approx(2 * 2 * 8 * 14 * 4 / 2**20)


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    spec = MllmSpec("tiny-llava", "vtc_cls", {"keep": 16}, data="questions", max_images=8, threads=1, **FAST)  # pyright: ignore
    return run_mllm_trial(spec)


def test_a_row_holds_what_was_measured(row: dict[str, Any], tmp_path: Any) -> None:
    assert check_row(row) == []
    assert (row["model"], row["role"], row["budget"]) == ("tiny_llava", "reduced", "keep=16")
    # 64 visual tokens and 11 of text, of which 48 go before the language model.
    assert (row["tokens_in"], row["tokens"]) == (75, [27] * 4)
    assert row["kv_mb"] / row["kv_mb_base"] == pytest.approx(27 / 75)
    assert 0 < row["gmacs"] < row["gmacs_base"]
    assert row["ideal_speedup"] == pytest.approx(row["gmacs_base"] / row["gmacs"])
    assert (row["n_questions"], row["n_failed"]) == (8, 0)
    assert row["exact_match_low"] <= row["exact_match"] <= row["exact_match_high"]
    assert (row["batch_size"], row["new_tokens"], row["rounds"]) == (2, 4, 3)
    assert row["generate_ms_p50"] > row["latency_ms_p50"] > 0
    assert row["decode_tokens_per_s"] > 0
    assert row["peak_mem_mb"] is None
    assert "transformers" in row["versions"]
    store = ResultStore(tmp_path)
    store.prepare()
    store.write(row)
    assert store.read(row["trial_key"]) == row


def test_sizes_of_the_model_as_it_is() -> None:
    subject = MllmSubject(MllmSpec("tiny_llava", data="none", threads=1, **FAST))  # pyright: ignore
    sizes = subject.sizes()
    assert subject.model is subject.reference
    assert sizes["tokens"] == [75] * 4
    assert sizes["ideal_speedup"] == 1
    # By hand: linear layers and attention of the tower (65 tokens, 96 wide) and of the decoder (75 tokens).
    tower = 64 * 3 * 64 * 96 + 6 * 65 * (4 * 96**2 + 2 * 96 * 288 + 2 * 65 * 96)
    projector = 64 * 2 * 96**2
    decoder = 4 * 75 * (2 * 96**2 + 2 * 96 * 48 + 3 * 96 * 256 + 2 * 75 * 96)
    head = 75 * 96 * subject.reference.model.config.text_config.vocab_size
    assert sizes["gmacs"] == pytest.approx((tower + projector + decoder + head) / 1e9, rel=0.01)


def test_generations_have_the_length_that_is_timed() -> None:
    subject = MllmSubject(MllmSpec("tiny_llava", data="none", threads=1, **FAST))  # pyright: ignore
    inputs = subject._prompts(subject.reference, 2)
    for length in (1, 4):
        assert subject._generation(subject.reference, inputs, length)().shape == (2, length)


def test_specs_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ParameterError, match="embedded questions are for tiny_llava"):
        MllmSpec("hf:x", data="questions")
    with pytest.raises(ParameterError, match="at least 2 new tokens, got 1"):
        MllmSpec("tiny_llava", new_tokens=1)
    with pytest.raises(ParameterError, match="--torchcompile is not for multimodal models"):
        MllmSpec("tiny_llava", torchcompile="inductor")
    assert MllmSpec("tiny-llava").key == MllmSpec("tiny_llava").key
    assert MllmSpec.from_dict(MllmSpec("tiny_llava").to_dict()) == MllmSpec("tiny_llava")
    assert mllm_trial.QUESTION in {one.text for mine in _all_questions() for one in mine}


def _all_questions() -> Any:
    from visiontok.bench.questions import fixed_questions

    return fixed_questions().questions
