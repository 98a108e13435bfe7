"""Starts a demo on this machine only (127.0.0.1).

visiontok demo             lists the demos
visiontok demo classify
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("name", nargs="?", help="which demo ('app' holds all as tabs); without it they are listed")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, metavar="N", help="port (default: the first free one from 7860)")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser window")


def run(args: argparse.Namespace) -> int:
    """Lists the demos, or serves one until interrupted."""
    from visiontok import demo

    if args.name is None:
        print("\n".join(demo.names()))
        return 0
    demo.launch(args.name, host=args.host, port=args.port, open_browser=not args.no_browser)
    return 0
