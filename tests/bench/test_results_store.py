"""The trial store: identity of trials, atomic files, schema, exports, clear errors (W3, W5)."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from visiontok.bench.results import ResultStore, StoreError, TrialSpec, to_csv, to_jsonl
from visiontok.bench.schema import COLUMNS, FIELDS, SCHEMA_VERSION, check_row
from visiontok.errors import ParameterError


def row_of(spec: TrialSpec, **values: object) -> dict[str, object]:
    return spec.identity_row() | {"status": "ok"} | values


SPEC = TrialSpec("tiny_vit", "tome", {"r": 4})


def test_key_is_that_of_the_canonical_json() -> None:
    same = TrialSpec("tiny_vit", "tome", {"prop_attn": True, "r": 4})
    assert same.key == TrialSpec("tiny_vit", "tome", {"r": 4, "prop_attn": True}).key
    assert SPEC.key != same.key
    assert SPEC.key != TrialSpec("tiny_vit", "tome", {"r": 4}, seed=1).key
    assert len(SPEC.key) == 64


def test_key_ignores_what_cannot_change_a_result() -> None:
    assert TrialSpec("tiny_vit", workers=4).key == TrialSpec("tiny_vit").key


def test_spec_survives_json() -> None:
    spec = TrialSpec("m", "tome", {"r": {3: 8, 6: 2}}, input_size=(3, 64, 64))
    back = TrialSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert back == spec
    assert back.key == spec.key


@pytest.mark.parametrize("r", [13, (16, -1.0), [8, 8, 0], {3: 8}])
def test_schedules_come_back_with_their_types(r: object) -> None:
    spec = TrialSpec("m", "tome", {"r": r})
    assert TrialSpec.from_dict(json.loads(json.dumps(spec.to_dict()))).arguments() == {"r": r}


def test_spec_refuses_what_is_no_plain_value() -> None:
    with pytest.raises(ParameterError, match="plain JSON values"):
        TrialSpec("m", "tome", {"alpha": float("nan")})
    with pytest.raises(ParameterError, match="without a reducer"):
        TrialSpec("m", None, {"r": 1})
    with pytest.raises(ParameterError, match="unknown key"):
        TrialSpec.from_dict({"model": "m", "class_path": "os.system"})


def test_roles() -> None:
    assert TrialSpec("a").role == "unreduced"
    assert TrialSpec("a", reference="a").role == "unreduced"
    assert TrialSpec("b", reference="a").role == "smaller"
    assert SPEC.role == "reduced"


def test_write_and_read(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results")
    assert store.read(SPEC.key) is None
    store.prepare()
    store.write(row_of(SPEC, top1=97.5, speedup=float("nan")))
    row = store.read(SPEC.key)
    assert row is not None
    assert row["top1"] == 97.5
    assert row["speedup"] is None
    assert [row["trial_key"] for row in store.rows()] == [SPEC.key]
    assert [path.name for path in store.trials.iterdir()] == [f"{SPEC.key}.json"]


def test_leftover_of_a_killed_writer_is_swept(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.prepare()
    (store.trials / f".{SPEC.key}.json.999.tmp").write_text('{"half": ')
    assert store.rows() == []
    store.write(row_of(SPEC))
    assert [path.name for path in store.trials.iterdir()] == [f"{SPEC.key}.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_full_or_read_only_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = ResultStore(tmp_path)
    store.prepare()
    store.write(row_of(SPEC, top1=1.0))

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreError, match=os.strerror(code)) as caught:
        store.write(row_of(SPEC, top1=2.0))
    assert "--results-dir" in str(caught.value)
    row = store.read(SPEC.key)
    assert row is not None
    assert row["top1"] == 1.0
    assert len(list(store.trials.iterdir())) == 1


def test_folder_that_cannot_be_created_is_a_clear_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(StoreError, match="cannot create results in"):
        ResultStore(blocker / "results").prepare()


def test_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.prepare()
    (store.trials / f"{SPEC.key}.json").write_text("{")
    with pytest.raises(StoreError, match="is not JSON"):
        store.read(SPEC.key)
    (store.trials / f"{SPEC.key}.json").write_text("{}")
    with pytest.raises(StoreError, match="does not follow the result schema"):
        store.read(SPEC.key)


def test_schema_names_every_problem() -> None:
    assert check_row(row_of(SPEC, top1=97.5)) == []
    assert check_row([]) == ["a row is an object, got list"]
    broken = row_of(SPEC, top1="97", n_images=True, extra=1, status="fine", role="other")
    problems = " | ".join(check_row(broken))
    for text in (
        "unknown key 'extra'",
        "'top1' is str, expected int or float",
        "'n_images' is bool, expected int",
        "status is 'fine'",
        "role is 'other'",
    ):
        assert text in problems
    assert check_row(row_of(SPEC) | {"status": "oom"}) == ["a failed row needs 'error'"]
    assert f"this visiontok reads {SCHEMA_VERSION}" in check_row(row_of(SPEC, schema_version=99))[0]


def test_broken_row_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="refusing to store"):
        ResultStore(tmp_path).write(row_of(SPEC, top1="97"))


def test_csv_has_all_columns_in_order_whatever_the_rows() -> None:
    lines = to_csv([row_of(SPEC, top1=97.5), row_of(TrialSpec("a,b"))]).splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert len(lines) == 3
    assert '"a,b"' in lines[2]
    assert COLUMNS[:6] == ("schema_version", "trial_key", "status", "error", "role", "model")
    assert all(field.meaning for field in FIELDS.values())


def test_jsonl_has_one_object_per_line() -> None:
    lines = to_jsonl([row_of(SPEC, error="two\nlines")] * 2).splitlines()
    assert [json.loads(line)["error"] for line in lines] == ["two\nlines"] * 2
