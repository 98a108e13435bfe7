"""What one decision costs: signals, `decide` and `apply` of every method, against the ViT block around them.

    python benchmarks/decide_cost.py --batch 8 --rounds 7 --store

One thread, CPU time of the process (neighbours on the machine count less), the block and the methods interleaved.
Each method runs where it first removes tokens when it keeps 70 % per point; its inputs are recorded there once and the
decision is repeated on them, signals computed anew. A ratio compares it with the unpatched block at full length run
just before and after. Methods with learned parts run with untrained ones, which costs the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import store
import timm
import torch
from official import tokens_of
from torch import Tensor

import visiontok as vt
from visiontok.core.joints import Seam
from visiontok.core.runtime import Stage
from visiontok.core.signals import Signals
from visiontok.core.state import apply

KEEP = 0.7
# Methods between two runs of the block.
CHUNK = 4
# Methods whose default at the first point is not the only one worth knowing.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"zero_tprune, iters=1": ("zero_tprune", {"iters": 1})}
FILE = store.RESULTS / "decide.csv"


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

    def spy(stage: Any, step: Any, amount: int, x: Any, state: Any, offered: Any) -> Any:
        # Before block 0 nothing could look back, so the signals there are its own too.
        ahead = step in stage.steps.get("HERE", ())
        decision = own(stage, step, amount, x, state, offered)
        if len(decision.state.trail) != len(state.trail):
            # The residual sum and the norm that a kernel may do along the way are the block's own work.
            x = x.hidden if isinstance(x, Seam) else x
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


def rows_of(
    points: dict[str, Point], results: dict[str, np.ndarray], blocks: np.ndarray, cases: list[str], length: int
) -> list[dict[str, Any]]:
    """One row per method: medians, and the share's lower quantile too; empty numbers where it does not run."""
    low, middle = np.percentile(blocks, [20, 50])
    rows: list[dict[str, Any]] = []
    for name in cases:
        row: dict[str, Any] = {"method": name, "tokens": length, "block_p20_ms": float(low),
                               "block_p50_ms": float(middle)}  # fmt: skip
        if name in points:
            decide, move, share = (float(value) for value in np.median(results[name], axis=0))
            low_share = float(np.percentile(results[name][:, 2], 20))
            row |= {"decide_ms": decide, "apply_ms": move, "share_p50": share, "share_p20": low_share,
                    "tokens_after": points[name].after}  # fmt: skip
        rows.append(row)
    return rows


def main() -> None:
    """Prints the rows, and stores them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--size", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reducer", nargs="*", default=[], help="only these")
    parser.add_argument("--store", action="store_true", help=f"keep the results in {FILE.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {name: (name, {}) for name in vt.list_reducers() if name != "identity"} | VARIANTS
    cases = {name: case for name, case in sorted(cases.items()) if not args.reducer or case[0] in args.reducer}
    for size in args.size:
        torch.manual_seed(0)
        model: Any = timm.create_model(args.model, img_size=size).eval()
        images = torch.randn(args.batch, 3, size, size)
        with torch.inference_mode():
            found = {name: find(model, images, *case) for name, case in cases.items()}
            points = {name: point for name, point in found.items() if point is not None}
            x = tokens_of(model, images)
            results, blocks = measure(points, model.blocks[1], x, args.rounds)
        rows = rows_of(points, results, blocks, list(cases), x.shape[1])
        print(f"{args.model}, batch {args.batch}, {x.shape[1]} tokens, block {rows[0]['block_p50_ms']:.0f} ms")
        for row in rows:
            told = "does not run here"
            if "share_p50" in row:
                told = f"{row['share_p50']:.1%} (p20 {row['share_p20']:.1%}), "
                told += f"{row['decide_ms']:.2f} + {row['apply_ms']:.2f} ms"
            print(f"  {row['method']:<24}{told}")
        if args.store:
            where = {"model": args.model, "batch": args.batch, "rounds": args.rounds} | store.machine("cpu")
            store.put(FILE, [row | where for row in rows], ("method", "model", "tokens", "batch", "device"))


if __name__ == "__main__":
    main()
