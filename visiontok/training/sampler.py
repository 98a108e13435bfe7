"""Trains a `TokenSampler`: next-token prediction on the ids of labelled images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from visiontok.errors import ParameterError
from visiontok.models.tiny import METADATA_KEY
from visiontok.tokenizers.base import Tokenizer
from visiontok.tokenizers.sampling import TokenSampler
from visiontok.training.checkpoint import TrainingError
from visiontok.training.data import preserved_rng, seed_all

__all__ = ["fit_sampler", "save_sampler"]


def fit_sampler(
    tokenizer: Tokenizer, ids: Tensor, labels: Tensor, *, width: int = 80, depth: int = 2, heads: int = 4,
    updates: int = 3000, batch_size: int = 128, lr: float = 2e-3, class_dropout: float = 0.1,
    weight_decay: float = 0.05, seed: int = 0, on_update: Callable[[int, float], object] | None = None,
) -> TokenSampler:  # fmt: skip
    """Trains a sampler from scratch.

    Args:
        tokenizer: That made the ids.
        ids: `(n, N)`.
        labels: `(n,)` classes from 0.
        width, depth, heads: Of the transformer.
        updates, batch_size, lr, weight_decay: AdamW; the rate falls along a cosine after 100 steps of warm-up.
        class_dropout: Share of rows without class, for guidance.
        seed: Of the weights and of the order.
        on_update: Called with the number of updates and the loss.

    Raises:
        ParameterError: Ids and labels that do not belong together.
        TrainingError: The loss is not finite any more.
    """
    if ids.dim() != 2 or labels.shape != ids.shape[:1]:
        raise ParameterError(f"ids must be (n, N) and labels (n,), got {tuple(ids.shape)} and {tuple(labels.shape)}.")
    config = {
        "codebook_size": tokenizer.codebook_size, "length": ids.shape[1], "classes": int(labels.max()) + 1,
        "width": width, "depth": depth, "heads": heads, "model_id": tokenizer.model_id,
    }  # fmt: skip
    with preserved_rng(torch.device("cpu")):
        seed_all(seed)
        model = TokenSampler(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=weight_decay)
        generator = torch.Generator().manual_seed(seed)
        for update in range(updates):
            rate = min(1.0, (update + 1) / 100) * (1 + math.cos(math.pi * update / updates)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            rows = torch.randint(len(ids), (batch_size,), generator=generator)
            bare = torch.rand(batch_size, generator=generator) < class_dropout
            logits = model(ids[rows], labels[rows].masked_fill(bare, config["classes"]))
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[rows].flatten())
            if not torch.isfinite(loss):
                raise TrainingError(f"the loss is {float(loss)} after {update} updates; lower lr.")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if on_update is not None:
                on_update(update + 1, float(loss.detach()))
    return model.eval()


def save_sampler(model: TokenSampler, path: str | Path, dtype: torch.dtype = torch.float16, **info: Any) -> None:
    """Writes weights and config into one `.safetensors` file, which `load_sampler` reads."""
    from safetensors.torch import save_file

    state = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    header = json.dumps({"sampler": model.config, **info}, sort_keys=True)
    save_file(state, str(path), metadata={METADATA_KEY: header})
