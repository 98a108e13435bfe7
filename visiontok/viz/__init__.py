"""Pictures of what a reduction did: token maps, Pareto plots and the self-contained HTML report.

The names below load their file on first use, so that drawing a token map never imports matplotlib or plotly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontok.viz.pareto import pareto_figure, pareto_png
    from visiontok.viz.report import write_report
    from visiontok.viz.strips import layer_maps, survival_map, token_gif, token_strip
    from visiontok.viz.tokens import label_hash, token_map

_HOME = {
    "token_map": "tokens",
    "label_hash": "tokens",
    "layer_maps": "strips",
    "token_strip": "strips",
    "token_gif": "strips",
    "survival_map": "strips",
    "pareto_figure": "pareto",
    "pareto_png": "pareto",
    "write_report": "report",
}

__all__ = [
    "label_hash",
    "layer_maps",
    "pareto_figure",
    "pareto_png",
    "survival_map",
    "token_gif",
    "token_map",
    "token_strip",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
