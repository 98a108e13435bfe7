"""Registry: discovery by file, aliases, duplicates, plugins that work and plugins that do not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import visiontok as vt
from visiontok.errors import UnknownNameError
from visiontok.registry import Registry

MODULE = """
class Base:
    name = ""

class First(Base):
    name = "first_thing"
    aliases = ("one", "uno")

class Helper(First):
    \"\"\"Inherits a name, has none of its own.\"\"\"
"""
OTHER = """
from {package}.a import First

class Second(First):
    name = "second"
"""

Maker = Callable[..., "Registry[Any]"]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """Builds a registry over a fresh package of the given files and entry points."""
    count = iter(range(100))

    def build(files: dict[str, str] | None = None, plugins: list[EntryPoint] | None = None) -> Registry[Any]:
        package = f"things_{tmp_path.name.replace('-', '_')}_{next(count)}"
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        for name, text in (files or {"a": MODULE, "b": OTHER}).items():
            (folder / f"{name}.py").write_text(text.format(package=package))
        importlib.invalidate_caches()
        found = plugins or []
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found if group == "things" else [])
        return Registry("thing", package, "things")

    monkeypatch.syspath_prepend(str(tmp_path))
    return build


def plugin(value: str) -> EntryPoint:
    return EntryPoint(name="extra", value=value, group="things")


def test_classes_with_a_name_of_their_own_are_found(make: Maker) -> None:
    registry = make()
    assert registry.names() == ["first_thing", "second"]
    assert registry.names("f*") == ["first_thing"]
    assert registry.names("nothing*") == []
    assert [cls.__name__ for cls in registry.classes()] == ["First", "Second"]


def test_nothing_is_imported_before_the_first_look(make: Maker) -> None:
    registry = make()
    assert f"{registry.package}.a" not in sys.modules
    registry.names()
    assert f"{registry.package}.a" in sys.modules


@pytest.mark.parametrize("name", ["first_thing", "First-Thing", "FIRST_THING", "one", "Uno"])
def test_names_and_aliases_are_forgiving(make: Maker, name: str) -> None:
    assert make().get(name).__name__ == "First"


def test_aliases_are_not_inherited(make: Maker) -> None:
    registry = make()
    assert registry.get("one").__name__ == "First"
    assert registry.get("second").__name__ == "Second"


def test_unknown_name_offers_the_closest(make: Maker) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown thing 'secnd'\. Did you mean 'second'\? Known: first_thing, second"
    ):
        make().get("secnd")
    with pytest.raises(UnknownNameError) as error:
        make().get("qqqqqq")
    assert "Did you mean" not in str(error.value)


def test_by_class_name(make: Maker) -> None:
    registry = make()
    assert registry.by_class_name("Second") is registry.get("second")
    assert registry.by_class_name("Helper") is None


@pytest.mark.parametrize(
    ("name", "aliases"), [("first_thing", ()), ("one", ()), ("third", ("second",)), ("third", ("uno",))]
)
def test_a_taken_name_is_refused(make: Maker, name: str, aliases: tuple[str, ...]) -> None:
    registry = make()
    before = registry.names()
    with pytest.raises(ValueError, match="is taken by"):
        registry.register(type("Third", (), {"name": name, "aliases": aliases}))
    assert registry.names() == before


def test_registering_the_same_class_twice_is_harmless(make: Maker) -> None:
    registry = make()
    cls = registry.get("second")
    assert registry.register(cls) is cls
    assert registry.names() == ["first_thing", "second"]


def test_two_files_with_one_name_are_refused(make: Maker) -> None:
    twin = "class Twin:\n    name = 'first_thing'\n"
    with pytest.raises(ValueError, match="'first_thing'.*is taken by"):
        make({"a": MODULE, "b": twin}).names()


def test_plugins_join(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "outside_plugin.py").write_text("class Extra:\n    name = 'extra'\n    aliases = ('more',)\n")
    registry = make(plugins=[plugin("outside_plugin:Extra")])
    assert registry.names() == ["extra", "first_thing", "second"]
    assert registry.get("more") is registry.get("extra")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module_at_all:Extra", "No module named 'no_such_module_at_all'"),
        ("json:NoSuchClass", "NoSuchClass"),
        ("json:JSONDecoder", "name"),
    ],
)
def test_a_broken_plugin_warns_and_leaves_the_others(make: Maker, value: str, reason: str) -> None:
    registry = make(plugins=[plugin(value)])
    with pytest.warns(UserWarning, match=rf"thing plugin '{value}' could not be loaded: .*{reason}"):
        assert registry.names() == ["first_thing", "second"]


def test_a_plugin_cannot_take_a_name(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "greedy_plugin.py").write_text("class Greedy:\n    name = 'second'\n")
    registry = make(plugins=[plugin("greedy_plugin:Greedy")])
    with pytest.warns(UserWarning, match="could not be loaded.*is taken by"):
        assert registry.get("second").__name__ == "Second"


# ---- the package's own


def test_reducers_and_backbones_are_listed() -> None:
    assert {"tome", "tome_kth", "pitome", "random", "identity"} <= set(vt.list_reducers())
    assert "timm_vit" in vt.list_backbones()
    assert vt.list_reducers("to*") == [name for name in vt.list_reducers() if name.startswith("to")]


def test_unknown_reducer_and_parameter() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown reducer 'tomee'\. Did you mean 'tome'\?"):
        vt.reducers.create("tomee")
    with pytest.raises(UnknownNameError, match=r"tome has no parameter 'prop_atn'\. Did you mean 'prop_attn'\?"):
        vt.reducers.create("tome", prop_atn=True)
    with pytest.raises(UnknownNameError, match="pitome has no preset 'diet'.*Did you mean 'deit'"):
        vt.reducers.create("pitome", preset="diet")
    with pytest.raises(AttributeError, match="no attribute 'ToMee'"):
        _ = vt.reducers.ToMee
