"""All demos as tabs of one page. A new file in this folder with `TITLE` and `build()` becomes a tab by itself."""

from __future__ import annotations

import gradio as gr

from visiontok import demo

TITLE = "visiontok"


def build() -> gr.Blocks:
    """Gathers the demos; launches nothing."""
    modules = [demo.load(name) for name in demo.names()]
    return gr.TabbedInterface(
        [module.build() for module in modules],
        [module.TITLE for module in modules],
        title="visiontok",
        analytics_enabled=False,
    )


if __name__ == "__main__":
    demo.launch("app")
