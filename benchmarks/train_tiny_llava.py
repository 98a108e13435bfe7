"""Train the tiny LLaVA that ships with visiontok on rendered scenes with questions, on one CPU core.

    python benchmarks/train_tiny_llava.py --out visiontok/models/weights/tiny_llava_questions.safetensors

Each step draws new scenes and asks several questions of each: they share the image's tokens, and a block mask keeps
them from seeing one another, so each is answered as if it were alone. Two heads that are not kept help the tower: one
says what lies under a patch, one lists from the class token what is in the picture (no answer needs the class token, so
without it the class token would learn nothing). For the first `--tower-steps` there are only these two. The held-out
scenes are looked at only by the run that writes the file, the last step is saved, never the best one; `--validate`
leaves out every fifth scan and measures on those instead.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from visiontok.bench import questions, scenes
from visiontok.models.tiny import METADATA_KEY
from visiontok.models.tiny_llava import MEAN, NAME, PATCH, PROMPT, STD, checksum, configuration, tiny_llava
from visiontok.models.tiny_llava import tiny_processor as build_processor
from visiontok.models.tiny_llava import vocabulary as all_tokens

WARMUP_STEPS = 100
REACH = 0.27  # of an object from its centre, where the picture reaches from -1 to 1
SIDE = questions.SIDE // PATCH


class Helpers(nn.Module):
    """The heads that teach the tower and are thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, len(questions.OBJECTS) + 1)
        self.colour = nn.Linear(width, len(scenes.COLOURS))
        self.listed = nn.Linear(width, len(questions.OBJECTS))

    def forward(self, patches: Tensor, summary: Tensor, found: questions.Questioned) -> Tensor:
        """The mean of three losses, from patches `(B, n, C)` and the class token `(B, C)`."""
        kinds, colours = under_patches(found.objects), under_patches(found.colours)
        colour = F.cross_entropy(self.colour(patches).flatten(0, 1), colours.flatten(), ignore_index=-1)
        kind = F.cross_entropy(self.kind(patches).flatten(0, 1), (kinds + 1).flatten())
        there = F.one_hot(found.objects + 1, len(questions.OBJECTS) + 1).amax(1)[:, 1:].float()
        return kind + colour / 2 + F.binary_cross_entropy_with_logits(self.listed(summary), there)


class Encoder:
    """Questions and answers as ids, from texts as the model will read them."""

    def __init__(self) -> None:
        self.tokenizer = build_processor(False).tokenizer
        self.known: dict[questions.Question, tuple[list[int], list[int]]] = {}
        before, after = PROMPT.split("<image>")
        self.head = self.tokenizer(before)["input_ids"]
        self.tail = after

    def __call__(self, question: questions.Question) -> tuple[list[int], list[int]]:
        """Ids of what follows the image, and of the answer with the end token."""
        if question not in self.known:
            options = {"add_special_tokens": False}
            ids = self.tokenizer(self.tail.format(question.text), **options)["input_ids"]
            answer = self.tokenizer(question.answer, **options)["input_ids"]
            self.known[question] = ids, [*answer, self.tokenizer.eos_token_id]
        return self.known[question]


def under_patches(values: Tensor) -> Tensor:
    """What `(B, 9)` at the places is under each of the patches `(B, 64)`, -1 for nothing."""
    middle = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    cell = (middle / questions.CELL).round().clamp(-1, 1)
    near = (middle - cell * questions.CELL).abs() < REACH
    place = (cell[:, None] * 3 + cell[None] + 4).long().flatten()
    return values[:, place].masked_fill(~(near[:, None] & near[None]).flatten(), -1)


def pixels(images: Tensor) -> Tensor:
    """uint8 as the processor normalizes it."""
    return (images.float() / 255 - MEAN[0]) / STD[0]


def loss(
    model: Any, helpers: Helpers, encode: Encoder, found: questions.Questioned, answering: bool, dropout: float
) -> tuple[Tensor, Tensor]:
    """The loss, and the share of the answers whose words are all right given those before.

    Without `answering` only the tower and the helpers run, and no answer is right; `dropout` is the chance that the
    decoder sees a part of the patches only (`thin_out`).
    """
    tower = model.model.vision_tower(pixels(found.images), output_hidden_states=True)
    patches = tower.hidden_states[-2][:, 1:]
    helped = helpers(patches, tower.pooler_output, found)
    if not answering:
        return helped, torch.zeros(())
    visual = model.model.multi_modal_projector(patches if torch.rand(()) >= dropout else thin_out(patches))
    ids, labels, positions, mask = layout(encode, found, visual.shape[1])
    embed = model.get_input_embeddings()
    head = embed(torch.tensor(encode.head)).expand(len(found), -1, -1)
    text = model.model.language_model(
        inputs_embeds=torch.cat([head, visual, embed(ids)], dim=1), attention_mask=mask, position_ids=positions
    ).last_hidden_state[:, -ids.shape[1] :]
    said = labels >= 0
    logits = model.lm_head(text[said])
    wrong = torch.zeros_like(labels).masked_scatter_(said, (logits.argmax(-1) != labels[said]).long())
    rows = wrong.view(len(found), len(found.questions[0]), -1).sum(-1)
    answers = F.cross_entropy(logits, labels[said])
    return answers + helped / 2, (rows == 0).float().mean()


