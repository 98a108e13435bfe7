"""Rate and quality of the shipped tokenizers on the 500 held-out digits: table, plot and a sheet of pictures.

    python benchmarks/tokenizer_quality.py --store

Writes results/tokenizer_quality.csv, docs/images/tokenizer_quality.png and docs/images/tokenizer_digits.png.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visiontok.models.tiny import digits_split, tiny_vit
from visiontok.tokenizers import packing, quality
from visiontok.tokenizers.base import Tokenizer
from visiontok.tokenizers.loading import TINY, load
from visiontok.training.tokenizer_loop import DigitImages

HERE = Path(__file__).parent
RESULTS, IMAGES = HERE / "results" / "tokenizer_quality.csv", HERE.parent / "docs" / "images"
OPTIONS: dict[str, dict[str, Any]] = {"tiny_one_d_piece": {}, "tiny_flextok": {"steps": 10, "guidance": 3.0}}
LENGTHS = (1, 2, 4, 8, 16)


@torch.no_grad()
def accuracy(images: Tensor, labels: Tensor) -> float:
    return float((tiny_vit().eval()(images * 2 - 1).argmax(1) == labels).float().mean()) * 100


def measure(name: str, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    tokenizer = load(name)
    ids: Any = tokenizer.encode(images)
    rows = []
    for tokens in LENGTHS:
        decoded = torch.cat([tokenizer.decode(part[:, :tokens], **OPTIONS[name]) for part in ids.split(125)])
        rows.append({
            "tokenizer": name, "tokens": tokens,
            "bytes": packing.packed_size(tokens, packing.bits_for(tokenizer.codebook_size)),
            "psnr": round(float(quality.psnr(decoded, images).mean()), 2),
            "ssim": round(float(quality.ssim(decoded, images).mean()), 3),
            "top1": round(accuracy(decoded, labels), 1),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def plot(rows: list[dict[str, Any]], ceiling: float) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    labels = {"psnr": "PSNR [dB]", "ssim": "SSIM", "top1": "top-1 of tiny_vit [%]"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), constrained_layout=True)
    for axis, (metric, label) in zip(axes, labels.items()):
        for name in TINY:
            own = [row for row in rows if row["tokenizer"] == name]
            axis.plot([row["tokens"] for row in own], [row[metric] for row in own], marker="o", label=name)
        if metric == "top1":
            axis.axhline(ceiling, color="0.6", linestyle="--", label="original images")
        axis.set(xscale="log", xlabel="tokens", ylabel=label)
        axis.set_xticks(LENGTHS, [str(tokens) for tokens in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize=8, loc="lower right")
    figure.savefig(IMAGES / "tokenizer_quality.png", dpi=110)


def sheet(images: Tensor, labels: Tensor) -> None:
    """One digit of each class: the original, then what 1, 2, 4, 8 and 16 tokens give, for both tokenizers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [int((labels == label).nonzero()[0]) for label in range(10)]
    originals = images[chosen]
    titles, lines = ["original"], [originals]
    for name in TINY:
        tokenizer: Tokenizer = load(name)
        ids: Any = tokenizer.encode(originals)
        for tokens in LENGTHS:
            titles.append(f"{name.removeprefix('tiny_')}, {tokens}")
            lines.append(tokenizer.decode(ids[:, :tokens], **OPTIONS[name]))
    figure, axes = plt.subplots(len(lines), 10, figsize=(8.6, 9))
    for title, line, row in zip(titles, lines, axes):
        row[0].text(-0.2, 0.5, title, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
        for image, axis in zip(line, row):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.axis("off")
    figure.subplots_adjust(left=0.18, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.05)
    figure.savefig(IMAGES / "tokenizer_digits.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="store_true", help="write the table and the pictures")
    args = parser.parse_args()
    data, labels = DigitImages(32, "test"), digits_split().test_labels
    images = torch.stack([data[index] for index in range(len(data))])
    ceiling = accuracy(images, labels)
    print("original images:", ceiling)
    rows = [row for name in TINY for row in measure(name, images, labels)]
    if not args.store:
        return
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, ceiling)
    sheet(images, labels)


if __name__ == "__main__":
    main()
