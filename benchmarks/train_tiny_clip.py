"""Train the tiny CLIP that ships with visiontok on rendered scenes with captions, on one CPU core.

    python benchmarks/train_tiny_clip.py --out visiontok/models/weights/tiny_clip_scenes.safetensors

The visual blocks start from the shipped `tiny_vit_small_dense`, trained on the same training scans. Each step draws new
scenes. The loss is CLIP's, except that a caption which names only a part of a scene ("a photo of a three") is right for
every scene of the batch that it describes, plus one prompt per digit. Settings were chosen by the share of digits told
right in fresh training scenes; the held-out scenes are looked at only by the run that writes the file, the last step
is saved, never the best one. `--validate` leaves out every fifth scan and measures on those instead.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from visiontok.bench import scenes
from visiontok.models.tiny import METADATA_KEY, tiny_vit_small_dense
from visiontok.models.tiny_clip import WordTokenizer, configuration, normalize, tiny_clip, tiny_tokenizer

WARMUP_STEPS = 50
MAX_LOG_SCALE = math.log(100)
SAID_SHARE = 0.75


def describe(labels: np.ndarray, random: np.random.RandomState) -> tuple[list[str], np.ndarray]:
    """A caption for each scene `(n, 4)`, and which `(n, 3)` of colour, size and place it names."""
    said = random.uniform(size=(len(labels), 3)) < SAID_SHARE
    openings = random.randint(len(scenes.OPENINGS), size=len(labels))
    orders = random.randint(2, size=len(labels))
    texts = [scenes.caption(*values) for values in zip(labels.tolist(), said.tolist(), openings, orders)]
    return texts, said


def matches(labels: np.ndarray, said: np.ndarray) -> Tensor:
    """`(n, n)` float: scene i (row) is described by caption j (column)."""
    equal = labels[:, None] == labels[None]
    return torch.from_numpy(equal[..., 0] & (equal[..., 1:] | ~said[None]).all(-1)).float()


def loss(
    model: nn.Module, tokenizer: WordTokenizer, batch: scenes.Scenes, random: np.random.RandomState
) -> tuple[Tensor, Tensor]:
    """Both cross entropies of CLIP, with the probability shared among the captions (or scenes) that are right.

    The scenes are also told apart by one prompt per digit: the shape is the hardest part of a caption, and among the
    captions of a batch hardly two differ in nothing else.

    Returns:
        The loss, and the share of the digits that were told right.
    """
    labels = batch.labels.numpy()
    texts, said = describe(labels, random)
    prompts = [template.format(digit) for digit in scenes.DIGITS for template in scenes.TEMPLATES[:1]]
    image, text, scale = model(normalize(batch.images), tokenizer(texts + prompts))
    text, classes = text.split([len(texts), len(prompts)])
    match, logits = matches(labels, said), scale * image @ text.T
    rows = F.cross_entropy(logits, match / match.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.T, match.T / match.T.sum(1, keepdim=True))
    told = scale * image @ classes.T
    digits = F.cross_entropy(told, batch.labels[:, 0])
    return (rows + columns) / 2 + digits, (told.argmax(1) == batch.labels[:, 0]).float().mean()


def initialize(visual: nn.Module) -> None:
    """Takes the blocks of the shipped `tiny_vit_small_dense`, which has the same anatomy and knows upright digits.

    Its 4x4 patch kernels become 8x8 ones that give the same tokens for an image of twice the size.
    """
    source = tiny_vit_small_dense().state_dict()
    renamed = {
        "class_embedding": source["cls_token"].flatten(),
        "positional_embedding": source["pos_embed"][0],
        "conv1.weight": source["patch_embed.proj.weight"].repeat_interleave(2, 2).repeat_interleave(2, 3) / 4,
        "ln_post.weight": source["norm.weight"],
        "ln_post.bias": source["norm.bias"],
    }
    parts = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for name, value in source.items():
        head, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        if head != "blocks":
            continue
        place, _, kind = part.rpartition(".")
        if place == "attn.qkv":
            renamed[f"transformer.resblocks.{number}.attn.in_proj_{kind}"] = value
        else:
            renamed[f"transformer.resblocks.{number}.{parts[place]}.{kind}"] = value
    with torch.no_grad():
        # open_clip's patch embedding has no bias: it goes into the positions of the patches.
        renamed["positional_embedding"][1:] += source["patch_embed.proj.bias"]
    missing = visual.load_state_dict(renamed, strict=False)
    if missing.missing_keys != ["proj"] or missing.unexpected_keys:
        raise SystemExit(f"tiny_vit_small_dense and the visual tower do not have the same parts: {missing}")


def train(model: nn.Module, tokenizer: WordTokenizer, args: argparse.Namespace) -> None:
    """AdamW, warm-up and cosine, new scenes in every step."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)

    def factor(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, args.steps - WARMUP_STEPS)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    random = np.random.RandomState(args.seed)
    part = "fit" if args.validate else "train"
    model.train()
    running = 0.1
    progress = tqdm(range(args.steps), desc="tiny_clip", unit="step", mininterval=5)
    for step in progress:
        batch = scenes.random_scenes(part, args.batch_size, random)
        value, right = loss(model, tokenizer, batch, random)
        running = 0.98 * running + 0.02 * right.item()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOG_SCALE)
        if step % 50 == 0:
            progress.set_postfix(refresh=False, loss=f"{value.item():.3f}", digits=f"{running:.3f}")


