"""Values that users type: parsed without executing anything, refused clearly (S7, S8)."""

from __future__ import annotations

import argparse
import ast
import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import visiontok
from visiontok.cli.options import budget
from visiontok.cli.values import literal, setting
from visiontok.errors import VisionTokError

PACKAGE = Path(visiontok.__file__).parent
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "eval", "exec"}
typed = st.one_of(
    st.text(max_size=40),
    st.text("0123456789()[]{}:,.-+ eE'\"_", max_size=40),
    st.from_regex(r"[\[\(\{]{1,30}[0-9,: ]*[\]\)\}]{0,30}", fullmatch=True),
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("13", 13), ("0.7", 0.7), ("(16, -1)", (16, -1)), ("[10, 0, 7]", [10, 0, 7]), ("{3: 20}", {3: 20})],
)
def test_budgets(text: str, value: object) -> None:
    assert budget(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("prop_attn=false", ("prop_attn", False)),
        ("prop-attn=True", ("prop_attn", True)),
        ("preset=mae", ("preset", "mae")),
        ("margin=[0.9, 0.5]", ("margin", [0.9, 0.5])),
        ("kind=none", ("kind", None)),
        ("path=a=b", ("path", "a=b")),
        ("call=__import__('os').getcwd()", ("call", "__import__('os').getcwd()")),
    ],
)
def test_settings(text: str, value: tuple[str, object]) -> None:
    assert setting(text) == value


@given(typed)
def test_budget_parser_returns_or_explains(text: str) -> None:
    with contextlib.suppress(VisionTokError):
        value = budget(text)
        assert isinstance(value, (int, float, tuple, list, dict))


@given(typed)
def test_value_parser_returns_plain_values(text: str) -> None:
    with contextlib.suppress(VisionTokError):
        value = literal(text)
        assert value is None or isinstance(value, (bool, int, float, str, tuple, list, dict))


@given(typed)
def test_setting_parser_fails_only_as_argparse_expects(text: str) -> None:
    with contextlib.suppress(argparse.ArgumentTypeError):
        name, _ = setting(text)
        assert name.isidentifier()


@pytest.mark.parametrize("text", ["[" * 3000, "(" * 200 + ")" * 200, "1" * 5000, "-" * 4000 + "1"])
def test_deep_or_long_values_end_in_an_error_or_in_text(text: str) -> None:
    for parse in (budget, literal):
        with contextlib.suppress(VisionTokError):
            parse(text)


def test_nothing_is_handed_to_a_shell() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            shell = any(keyword.arg == "shell" for keyword in node.keywords)
            on_model = name == "eval" and not node.args
            assert not shell, f"{path}:{node.lineno} uses shell="
            assert name not in SHELLS or on_model, f"{path}:{node.lineno} calls {name}"
            if name in ("run", "Popen", "check_output") and getattr(node.func, "value", None) is not None:
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "subprocess":
                    assert isinstance(node.args[0], ast.List), f"{path}:{node.lineno} runs no fixed list"
