"""Finds and launches the Gradio demos, from a checkout or from an installed wheel.

Every file of the folder `demos/` that does not start with an underscore is a demo: it has a `TITLE` and a `build()`
that returns `gr.Blocks` and launches nothing. A wheel carries the folder as `visiontok/demos`.

    from visiontok import demo
    demo.names()                    # ['classify']
    demo.load("classify").build()   # gr.Blocks, to embed or test
    demo.launch("classify")         # blocks until Ctrl-C; "app" holds all demos as tabs
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from visiontok.errors import MissingDependencyError, UnknownNameError, did_you_mean

ALL = "app"
MAX_UPLOAD = "20mb"
_CSS = """
.numbers td:not(:first-child) { white-space: nowrap; word-break: normal; }
@media (max-width: 640px) { .layers .grid-container { grid-template-columns: repeat(2, 1fr) !important; } }
"""


def folder() -> Path:
    """Returns the folder that holds the demo files.

    Raises:
        MissingDependencyError: this installation was made without them.
    """
    package = Path(__file__).parent
    for candidate in (package / "demos", package.parent / "demos"):
        if (candidate / f"{ALL}.py").is_file():
            return candidate
    raise MissingDependencyError("this installation has no demos; install the wheel or a checkout of visiontok")


def names() -> list[str]:
    """Lists the demos, without `app`, which holds them all."""
    return sorted(path.stem for path in folder().glob("*.py") if path.stem != ALL and not path.stem.startswith("_"))


def load(name: str) -> ModuleType:
    """Imports a demo.

    Args:
        name: one of `names()`, or `app`.

    Returns:
        The module, with `TITLE` and `build()`.

    Raises:
        UnknownNameError: no such demo.
        MissingDependencyError: gradio is not installed.
    """
    known = [*names(), ALL]
    if name not in known:
        raise UnknownNameError(f"unknown demo {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    # Gradio reads it when a page is built; nothing leaves the machine without the user asking for it.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if importlib.util.find_spec("gradio") is None:
        raise MissingDependencyError("the demos need gradio: pip install 'visiontok[demo]'")
    module_name = f"visiontok_demos_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, folder() / f"{name}.py")
        if spec is None or spec.loader is None:
            raise UnknownNameError(f"demo {name!r} in {folder()} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]


def launch(
    name: str = ALL,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    block: bool = True,
    quiet: bool = False,
) -> Any:
    """Serves a demo, by default to this machine only and never through a public link.

    Args:
        name: one of `names()`, or `app` for all of them as tabs.
        host: address to listen on.
        port: port; default the first free one from 7860.
        open_browser: show it in the default browser.
        block: wait until the server is stopped; off, the caller closes the returned Blocks.
        quiet: print no address.

    Returns:
        The `gr.Blocks` that is being served; its `local_url` is the address.
    """
    blocks = load(name).build()
    from gradio.themes import Default

    blocks.queue(max_size=16)
    blocks.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=not block,
        quiet=quiet,
        share=False,
        show_error=True,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[],
        enable_monitoring=False,
        ssr_mode=False,
        footer_links=["api"],
        # System fonts: the other themes fetch theirs from the web.
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
    )
    return blocks
