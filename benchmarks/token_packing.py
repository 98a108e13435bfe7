"""Tokens per second of packing and of the range coder.

python benchmarks/token_packing.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from visiontok.tokenizers import packing, range_coder


def rate(run: Callable[[], object], count: int, repeats: int = 5) -> float:
    """Millions of tokens per second, the median."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return count / sorted(seconds)[repeats // 2] / 1e6


def main() -> None:
    random = np.random.default_rng(0)
    for bits in (8, 12, 16):
        ids = random.integers(0, 1 << bits, 4_000_000)
        data = packing.pack(ids, bits)
        pack = rate(lambda ids=ids, bits=bits: packing.pack(ids, bits), len(ids))
        unpack = rate(lambda data=data, bits=bits: packing.unpack(data, bits, 4_000_000), len(ids))
        print(f"{bits:2} bits: pack {pack:.0f} M/s, unpack {unpack:.0f} M/s")
    rows = random.integers(0, 4096, (1000, 256)) // random.integers(1, 64, 256)
    tables = range_coder.build_tables(rows, (4096,))
    streams = range_coder.encode(rows, tables)
    encode = rate(lambda: range_coder.encode(rows, tables), rows.size, 3)
    decode = rate(lambda: range_coder.decode(streams, 256, tables), rows.size, 3)
    print(f"range coder, 1000 rows of 256: encode {encode:.2f} M/s, decode {decode:.2f} M/s")


if __name__ == "__main__":
    main()
