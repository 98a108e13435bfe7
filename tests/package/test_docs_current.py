"""What the docs derive from code is up to date: run `python docs/build.py` if this fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_generated_pages_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    # As when the script is run: its neighbours can be imported.
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("visiontok_docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = module.pages()
    stale = [str(p.relative_to(ROOT)) for p, text in pages.items() if p.read_text(encoding="utf-8") != text]
    assert stale == []
