"""What one decision costs: signals, `decide` and `apply` of every method, against the ViT block around them.

    python benchmarks/decide_cost.py --rounds 15 --write docs/performance.md

One thread, CPU time of the process (neighbours on the machine count less), the block and the methods interleaved.
Each method runs where it first removes tokens when it keeps 70 % per point; its inputs are recorded there once and the
decision is repeated on them, signals computed anew. A ratio compares it with the unpatched block at full length run
just before and after. Methods with learned parts run with untrained ones, which costs the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import timm
import torch
from cpu_vit import cpu, tokens_of
from torch import Tensor

import visiontok as vt
from visiontok.core.runtime import Stage
from visiontok.core.signals import Signals
from visiontok.core.state import apply

KEEP = 0.7
# Methods between two runs of the block.
CHUNK = 4
# Methods whose default at the first point is not the only one worth knowing.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"zero_tprune, iters=1": ("zero_tprune", {"iters": 1})}
MARKS = ("<!-- decide: begin -->", "<!-- decide: end -->")


class Point(NamedTuple):
    """Where a method first removes tokens, with all it needs to decide again."""

    stage: Any
    step: Any
    block: Any
    ahead: bool
    x: Tensor
    state: Any
    offered: Any
    after: int


class _Found(Exception):
    """Ends the forward in which a point was recorded."""


def record(model: Any, images: Tensor, name: str, params: dict[str, Any]) -> Point:
    """The first point of a patched model at which tokens leave.

    Raises:
        VisionTokError: The method does not fit the model or takes no such budget.
    """
    found: list[Point] = []
    own = Stage._step

    def spy(stage: Any, step: Any, x: Tensor, state: Any, offered: Any) -> Any:
        # Before block 0 nothing could look back, so the signals there are its own too.
        ahead = step in stage.steps.get("HERE", ())
        decision = own(stage, step, x, state, offered)
        if len(decision.state.trail) != len(state.trail):
            found.append(Point(stage, step, patched.blocks[stage.layer], ahead, x, state, offered, decision.state.n))
            raise _Found
        return decision

    patched: Any = vt.detached(model)
    vt.patch(patched, name, **params)
    try:
        with mock.patch.object(Stage, "_step", spy):
            patched(images)
    except _Found:
        return found[0]
    raise vt.VisionTokError(f"{name} removes nothing")


def budgets(name: str, length: int) -> list[dict[str, Any]]:
    """What to try, in order: a share kept per point, a number removed, the method's own setting."""
    return [{"keep": KEEP}, {"r": round(length * (1 - KEEP))}, {}]


def find(model: Any, images: Tensor, name: str, extra: dict[str, Any]) -> Point | None:
    """`record` with the first budget that the method takes."""
    length = model.patch_embed.num_patches
    for budget in budgets(name, length):
        try:
            return record(model, images, name, {**budget, **extra})
        except vt.VisionTokError:
            continue
    return None


def once(point: Point) -> tuple[float, float]:
    """CPU milliseconds of signals and decision, and of carrying it out."""
    stage, step, state, x = point.stage, point.step, point.state, point.x
    start = time.process_time()
    offered = point.block._visiontok_ahead(x, state) if point.ahead else point.offered
    signals = Signals({"HIDDEN": lambda: x, "GRID": lambda: state.grid, "MODULE": lambda: step.module, **offered})
    tm = step.reducer.decide(signals, state, stage._amount(step, state))
    decided = time.process_time()
    if tm.counts is not None and getattr(step.reducer, "compact", False):
        tm = tm.compacted()
    apply(tm, x, state)
    return 1e3 * (decided - start), 1e3 * (time.process_time() - decided)


def clock(run: Callable[[], Any]) -> float:
    """CPU milliseconds."""
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def measure(points: dict[str, Point], block: Any, x: Tensor, rounds: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Per method (rounds, 3): decide ms, apply ms, their sum as a share of the block; and the block's own times."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in points}
    names, blocks = list(points), []
    for point in points.values():
        once(point)
    block(x)
    for i in range(rounds):
        turn = names[i % len(names) :] + names[: i % len(names)]
        before = clock(lambda: block(x))
        for first in range(0, len(turn), CHUNK):
            chunk = {name: once(points[name]) for name in turn[first : first + CHUNK]}
            after = clock(lambda: block(x))
            for name, (decide, move) in chunk.items():
                rows[name].append((decide, move, 2 * (decide + move) / (before + after)))
            blocks.append(after)
            before = after
    return {name: np.array(values) for name, values in rows.items()}, np.array(blocks)


def main() -> None:
    """Prints the table, and writes it between the marks of a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--size", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reducer", nargs="*", default=[], help="only these")
    parser.add_argument("--write", type=Path, help="replace the part between the marks of this document")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {name: (name, {}) for name in vt.list_reducers() if name != "identity"} | VARIANTS
    cases = {name: case for name, case in sorted(cases.items()) if not args.reducer or case[0] in args.reducer}
    columns, heads = [], []
    for size in args.size:
        torch.manual_seed(0)
        model: Any = timm.create_model(args.model, img_size=size).eval()
        images = torch.randn(args.batch, 3, size, size)
        with torch.inference_mode():
            found = {name: find(model, images, *case) for name, case in cases.items()}
            points = {name: point for name, point in found.items() if point is not None}
            x = tokens_of(model, images)
            results, blocks = measure(points, model.blocks[1], x, args.rounds)
        low, middle = np.percentile(blocks, [20, 50])
        columns.append((points, results))
        heads.append(f"{x.shape[1]} tokens, block {middle:.0f} ms (p20 {low:.0f})")
    lines = [f"| method | {' | '.join(f'{head}: share | decide + apply ms | tokens' for head in heads)} |",
             "|---|" + "---|---|---|" * len(heads)]  # fmt: skip
    for name in cases:
        cells = []
        for points, results in columns:
            if name not in points:
                cells.append("does not run here | | ")
                continue
            decide, move, share = np.median(results[name], axis=0)
            low = np.percentile(results[name][:, 2], 20)
            cells.append(f"{share:.1%} ({low:.1%}) | {decide:.2f} + {move:.2f} | "
                         f"{points[name].state.n} → {points[name].after}")  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    flags = f"--batch {args.batch} --rounds {args.rounds}"
    told = f"{args.model}, batch {args.batch}, {args.rounds} rounds, one thread, torch {torch.__version__}, {cpu()}"
    table = "\n".join(lines)
    print(told, table, sep="\n\n")
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        begin, end = (text.index(mark) for mark in MARKS)
        body = f"{MARKS[0]}\n{told}.\n\n```bash\npython benchmarks/decide_cost.py {flags}\n```\n\n{table}\n"
        args.write.write_text(text[:begin] + body + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
