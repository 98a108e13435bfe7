"""What a patch that removes nothing costs: deit_small with r=0 against the same model unpatched, on one CPU thread.

    python benchmarks/overhead.py --rounds 30 --batch 1 8 --store

Both models share their weights. Rounds are interleaved and in alternating order; times are CPU times of the process, so
that neighbours on the machine count less. Target: under 2 % (V4).
"""

from __future__ import annotations

import argparse
import statistics
import time

import store
import timm
import torch
from torch import nn

import visiontok as vt

FILE = store.RESULTS / "overhead.csv"


def once(model: nn.Module, x: torch.Tensor, repeat: int) -> float:
    """CPU milliseconds of one forward."""
    start = time.process_time()
    for _ in range(repeat):
        model(x)
    return (time.process_time() - start) * 1e3 / repeat


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def main() -> None:
    """Prints times and the ratio patched / unpatched of every batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="deit_small_patch16_224")
    parser.add_argument("--reducer", default="tome")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", action="store_true", help=f"keep the results in {FILE.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    plain = timm.create_model(args.model).eval()
    patched = vt.detached(plain)
    vt.patch(patched, args.reducer, r=0)
    for batch in args.batch:
        x = torch.randn(batch, *plain.pretrained_cfg["input_size"])
        repeat = max(8 // batch, 1)
        with torch.inference_mode():
            same = torch.equal(plain(x), patched(x))
            rows = []
            for index in range(args.rounds):
                pair = [(plain, 0), (patched, 1)]
                times = [0.0, 0.0]
                for model, place in pair if index % 2 else reversed(pair):
                    times[place] = once(model, x, repeat)
                rows.append(times)
        base, ours = (statistics.median(row[i] for row in rows) for i in (0, 1))
        low, middle, high = quantiles([after / before for before, after in rows])
        print(f"{args.model} {args.reducer} r=0 batch {batch}: {base:.2f} -> {ours:.2f} ms CPU, ratio {middle:.4f} "
              f"(p20 {low:.4f}, p80 {high:.4f}), outputs {'bit-equal' if same else 'DIFFER'}")  # fmt: skip
        if args.store:
            row = {"model": args.model, "reducer": args.reducer, "batch": batch, "rounds": args.rounds, "base_ms": base,
                   "patched_ms": ours, "ratio_p20": low, "ratio_p50": middle, "ratio_p80": high,
                   "equal": same}  # fmt: skip
            store.put(FILE, [row | store.machine("cpu")], ("model", "reducer", "batch", "device"))


if __name__ == "__main__":
    main()