def thin_out(patches: Tensor) -> Tensor:
    """Patch dropout: a random quarter to all of the patches `(B, n, C)`, in their order.

    Without it so small a decoder counts by the share of patches that look like a digit, and any reduction that keeps
    what matters changes the share.
    """
    count, n = patches.shape[:2]
    kept = int(torch.randint(n // 4, n + 1, ()))
    order = torch.rand(count, n).argsort(1)[:, :kept].sort(1).values
    return patches.gather(1, order.unsqueeze(-1).expand(-1, -1, patches.shape[2]))


def layout(encode: Encoder, found: questions.Questioned, visual: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, labels `(B, T)` and positions of all questions of a batch side by side, and who may see whom."""
    coded = [[encode(question) for question in asked] for asked in found.questions]
    width = max(len(ids) + len(answer) for asked in coded for ids, answer in asked)
    count, each = len(coded), len(coded[0])
    ids = np.zeros((count, each, width), dtype=np.int64)
    labels = np.full((count, each, width), -1, dtype=np.int64)
    for row, asked in enumerate(coded):
        for number, (question, answer) in enumerate(asked):
            line = question + answer[:-1]
            ids[row, number, : len(line)] = line
            labels[row, number, len(question) - 1 : len(line)] = answer
    shared = len(encode.head) + visual
    positions = torch.cat([torch.arange(shared), (torch.arange(width) + shared).repeat(each)])
    block = torch.cat([torch.zeros(shared, dtype=torch.int64), torch.arange(each).repeat_interleave(width) + 1])
    own = (block[:, None] == block[None]) | (block[None] == 0)
    seen = own & torch.ones(len(block), len(block), dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    flat = torch.from_numpy(ids).flatten(1), torch.from_numpy(labels).flatten(1)
    return *flat, positions.expand(count, -1), mask.expand(count, 1, -1, -1)


def train(model: Any, args: argparse.Namespace) -> None:
    """AdamW, warm-up and cosine, new scenes in every step."""
    helpers, encode = Helpers(model.config.vision_config.hidden_size), Encoder()
    trained = [*model.parameters(), *helpers.parameters()]
    decay = [p for p in trained if p.ndim > 1]
    rest = [p for p in trained if p.ndim <= 1]
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
    running = 0.0
    progress = tqdm(range(args.steps), desc=NAME, unit="step", mininterval=5)
    for step in progress:
        found = questions.random_questions(part, args.batch_size, args.questions, random)
        value, right = loss(model, helpers, encode, found, step >= args.tower_steps, args.patch_dropout)
        running = 0.98 * running + 0.02 * right.item()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(refresh=False, loss=f"{value.item():.3f}", right=f"{running:.3f}")


@torch.inference_mode()
def measure(model: Any, part: str) -> dict[str, Any]:
    """Exact match of generated answers, overall and by kind, and what the most frequent answer of a kind would get."""
    model.eval()
    found, processor = questions.fixed_questions(part), build_processor(False)
    right: dict[str, list[bool]] = defaultdict(list)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for start in range(0, len(found), 50):
        rows = range(start, min(start + 50, len(found)))
        asked = [(row, question) for row in rows for question in found.questions[row]]
        texts = [PROMPT.format(question.text) for _, question in asked]
        images = [found.image(row) for row, _ in asked]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(ids, skip_special_tokens=True)
        for (_, question), text in zip(asked, said):
            right[question.kind].append(text == question.answer)
            answers[question.kind][question.answer] += 1
    total = sum(map(len, right.values()))
    return {
        "exact_match": sum(map(sum, right.values())) / total,
        "chance": sum(counts.most_common(1)[0][1] for counts in answers.values()) / total,
        **{kind: sum(right[kind]) / len(right[kind]) for kind in questions.KINDS},
    }


def save(model: Any, path: Path, measured: dict[str, float], command: str) -> None:
    """Write fp16 weights with a record of their making; no dates, so that equal runs give equal files."""
    tokens, state = all_tokens(False), model.state_dict()
    metadata = {
        "model": NAME,
        "config": configuration(tokens),
        "vocabulary": tokens,
        "sha256": checksum(state),
        "command": command,
        "measured": {name: round(value, 4) for name, value in measured.items()},
        "questions": "visiontok.bench.questions.fixed_questions",
        "data": "sklearn.datasets: load_digits (UCI optdigits, CC BY 4.0), load_sample_images (CC BY 2.0)",
        "license": "Apache-2.0",
        "versions": " ".join(f"{name}=={version(name)}" for name in ("torch", "transformers", "scikit-learn", "numpy")),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, {METADATA_KEY: json.dumps(metadata)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/tiny_llava_questions.safetensors"), help="the file")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--tower-steps", type=int, default=1300, help="of these, the first that train the tower only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32, help="scenes per step")
    parser.add_argument("--questions", type=int, default=4, help="questions of each scene of a step")
    parser.add_argument("--patch-dropout", type=float, default=0.0, help="share of the batches that lose patches")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number changes the last bits")
    parser.add_argument("--validate", action="store_true", help="leave out every fifth scan and measure on those")
    args = parser.parse_args()
    if args.steps <= max(WARMUP_STEPS, args.tower_steps):
        parser.error(f"--steps must be above {WARMUP_STEPS}, the warm-up, and above --tower-steps")

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    model: Any = tiny_llava(False)
    start = time.process_time()
    train(model, args)
    seconds = time.process_time() - start
    # The shipped numbers are those of the shipped weights, so round to fp16 before measuring.
    model.half().float()
    measured = measure(model, "validation" if args.validate else "test")
    print(f"{measured}, trained in {seconds:.0f} CPU s")
    if not args.validate:
        command = (
            f"python benchmarks/train_tiny_llava.py --steps {args.steps} --tower-steps {args.tower_steps} "
            f"--seed {args.seed} --batch-size {args.batch_size} --questions {args.questions} "
            f"--patch-dropout {args.patch_dropout} --lr {args.lr} --threads {args.threads}"
        )
        save(model.half(), args.out, measured, command)
        print(f"wrote {args.out} ({args.out.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
