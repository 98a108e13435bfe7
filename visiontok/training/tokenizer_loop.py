"""The training loop of tokenizers: AdamW, warm-up and cosine, averaged weights, AMP, exact resume.

Everything random is a function of the seed and the update, so a run that was killed and resumed ends, on one CPU, with
the same weights bit for bit as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from visiontok.bench.progress import bar
from visiontok.errors import FormatError, ParameterError
from visiontok.tokenizers import registry
from visiontok.tokenizers.base import Tokenizer
from visiontok.tokenizers.checkpoint import save_weights
from visiontok.tokenizers.pictures import fitted
from visiontok.training import checkpoint
from visiontok.training.checkpoint import TrainingError
from visiontok.training.data import jitter, mix, preserved_rng, seed_all
from visiontok.training.tokenizer_config import TokenizerRecipe
from visiontok.training.tokenizer_losses import Codes, make_objective

__all__ = ["DigitImages", "FolderImages", "TokenizerResult", "fit_tokenizer"]

_BUILD, _UPDATE, _ORDER = 1, 2, 3
WEIGHTS = "model.safetensors"


@dataclass
class TokenizerResult:
    """A finished run.

    Attributes:
        tokenizer: In eval mode, with the averaged weights if the recipe asks for them.
        records: The log.
        output: Folder that was written, or None.
    """

    tokenizer: Tokenizer
    records: list[dict[str, Any]] = field(default_factory=list)
    output: Path | None = None


class DigitImages(Dataset[Tensor]):
    """scikit-learn's digits in a tokenizer's size: `(3, size, size)` in [0, 1].

    Args:
        size: Pixels.
        part: "train" (1297 scans) or "test" (500).
    """

    def __init__(self, size: int, part: str = "train") -> None:
        from visiontok.models.tiny import digits_split

        split = digits_split()
        count = len(split.train_labels if part == "train" else split.test_labels)
        self.images = torch.stack([fitted(split.image(i, part), size) for i in range(count)])
        self.labels = split.train_labels if part == "train" else split.test_labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class FolderImages(Dataset[Tensor]):
    """All pictures below a folder, each the middle square in a tokenizer's size.

    Raises:
        ParameterError: There is none.
    """

    def __init__(self, folder: str | Path, size: int) -> None:
        from visiontok.bench.data import images_below

        self.paths = images_below(Path(folder))
        self.size = size
        if not self.paths:
            raise ParameterError(f"'{folder}' holds no pictures.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        from visiontok.bench.data import open_image

        return fitted(open_image(self.paths[index]), self.size)


def fit_tokenizer(
    recipe: TokenizerRecipe, *, data: Dataset[Tensor] | None = None, output: str | Path | None = None,
    resume: bool = False, initial: Tokenizer | None = None, codes: Codes | None = None, device: str = "cpu",
    on_update: Callable[[int], object] | None = None, quiet: bool = True,
) -> TokenizerResult:  # fmt: skip
    """Trains a tokenizer.

    Args:
        recipe: The run.
        data: Images `(3, S, S)` in [0, 1]; default the digits.
        output: Folder for `log.jsonl`, `checkpoint.pt` and `model.safetensors`, which `tokenizers.load` reads.
        resume: Continue from the checkpoint in `output`, if there is one.
        initial: A tokenizer to go on with (for a second stage); it is trained in place.
        codes: For the stage "proxy": a teacher's codes `(B, P)` of images.
        device: A torch device.
        on_update: Called with the number of updates done.
        quiet: No progress bar.

    Raises:
        ParameterError: The recipe and the arguments do not go together, or `output` holds another run.
        TrainingError: The loss is not finite any more, or files cannot be written.
        FormatError: The checkpoint cannot be read.
    """
    folder = None if output is None else Path(output)
    stored = _stored(recipe, folder, resume)
    with preserved_rng(torch.device(device)):
        seed_all(recipe.seed, _BUILD)
        model: Any = registry.get(recipe.family)
        model = initial if initial is not None else model(recipe.model)
        run = _Run(recipe, model.to(device), data, codes, stored, folder)
        return run.train(on_update, quiet)


class _Run:
    def __init__(
        self, recipe: TokenizerRecipe, model: Any, data: Dataset[Tensor] | None, codes: Codes | None,
        stored: dict[str, Any] | None, output: Path | None,
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.output = recipe, model, output
        self.data: Any = DigitImages(model.image_size) if data is None else data
        if len(self.data) < recipe.batch_size:
            raise ParameterError(f"batch_size {recipe.batch_size} is more than the {len(self.data)} images there are.")
        self.objective = make_objective(recipe, model, codes).to(model.device)
        self.optimizer = self._optimizer()
        average = get_ema_multi_avg_fn(recipe.ema)
        self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=False) if recipe.ema else None
        self.updates = 0
        if stored is not None:
            self._restore(stored)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        self.log = checkpoint.Log(None if output is None else output / checkpoint.LOG, self.updates)

    def _optimizer(self) -> torch.optim.Optimizer:
        wanted = {id(p) for p in self.objective.trained(self.model)}
        named = [(n, p) for n, p in self.model.named_parameters() if id(p) in wanted]
        named += [(n, p) for n, p in self.objective.named_parameters() if p.requires_grad]
        bare = ("embedding", "latent_tokens", "registers", "token", "nullcond", "posembs")
        free = [p for n, p in named if p.ndim < 2 or n.rpartition(".")[2] in bare or any(b in n for b in bare)]
        seen = {id(p) for p in free}
        decayed = [p for _, p in named if id(p) not in seen]
        groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, self.recipe.lr, self.recipe.betas, weight_decay=self.recipe.weight_decay)

    def rate(self) -> float:
        """The learning rate of the next update."""
        recipe = self.recipe
        if self.updates < recipe.warmup:
            return recipe.lr * (self.updates + 1) / recipe.warmup
        done = (self.updates - recipe.warmup) / max(1, recipe.updates - recipe.warmup)
        return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2

    def train(self, on_update: Callable[[int], object] | None, quiet: bool) -> TokenizerResult:
        recipe = self.recipe
        self.model.train()
        with bar(recipe.updates, "train", quiet) as progress:
            progress.update(self.updates)
            while self.updates < recipe.updates:
                rate = self.rate()
                values = self._step(rate)
                progress.update()
                if self.updates % recipe.log_every == 0:
                    # Only here the loss is read: a read waits for the device.
                    numbers = {name: float(value) for name, value in values.items()}
                    self._check(numbers)
                    progress.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
                    self.log.write(kind="train", updates=self.updates, lr=rate, **numbers)
                if on_update is not None:
                    on_update(self.updates)
                if self.updates % recipe.checkpoint_every == 0 and self.updates < recipe.updates:
                    self._save()
        self._save()
        return self._finish()

    def _step(self, rate: float) -> dict[str, Tensor]:
        recipe = self.recipe
        seed_all(recipe.seed, _UPDATE, self.updates)
        images = self._batch()
        rng = np.random.RandomState(mix(recipe.seed, _UPDATE, self.updates) & 0xFFFFFFFF)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=recipe.amp):
            losses = self.objective(self.model, images, rng)
        losses["loss"].backward()
        if recipe.clip_grad is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
        self.optimizer.step()
        self.updates += 1
        self.objective.after(self.model, self.updates, rate)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return {name: value.detach() for name, value in losses.items()}

    def _batch(self) -> Tensor:
        recipe, size = self.recipe, self.recipe.batch_size
        per_epoch = len(self.data) // size
        epoch, place = divmod(self.updates, per_epoch)
        order = torch.Generator().manual_seed(mix(recipe.seed, _ORDER, epoch))
        chosen = torch.randperm(len(self.data), generator=order)[place * size : (place + 1) * size]
        images = torch.stack([self.data[int(i)] for i in chosen])
        if recipe.augment:
            images = ((jitter(images * 2 - 1) + 1) / 2).clamp(0, 1)
        return images.to(self.model.device)

    def _check(self, values: dict[str, float]) -> None:
        if not all(math.isfinite(value) for value in values.values()):
            parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise TrainingError(
                f"the loss is not finite at update {self.updates} ({parts}); try a lower lr, more warmup or no amp. "
                "The last checkpoint is from before"
            )

    def _save(self) -> None:
        if self.output is None:
            return
        values = {
            "config": json.dumps(self.recipe.to_dict()), "epoch": 0, "update": self.updates, "updates": self.updates,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(), "scaler": {},
            "extra": self.objective.state_dict(), "loss_sum": {},
        }  # fmt: skip
        checkpoint.save(self.output / checkpoint.CHECKPOINT, values)

    def _restore(self, stored: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(stored["model"])
            self.optimizer.load_state_dict(stored["optimizer"])
            self.objective.load_state_dict(stored["extra"])
            if self.ema is not None:
                self.ema.load_state_dict(stored["ema"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"the checkpoint does not fit this run: {str(error).splitlines()[0]}") from error
        self.updates = stored["updates"]

    def _finish(self) -> TokenizerResult:
        model: Any = self.model if self.ema is None else self.ema.module
        model.eval()
        model.identify()
        if self.output is not None:
            save_weights(model, self.output / WEIGHTS, recipe=self.recipe.to_dict())
        return TokenizerResult(model, self.log.records, self.output)


def _stored(recipe: TokenizerRecipe, folder: Path | None, resume: bool) -> dict[str, Any] | None:
    if folder is None:
        if resume:
            raise ParameterError("resume continues a run in its output folder; give output.")
        return None
    path = folder / checkpoint.CHECKPOINT
    if not path.exists():
        return None
    if not resume:
        raise ParameterError(f"{folder} holds a run already; continue it with resume or choose another output.")
    stored = checkpoint.load(path)
    old, new = json.loads(stored["config"]), json.loads(json.dumps(recipe.to_dict()))
    changed = [f"{key}: {old.get(key)!r}, now {new[key]!r}" for key in new if old.get(key) != new[key]]
    if changed:
        raise ParameterError(f"'{path}' is of another run: {', '.join(changed)}. Resume with its own settings.")
    return stored
