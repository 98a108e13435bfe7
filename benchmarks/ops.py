"""Times every op of a reduced block: visiontok's implementations, the official formulation, the free slice, the floor.

    python benchmarks/ops.py --shape deit_s vit_b --batch 1 16 --rounds 20 --store
    python benchmarks/ops.py --device cuda --dtype bfloat16 --store --plot docs/images

On a CPU one thread and its process time; on a GPU device events on a cold L2 cache. Contestants take turns, and so do
their inputs. Nothing is timed before all implementations agree with the reference (K5). The floor is the time to move
the least bytes at the copy bandwidth measured here, or to do the least FLOPs at the rate of a matrix product measured
here, whichever is longer. `--shape` and `--op` take names as `--list` prints them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import limits
import store
import torch
from op_cases import OPS, Case, apart, build, fits
from shapes import SHAPES, floor

from visiontok.bench.timing import Timing, interleave

FILE = store.RESULTS / "ops.csv"
KEY = ("op", "implementation", "shape", "dtype", "batch", "device", "versions", "command")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Share of rows that may differ: near ties of sums in another order, more of them where keys are rounded.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class Disagreement(Exception):
    """An implementation does not compute what the reference does."""


def check(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Share of rows by which each contestant differs from the reference.

    Raises:
        Disagreement: One of ours differs; in half precision the official formulation may, as it rounds in between.
    """
    shares = apart(case, dtype)
    judged = shares if dtype == torch.float32 else {n: v for n, v in shares.items() if n != "official"}
    wrong = {name: share for name, share in judged.items() if not share <= ALLOWED[dtype]}
    if wrong:
        told = ", ".join(f"{name}: {share:.2%} of the rows" for name, share in wrong.items())
        raise Disagreement(f"differs from the reference: {told}")
    return shares


def time_case(case: Case, device: str, rounds: int) -> dict[str, Timing]:
    """Times of all contestants."""
    calls = {name: _in_turn(run, case.inputs) for name, run in case.runs.items()}
    return interleave(calls, device=device, warm=3, rounds=rounds)


def _in_turn(run: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    following = itertools.cycle(inputs)
    return lambda: run(next(following))


def measure(op: str, name: str, batch: int, dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one op at one shape, checked before anything is timed."""
    shape, kind = SHAPES[name], DTYPES[dtype]
    case = build(op, shape, batch, kind, device)
    shares = check(case, kind)
    times = time_case(case, device, rounds)
    nbytes, flops = floor(op, shape, batch, kind.itemsize)
    moving = 1e3 * nbytes / limits.copy_bandwidth(device, 1 << int(nbytes - 1).bit_length())
    computing = 1e3 * flops / limits.product_rate(device, kind) if flops else 0.0
    rows = []
    for contestant, found in times.items():
        rows.append({
            "op": op, "implementation": contestant, "shape": name, "dtype": dtype, "batch": batch,
            "p20_ms": 1e3 * found.p20, "p50_ms": 1e3 * found.p50, "p80_ms": 1e3 * found.p80, "rounds": rounds,
            "floor_ms": max(moving, computing), "floor_bytes": nbytes, "floor_flops": flops,
            "rows_apart": shares.get(contestant), "launch_bound": found.launch_bound,
        })  # fmt: skip
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of one op."""
    first = rows[0]
    shape = SHAPES[first["shape"]]
    print(f"{first['op']}, {shape.title}, batch {first['batch']}, {first['dtype']}; floor {first['floor_ms']:.4f} ms")
    for row in rows:
        note = "" if row["rows_apart"] is None else f"  {row['rows_apart']:.2%} rows apart"
        print(f"  {row['implementation']:<10}{row['p50_ms']:>10.4f} ms  (p20 {row['p20_ms']:.4f}, p80 "
              f"{row['p80_ms']:.4f})  floor x {row['p50_ms'] / first['floor_ms']:.1f}{note}")  # fmt: skip


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """One bar chart per shape, batch and dtype: ops on the x axis, times of the contestants on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    charts: dict[tuple[str, Any, str], list[dict[str, Any]]] = {}
    for row in rows:
        charts.setdefault((row["shape"], row["batch"], row["dtype"]), []).append(row)
    paths = []
    for (name, batch, dtype), group in charts.items():
        ops = list(dict.fromkeys(row["op"] for row in group))
        contestants = list(dict.fromkeys(row["implementation"] for row in group))
        figure, axes = pyplot.subplots(figsize=(3 + 1.2 * len(ops), 4), layout="constrained")
        width = 0.8 / len(contestants)
        for index, contestant in enumerate(contestants):
            own = [row for row in group if row["implementation"] == contestant]
            places = [ops.index(row["op"]) + (index - (len(contestants) - 1) / 2) * width for row in own]
            spread = [[row["p50_ms"] - row["p20_ms"] for row in own], [row["p80_ms"] - row["p50_ms"] for row in own]]
            axes.bar(places, [row["p50_ms"] for row in own], width, yerr=spread, label=contestant)
        floors = {row["op"]: row["floor_ms"] for row in group}
        axes.hlines([floors[op] for op in ops], [i - 0.42 for i in range(len(ops))],
                    [i + 0.42 for i in range(len(ops))], "black", "dashed", label="floor")  # fmt: skip
        axes.set(yscale="log", ylabel="ms, median with p20 and p80", xticks=range(len(ops)), xticklabels=ops,
                 title=f"{SHAPES[name].title}, batch {batch}, {dtype}")  # fmt: skip
        axes.tick_params(axis="x", rotation=30)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        figure.legend(loc="outside right upper", fontsize="small")
        path = folder / f"ops_{name}_b{batch}_{dtype}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        paths.append(path)
    return paths


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP")
    made.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    made.add_argument("--batch", type=int, nargs="+", help="default: those of each shape")
    made.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--threads", type=int, default=1, help="CPU threads")
    made.add_argument("--store", action="store_true", help=f"keep the results in {FILE.name}")
    made.add_argument("--plot", type=Path, metavar="FOLDER", help="draw a bar chart per shape")
    made.add_argument("--list", action="store_true", help="print the names of ops and shapes and stop")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the flags ask for; 1 if an implementation was wrong."""
    args = parser().parse_args(argv)
    if args.list:
        print("\n".join([*OPS, "", *(f"{name}: {shape.title}" for name, shape in SHAPES.items())]))
        return 0
    torch.set_num_threads(args.threads)
    failed, done = False, []
    for name, op, dtype in itertools.product(args.shape, args.op, args.dtype):
        shape = SHAPES[name]
        if not fits(op, shape):
            continue
        for batch in args.batch or (shape.cpu if args.device == "cpu" else shape.gpu):
            try:
                with torch.inference_mode():
                    rows = measure(op, name, batch, dtype, args.device, args.rounds)
            except Disagreement as error:
                print(f"{op}, {shape.title}, batch {batch}, {dtype}: not timed, {error}", file=sys.stderr)
                failed = True
                continue
            show(rows)
            done += rows
            if args.store:
                where = store.machine(args.device)
                store.put(FILE, [row | where for row in rows], KEY)
    if args.plot and done:
        print("\n".join(map(str, plot(done, args.plot))))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
