"""Recipes: strict, bounded, safe, and the shipped ones all load (S3, S4, S8)."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visiontok.core.recipe import MAX_BYTES, load_recipe, parse_recipe
from visiontok.errors import VisionTokError

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = """
schema: 1
method: tome
fields: {prop_attn: true}
schedule: {r: 13}
model: deit_small_patch16_224
dataset: imagenet-1k
expected: {top1: 79.4, gflops: 2.7, source: "a table"}
"""


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_recipes_load_and_build(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.method == path.parent.name
    assert recipe.expected.source
    assert recipe.reducer().name == recipe.method


def test_good_recipe() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.params == {"prop_attn": True, "r": 13}
    assert (recipe.expected.top1, recipe.expected.gflops) == (79.4, 2.7)


def test_schedules_keep_their_types() -> None:
    assert parse_recipe(GOOD.replace("{r: 13}", "{r: '(16, -1.0)'}")).schedule == {"r": (16, -1.0)}
    assert parse_recipe(GOOD.replace("{r: 13}", "{keep: {3: 0.5}}")).schedule == {"keep": {3: 0.5}}


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("schema: 1", "schema: 2", "schema 2 is not supported"),
        ("schema: 1", "schema: true", "schema must be int"),
        ("method: tome", "method: tomee", "unknown reducer 'tomee'.*Did you mean 'tome'"),
        ("method: tome", "method: os.system", "unknown reducer 'os.system'"),
        ("method: tome", "method: !!python/name:os.system", "could not determine a constructor"),
        ("method: tome", "method: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("method: tome", "method: [tome]", r"method must be str, got \['tome'\]"),
        ("fields:", "field:", "a recipe has no key 'field'. Did you mean 'fields'?"),
        ("{prop_attn: true}", "{r: 1}", "the budget 'r' belongs under schedule"),
        ("{prop_attn: true}", "{prop_attn: .nan}", "fields.prop_attn holds nan"),
        ("{prop_attn: true}", "{prop_attn: 2020-01-01}", "fields.prop_attn holds"),
        ("{prop_attn: true}", "{1: 2}", "keyed by parameter names"),
        ("{r: 13}", "{r: 13, keep: 0.5}", "schedule holds one of"),
        ("{r: 13}", "{rr: 13}", "schedule has no key 'rr'"),
        ("{r: 13}", "{r: '__import__(1)'}", "cannot read budget"),
        ("dataset: imagenet-1k", "", "a recipe needs dataset"),
        ('source: "a table"', 'source: " "', "expected needs a source"),
        ("top1: 79.4", "top1: -1", "expected.top1 must be a positive number"),
        ("model: deit", "model: &a deit\ndataset: *a\nx: deit", "aliases"),
        ("model: deit", "schema: 1\nmodel: deit", "key 'schema' appears twice"),
        ("{prop_attn: true}", "{a: " + "[" * 9 + "]" * 9 + "}", "nested at most 8 deep"),
        ("{prop_attn: true}", "{a: " + "[" * 9000, "nested at most 8 deep"),
        ("{r: 13}", "{r: " + "9" * 5000 + "}", "not valid YAML"),
    ],
)
def test_broken_recipes_are_explained(old: str, new: str, text: str) -> None:
    with pytest.raises(VisionTokError, match=text):
        parse_recipe(GOOD.replace(old, new))


@pytest.mark.parametrize("text", ["", "[]", "tome", "1", "\x00", "a: b: c", "%YAML 9", b"\xff\xfe\x00", "{" * 100])
def test_what_is_no_recipe(text: str | bytes) -> None:
    with pytest.raises(VisionTokError):
        parse_recipe(text)


def test_oversize_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text(GOOD + "#" * MAX_BYTES)
    with pytest.raises(VisionTokError, match="at most 65536 bytes"):
        load_recipe(tmp_path / "big.yaml")
    with pytest.raises(VisionTokError, match="does not exist"):
        load_recipe(tmp_path)


@given(st.integers(0, len(GOOD)), st.integers(0, 12), st.text("{}[]:,&*!'\"-#|>%@` \n\ttrue0.9", max_size=12))
def test_mutated_recipes_never_crash(start: int, length: int, text: str) -> None:
    with contextlib.suppress(VisionTokError):
        parse_recipe(GOOD[:start] + text + GOOD[start + length :])


@given(st.binary(max_size=200))
def test_bytes_never_crash(data: bytes) -> None:
    with contextlib.suppress(VisionTokError):
        parse_recipe(data)
