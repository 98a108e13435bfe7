"""U1: the Python blocks of README.md and docs/ run, each file's blocks in order in one namespace.

Shown output is not compared. A block whose fence says `no-run`, or that imports a library that is not installed, is
skipped with that reason. Blocks may not reach the network: pretrained weights are left out by the reader, not here.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^(?P<indent>[ ]*)```python(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.S | re.M)
# Only what the package itself does not need may be missing.
_HERE = {"torch", "visiontok", "numpy", "yaml", "PIL", "safetensors"}


class Block(NamedTuple):
    """One fenced block."""

    path: Path
    line: int
    code: str
    info: str


def blocks(path: Path) -> list[Block]:
    """Python blocks of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent = match["indent"]
        code = "\n".join(line.removeprefix(indent) for line in match["code"].split("\n"))
        found.append(Block(path, text.count("\n", 0, match.start()) + 2, code, match["info"].strip()))
    return found


def documents() -> list[Path]:
    """Markdown files of the repository's own documentation that hold Python blocks."""
    files = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in files if blocks(path)]


def missing(code: str) -> list[str]:
    """Libraries that a block imports and that are not installed."""
    roots = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            roots.update(alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.partition(".")[0])
    return sorted(root for root in roots - _HERE if importlib.util.find_spec(root) is None)


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "__doc_block__"}
    ran, skipped = 0, []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks(path):
            where = f"{path.relative_to(ROOT)}:{block.line}"
            absent = missing(block.code)
            if "no-run" in block.info or absent:
                skipped.append(f"{where}: {', '.join(absent) + ' not installed' if absent else 'marked no-run'}")
                continue
            # Line numbers of a traceback then point into the Markdown file.
            source = "\n" * (block.line - 1) + block.code
            try:
                exec(compile(source, str(path), "exec"), space)
            except Exception as error:
                pytest.fail(f"{where} raised {type(error).__name__}: {error}")
            ran += 1
    if ran == 0:
        pytest.skip("; ".join(skipped))


def test_the_readme_has_blocks() -> None:
    assert ROOT / "README.md" in documents()


def test_the_collector_finds_what_it_should(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n```python\nx = 1\n```\ntext\n```bash\nfalse\n```\n- item\n\n  ```python no-run\n  y = (\n    2)\n  ```\n"
        "```\nplain\n```\n```python\nimport surely_not_installed\n```\n"
    )
    first, second, third = blocks(page)
    assert (first.line, first.code, first.info) == (3, "x = 1\n", "")
    assert second.info == "no-run"
    assert second.code == "y = (\n  2)\n"
    assert missing(third.code) == ["surely_not_installed"]
    assert missing(first.code) == []
