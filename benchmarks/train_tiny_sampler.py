"""Trains the shipped sampler of digits and measures it: do its samples show the class they were asked for?

python benchmarks/train_tiny_sampler.py [--store]
"""

from __future__ import annotations

import argparse

import torch

from visiontok.models.tiny import WEIGHTS_DIR, digits_split, tiny_vit
from visiontok.tokenizers.loading import load
from visiontok.tokenizers.sampling import TokenSampler, load_sampler
from visiontok.training.data import jitter
from visiontok.training.sampler import fit_sampler, save_sampler
from visiontok.training.tokenizer_loop import DigitImages

COPIES, UPDATES, SEED = 24, 4000, 0


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of the training scans, each shifted and scaled a little in many ways."""
    tokenizer, data = load("tiny_one_d_piece"), DigitImages(32, "train")
    images = torch.stack([data[i] for i in range(len(data))])
    rows = [tokenizer.encode(images)]
    for copy in range(COPIES):
        torch.manual_seed(copy)
        rows.append(tokenizer.encode(((jitter(images * 2 - 1) + 1) / 2).clamp(0, 1)))
    return torch.cat(rows), digits_split().train_labels.repeat(COPIES + 1)


@torch.no_grad()
def recognised(model: TokenSampler, guidance: float) -> float:
    """Share of 500 samples in which the shipped ViT sees the class that was asked for."""
    labels = torch.arange(10).repeat(50)
    images = load("tiny_one_d_piece").decode(model.sample(labels, guidance=guidance, seed=1))
    return float((tiny_vit().eval()(images * 2 - 1).argmax(1) == labels).float().mean()) * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="store_true", help="replace the shipped weights")
    args = parser.parse_args()
    ids, labels = tokens()
    show = lambda update, loss: update % 500 == 0 and print(update, round(loss, 4), flush=True)  # noqa: E731
    model = fit_sampler(load("tiny_one_d_piece"), ids, labels, updates=UPDATES, seed=SEED, on_update=show)
    shares = {guidance: round(recognised(model, guidance), 1) for guidance in (1.0, 1.5, 2.0)}
    print("samples recognised as their class, %, by guidance:", shares, "(chance 10)")
    if args.store:
        path = WEIGHTS_DIR / "tiny_one_d_piece_sampler.safetensors"
        save_sampler(model, path, seed=SEED, updates=UPDATES, recognised=shares)
        print(path.stat().st_size, "bytes;", "after loading", round(recognised(load_sampler(), 1.5), 1))


if __name__ == "__main__":
    main()
