"""Wall time of `import visiontok` and `visiontok --help`, each in fresh processes.

    python benchmarks/import_time.py --runs 15 --store

Targets: the import under 50 ms on top of a bare interpreter, the help under 0.3 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import store

FILE = store.RESULTS / "import.csv"
CASES = {
    "python -c pass": ["-c", "pass"],
    "import visiontok": ["-c", "import visiontok"],
    "visiontok --help": ["-m", "visiontok", "--help"],
}


def once(arguments: Sequence[str]) -> float:
    """Milliseconds of one run."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Prints median and range of every case; runs are interleaved, so that a busy moment hits all alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--store", action="store_true", help=f"keep the results in {FILE.name}")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for name in CASES:
        once(CASES[name])  # writes the byte code
    for _ in range(args.runs):
        for name, arguments in CASES.items():
            times[name].append(once(arguments))
    bare = statistics.median(times["python -c pass"])
    for name, values in times.items():
        middle = statistics.median(values)
        over = "" if name == "python -c pass" else f", {middle - bare:6.1f} ms over the bare interpreter"
        print(f"{name:<18} {middle:7.1f} ms (of {len(values)}: {min(values):.1f} to {max(values):.1f}){over}")
    if args.store:
        rows = [{"case": name, "p50_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values),
                 "runs": args.runs} for name, values in times.items()]  # fmt: skip
        where = store.machine("cpu")
        store.put(FILE, [row | where for row in rows], ("case", "device"))


if __name__ == "__main__":
    main()
