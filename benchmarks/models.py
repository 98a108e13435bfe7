"""Reduced timm ViTs against the unreduced model, the official formulation and the free-slice oracle.

    python benchmarks/models.py --model deit_small_patch16_224 --batch 1 16 --store
    python benchmarks/models.py --device cuda --dtype bfloat16 --batch 1 64 256 --store
    python benchmarks/models.py --reducer pitome evit topk --batch 8

On a CPU one thread and its process time, on a GPU device events; contestants take turns. The baseline is timm's own
model with scaled_dot_product_attention. S = T(baseline) / T; E_total = S / (ratio of GMACs); E_hw is that of the
oracle, which slices `x[:, :K]` for free; E_method is the median over rounds of oracle / own time, because the ratio of
one round cancels slow drifts of the machine. Nothing is timed before all implementations agree (K5).

Implementations: `reference` plain torch, `automatic` what visiontok uses by itself, `cpp` and `triton` where they can
run, with plain torch for the rest. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import official
import store
import torch
from torch import Tensor, nn

import visiontok as vt
from visiontok.bench.oracle import oracle
from visiontok.bench.timing import Timing, interleave
from visiontok.ops import dispatch

FILE = store.RESULTS / "models.csv"
KEY = ("model", "reducer", "budget", "implementation", "dtype", "batch", "mode", "device", "versions", "command")
MODELS = (
    "deit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_384",
    "vit_large_patch14_clip_336",
)
# Tokens per block of the papers' tables.
R = {"deit_small_patch16_224": 13, "vit_base_patch16_224": 13}
R_LARGE = 23
KERNELS = ("triton", "cpp")
IMPLEMENTATIONS = ("reference", "automatic", *KERNELS)
# Largest distance to the reference's logits, relative to their norm. Half precision rounds keys, which turns near ties.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class Disagreement(Exception):
    """An implementation does not compute what the reference does."""


@contextlib.contextmanager
def selected(name: str) -> Iterator[None]:
    """Lets the dispatcher choose among some implementations only.

    Args:
        name: One of `IMPLEMENTATIONS`.
    """
    if name == "automatic":
        yield
        return
    hidden = [kernel for kernel in KERNELS if kernel != name]
    ops = list(dispatch._ops.values())
    before = [op.implementations for op in ops]
    for op in ops:
        op.implementations = [found for found in op.implementations if found.name not in hidden]
    try:
        yield
    finally:
        for op, found in zip(ops, before):
            op.implementations = found


def usable(name: str, device: str) -> str | None:
    """What speaks against an implementation on a device, or None."""
    if name not in KERNELS:
        return None
    probe = torch.empty(0, 0, 0, device=device)
    with selected(name):
        ops = list(dispatch._ops.values())
        if any(op.choose(probe).name == name for op in ops):
            return None
        return next((why for op in ops for refused, why in op.refused(probe) if refused == name), "no op has it")


class Subject(NamedTuple):
    """A model with a reduction, and what it is compared with."""

    model: Any
    reduced: nn.Module
    free: nn.Module | None
    report: Any
    removals: list[int]
    budget: str


def subject(name: str, reducer: str, r: int | None, keep: float | None, dtype: torch.dtype, device: str) -> Subject:
    """Makes the model, patches a copy that shares its weights, and finds the oracle.

    Raises:
        VisionTokError: The reducer takes none of the budgets, or does not fit the model.
    """
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval().to(device, dtype)
    number = R.get(name, R_LARGE) if r is None else r
    tries: list[dict[str, Any]] = [{"keep": keep}] if keep is not None else [{"r": number}, {"keep": 0.7}, {}]
    for budget in tries:
        reduced = vt.detached(model)
        try:
            reduction = vt.patch(reduced, reducer, **budget)
            break
        except vt.VisionTokError:
            if budget == tries[-1]:
                raise
    report = reduction.report()
    counts = [report.tokens_in, *report.tokens]
    try:
        free = oracle(model, report.tokens, reduction.reducers[0].site.name)
    except vt.VisionTokError:
        free = None
    removals = [before - after for before, after in zip(counts, counts[1:])]
    return Subject(model, reduced, free, report, removals, " ".join(f"{k}={v}" for k, v in budget.items()))


def contestants(
    given: Subject, reducer: str, images: Tensor, names: Sequence[str], mode: str
) -> dict[str, Callable[[], Tensor]]:
    """Callables by name: the baseline, the official formulation of ToMe, each implementation, the oracle."""

    def ready(run: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        if mode == "compile":
            run = torch.compile(run, fullgraph=False, dynamic=False)
        if mode == "cuda-graph":
            return _recorded(run, images)
        return lambda: run(images)

    def chosen(name: str) -> Callable[[], Tensor]:
        if mode != "eager":
            return ready(given.reduced)

        def run() -> Tensor:
            with selected(name):
                return given.reduced(images)

        return run

    calls = {"baseline": ready(given.model)}
    if reducer == "tome":
        calls["official"] = ready(lambda x: official.forward(given.model, x, given.removals))
    calls |= {name: chosen(name) for name in names}
    if given.free is not None:
        calls["slice"] = ready(given.free)
    return calls


def _recorded(run: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    # Capture wants what it records to have run before, on a stream of its own.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(images)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def check(calls: dict[str, Callable[[], Tensor]], names: Sequence[str], dtype: torch.dtype) -> dict[str, float]:
    """Distance of each implementation, and of the official formulation, to the first of `names`.

    Raises:
        Disagreement: One is too far away; the official formulation may be in half precision, as it rounds in between.
    """
    expected = calls[names[0]]().double().clone()
    gaps: dict[str, float] = {}
    for name in (*names, *(("official",) if "official" in calls else ())):
        gap = ((calls[name]().double() - expected).norm() / expected.norm()).item()
        gaps[name] = gap
        if not gap <= ALLOWED[dtype] and (name != "official" or dtype == torch.float32):
            raise Disagreement(f"{name} is {gap:.1e} from {names[0]}, more than {ALLOWED[dtype]:.0e}")
    return gaps


def used(device: str, name: str) -> str:
    """The kernels that an implementation stands for here: `match_slots=cpp merge=cpp`."""
    probe = torch.empty(0, 0, 0, device=device)
    with selected(name):
        found = {op.name: op.choose(probe).name for op in dispatch._ops.values()}
    return " ".join(f"{op}={kernel}" for op, kernel in sorted(found.items()) if kernel in KERNELS) or "torch"


def efficiencies(times: dict[str, Timing], name: str, ideal: float, depth: int) -> dict[str, float | None]:
    """S and the three efficiencies of one contestant, and what it costs per block over the oracle."""
    base, own, free = times["baseline"], times[name], times.get("slice")
    row: dict[str, float | None] = {"speedup": base.p50 / own.p50, "e_total": base.p50 / own.p50 / ideal}
    if free is None or name == "baseline":
        return row | {"e_hw": None, "e_method": None, "overhead_ms_per_block": None}
    ratios = np.array(free.samples) / np.array(own.samples)
    return row | {
        "e_hw": base.p50 / free.p50 / ideal,
        "e_method": float(np.median(ratios)),
        "overhead_ms_per_block": 1e3 * float(np.median(np.array(own.samples) - np.array(free.samples))) / depth,
    }


def measure(args: argparse.Namespace, name: str, reducer: str, batch: int) -> list[dict[str, Any]]:
    """Rows of one model, reducer and batch, checked before anything is timed.

    Raises:
        Disagreement: Implementations do not agree.
        VisionTokError: The reducer does not fit.
    """
    dtype = getattr(torch, args.dtype)
    given = subject(name, reducer, args.r, args.keep, dtype, args.device)
    images = torch.randn(batch, *given.model.pretrained_cfg["input_size"]).to(args.device, dtype)
    refused = {found: usable(found, args.device) for found in args.implementation}
    names = [found for found, why in refused.items() if why is None]
    if not names:
        raise vt.VisionTokError(f"no implementation runs here: {refused}")
    with torch.inference_mode():
        calls = contestants(given, reducer, images, names, args.mode)
        gaps = check(calls, names, dtype)
        times = interleave(calls, device=args.device, warm=args.warm, rounds=args.rounds)
    rows = []
    for contestant, found in times.items():
        rows.append({
            "model": name, "reducer": reducer, "budget": given.budget, "implementation": contestant,
            "dtype": args.dtype, "batch": batch, "mode": args.mode,
            "p20_ms": 1e3 * found.p20, "p50_ms": 1e3 * found.p50, "p80_ms": 1e3 * found.p80, "rounds": args.rounds,
            **efficiencies(times, contestant, given.report.ideal_speedup, len(given.removals)),
            "gmacs_before": given.report.gmacs_before, "gmacs_after": given.report.gmacs_after,
            "tokens": f"{given.report.tokens_in}-{given.report.tokens[-1]}", "gap": gaps.get(contestant),
            "uses": used(args.device, contestant) if contestant in names else "", "launch_bound": found.launch_bound,
        })  # fmt: skip
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints one comparison."""
    first = rows[0]
    ideal = first["gmacs_before"] / first["gmacs_after"]
    print(f"{first['model']} {first['reducer']} {first['budget']} batch {first['batch']} {first['dtype']} "
          f"{first['mode']}, {first['rounds']} rounds; GMACs {first['gmacs_before']:.2f} -> {first['gmacs_after']:.2f} "
          f"(x{ideal:.3f}), tokens {first['tokens']}")  # fmt: skip
    print(f"  {'':<12}{'p20':>9}{'p50':>9}{'p80':>9}{'S':>7}{'E_total':>9}{'E_hw':>7}{'E_method':>10}  uses")
    for row in rows:
        numbers = (row[name] for name in ("e_total", "e_hw", "e_method"))
        total, hardware, method = ("" if value is None else f"{value:.3f}" for value in numbers)
        print(f"  {row['implementation']:<12}{row['p20_ms']:>9.1f}{row['p50_ms']:>9.1f}{row['p80_ms']:>9.1f}"
              f"{row['speedup']:>7.2f}{total:>9}{hardware:>7}{method:>10}  {row['uses']}")  # fmt: skip
    if any(row["launch_bound"] for row in rows):
        print("  launch-bound: queueing kernels takes as long as running them, so fewer tokens cannot help")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-m", "--model", nargs="+", default=list(MODELS), help="timm ViTs; default: all four of MODELS")
    made.add_argument("--reducer", nargs="+", default=["tome"], help="names of visiontok list, or `all`")
    made.add_argument("--r", type=int, help="tokens per block; default: that of the papers")
    made.add_argument("--keep", type=float, help="share kept per point, instead of --r")
    made.add_argument("-b", "--batch", type=int, nargs="+", default=[1, 16])
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=["reference", "automatic"])
    made.add_argument("--compile", dest="mode", action="store_const", const="compile", default="eager")
    made.add_argument("--cuda-graph", dest="mode", action="store_const", const="cuda-graph")
    made.add_argument("--rounds", type=int, default=12)
    made.add_argument("--warm", type=int, default=2, help="calls before timing")
    made.add_argument("--threads", type=int, default=1, help="CPU threads")
    made.add_argument("--store", action="store_true", help=f"keep the results in {FILE.name}")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the flags ask for; 1 if an implementation was wrong."""
    made = parser()
    args = made.parse_args(argv)
    if args.mode != "eager":
        # A compiled or recorded model has made its choice already.
        args.implementation = ["automatic"]
    torch.set_num_threads(args.threads)
    everything = [name for name in vt.list_reducers() if name != "identity"]
    reducers = everything if args.reducer == ["all"] else args.reducer
    failed = False
    for name, reducer, batch in itertools.product(args.model, reducers, args.batch):
        try:
            rows = measure(args, name, reducer, batch)
        except (Disagreement, vt.VisionTokError) as error:
            print(f"{name} {reducer} batch {batch}: not timed, {error}", file=sys.stderr)
            failed = failed or isinstance(error, Disagreement)
            continue
        show(rows)
        if args.store:
            where = store.machine(args.device)
            store.put(FILE, [row | where for row in rows], KEY)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