@torch.inference_mode()
def measure(model: nn.Module, tokenizer: WordTokenizer, found: scenes.Scenes) -> dict[str, float]:
    """Zero-shot accuracy by digit, and recall@1 of the first captions, as shares."""
    model.eval()
    image = torch.cat([model.encode_image(part, normalize=True) for part in normalize(found.images).split(100)])
    prompts = [template.format(digit) for digit in scenes.DIGITS for template in scenes.TEMPLATES]
    classes = model.encode_text(tokenizer(prompts), normalize=True).view(len(scenes.DIGITS), len(scenes.TEMPLATES), -1)
    right = (image @ F.normalize(classes.mean(1), dim=-1).T).argmax(1) == found.labels[:, 0]
    text = model.encode_text(tokenizer([first for first, _ in found.captions()]), normalize=True)
    similarity, own = image @ text.T, torch.arange(len(found))
    return {
        "zeroshot_top1": right.float().mean().item(),
        "image_to_text_r1": (similarity.argmax(1) == own).float().mean().item(),
        "text_to_image_r1": (similarity.argmax(0) == own).float().mean().item(),
    }


def save(model: nn.Module, tokenizer: WordTokenizer, path: Path, measured: dict[str, float], command: str) -> None:
    """Write fp16 weights with a record of their making; no dates, so that equal runs give equal files."""
    metadata = {
        "model": "tiny_clip",
        "config": configuration(tokenizer),
        "vocabulary": tokenizer.words,
        "command": command,
        "measured": {name: round(value, 4) for name, value in measured.items()},
        "scenes": "visiontok.bench.scenes.fixed_scenes",
        "data": "sklearn.datasets: load_digits (UCI optdigits, CC BY 4.0), load_sample_images (CC BY 2.0)",
        "license": "Apache-2.0",
        "versions": " ".join(
            f"{name}=={version(name)}" for name in ("torch", "open_clip_torch", "scikit-learn", "numpy")
        ),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path, {METADATA_KEY: json.dumps(metadata)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/tiny_clip_scenes.safetensors"), help="file to write")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number changes the last bits")
    parser.add_argument("--validate", action="store_true", help="leave out every fifth scan and measure on those")
    args = parser.parse_args()
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be above {WARMUP_STEPS}, the warm-up")

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    model, tokenizer = tiny_clip(False), tiny_tokenizer(False)
    initialize(model.visual)
    start = time.process_time()
    train(model, tokenizer, args)
    seconds = time.process_time() - start
    # The shipped numbers are those of the shipped weights, so round to fp16 before measuring.
    model.half().float()
    found = scenes.fixed_scenes("validation" if args.validate else "test")
    measured = measure(model, tokenizer, found)
    print(f"{measured} on {len(found)} scenes, trained in {seconds:.0f} CPU s")
    if not args.validate:
        command = (
            f"python benchmarks/train_tiny_clip.py --steps {args.steps} --seed {args.seed} "
            f"--batch-size {args.batch_size} --lr {args.lr} --threads {args.threads}"
        )
        save(model.half(), tokenizer, args.out, measured, command)
        print(f"wrote {args.out} ({args.out.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
