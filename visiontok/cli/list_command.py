"""Lists names that match a shell pattern, one per line.

visiontok list 'to*'            reducers (default)
visiontok list backbones
visiontok list models 'deit*'   models of timm and the embedded ones
"""

from __future__ import annotations

import argparse
import json
from typing import Any

KINDS = ("reducers", "backbones", "models")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("words", nargs="*", metavar="[KIND] [PATTERN]", help=f"{'|'.join(KINDS)}, and a pattern")
    parser.add_argument("--json", action="store_true", help="print a JSON array of objects")


def run(args: argparse.Namespace) -> int:
    """Prints the names.

    Raises:
        NothingMatched: no name matches.
    """
    from visiontok.cli import NothingMatched

    kind, pattern = _parse(args.words)
    found = _find(kind, pattern)
    if not found:
        raise NothingMatched(f"no {kind.removesuffix('s')} matches '{pattern}'")
    if args.json:
        print(json.dumps(found))
        return 0
    width = max(len(entry["name"]) for entry in found)
    for entry in found:
        print(f"{entry['name'].ljust(width)}  {entry.get('summary', '')}".rstrip())
    return 0


def _parse(words: list[str]) -> tuple[str, str]:
    from visiontok.errors import ParameterError

    kind = words[0] if words and words[0] in KINDS else "reducers"
    rest = words[1:] if words and words[0] in KINDS else words
    if len(rest) > 1:
        raise ParameterError(
            f"list takes one pattern, got {' '.join(rest)}; quote it, or the shell expands it to files"
        )
    return kind, rest[0] if rest else "*"


def _find(kind: str, pattern: str) -> list[dict[str, Any]]:
    if kind == "models":
        from visiontok.bench.models import list_models

        return [{"name": name} for name in list_models(pattern)]
    import visiontok as vt

    if kind == "backbones":
        return [{"name": name} for name in vt.list_backbones(pattern)]
    cards = {name: vt.describe(name) for name in vt.list_reducers(pattern)}
    return [
        {
            "name": name,
            "summary": card.summary,
            "site": card.site,
            "signals": list(card.signals),
            "training_free": card.training_free,
        }
        for name, card in cards.items()
    ]
