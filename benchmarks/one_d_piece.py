"""One-D-Piece-S encodes and decodes, one by one and in batches. Random weights of official size.

The released scripts take one image at a time, and decode every prefix with the decoder's cost of that prefix; encoding
is the same work as theirs.

    python benchmarks/one_d_piece.py [--batch 8] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from visiontok.tokenizers.one_d_piece import OneDPiece
from visiontok.training.tokenizer_config import load_tokenizer_recipe


def measure(pairs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    for name in pairs:
        pairs[name]()
    for _ in range(repeats):
        for name, run in pairs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = OneDPiece(load_tokenizer_recipe("one_d_piece_s_stage1").model).eval()
    images = torch.rand(args.batch, 3, 256, 256)
    ids = model.encode(images, args.tokens)
    runs = {
        "encode, one by one": lambda: [model.encode(image) for image in images],
        "encode, batch": lambda: model.encode(images),
        "decode, one by one": lambda: [model.decode(row) for row in ids],
        "decode, batch": lambda: model.decode(ids),
        "decode, batch, channels last": lambda: model.decode(ids, channels_last=True),
        "decode, batch, all 256 tokens": lambda: model.decode(model.encode(images)),
    }
    for name, seconds in measure(runs, args.repeats).items():
        print(f"{name:32} {seconds / args.batch * 1e3:8.1f} ms per image")


if __name__ == "__main__":
    main()
