"""New images: an autoregressive model of the tokens, class by class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from visiontok.errors import FormatError, ParameterError
from visiontok.models.tiny import METADATA_KEY, WEIGHTS_DIR

__all__ = ["TokenSampler", "load_sampler"]


class TokenSampler(nn.Module):
    """A small GPT over the ids of a 1D tokenizer; the class stands before the first token.

    Args:
        config: "codebook_size", "length", "classes", "width", "depth", "heads", and "model_id" of the tokenizer.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        width = config["width"]
        self.tokens = nn.Embedding(config["codebook_size"], width)
        # The last class is none at all: for guidance.
        self.classes = nn.Embedding(config["classes"] + 1, width)
        self.positions = nn.Parameter(torch.randn(config["length"], width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, config["heads"]) for _ in range(config["depth"]))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config["codebook_size"])

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Logits of each token given those before it.

        Args:
            ids: `(B, k)`.
            labels: `(B,)`; the number of classes means none.

        Returns:
            `(B, k, codebook_size)`.
        """
        x = torch.cat([self.classes(labels)[:, None], self.tokens(ids[:, :-1])], 1)
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x, _ = block(x, None)
        return self.head(self.norm(x))

    @torch.no_grad()
    def sample(
        self, labels: Tensor, *, tokens: int | None = None, temperature: float = 1.0, top_k: int | None = None,
        guidance: float = 1.0, seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """Draws ids.

        Args:
            labels: `(B,)` classes; the number of classes means any.
            tokens: Length, default all.
            temperature: Of the softmax; 0 takes the likeliest.
            top_k: Draw among the likeliest only.
            guidance: Classifier-free guidance of the logits; 1 is none.
            seed: Of the draws.

        Returns:
            `(B, tokens)` int64.

        Raises:
            ParameterError: A label, length, temperature or top_k out of range.
        """
        count = self.config["length"] if tokens is None else tokens
        none, size = self.config["classes"], self.config["codebook_size"]
        if not 1 <= count <= self.config["length"] or temperature < 0 or not (size if top_k is None else top_k) >= 1:
            raise ParameterError(
                f"tokens must be 1 to {self.config['length']}, temperature at least 0 and top_k at least 1; "
                f"got {tokens}, {temperature} and {top_k}."
            )
        if labels.dim() != 1 or (labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) <= none)):
            raise ParameterError(f"labels must be (B,) in [0, {none}], got {labels.tolist()}.")
        generator = torch.Generator().manual_seed(seed)
        guided = guidance != 1.0
        given = torch.cat([labels, torch.full_like(labels, none)]) if guided else labels
        caches: list[Any] = [None] * len(self.blocks)
        x, ids = self.classes(given), []
        for place in range(count):
            h = (x + self.positions[place])[:, None]
            for number, block in enumerate(self.blocks):
                h, caches[number] = block(h, caches[number])
            logits = self.head(self.norm(h[:, 0])).float()
            if guided:
                with_class, without = logits.chunk(2)
                logits = without + guidance * (with_class - without)
            drawn = _draw(logits, temperature, top_k, generator)
            ids.append(drawn)
            x = self.tokens(torch.cat([drawn, drawn]) if guided else drawn)
        return torch.stack(ids, 1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=cache is None and x.shape[1] > 1)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x)))), (k, v)


def load_sampler(source: str | Path | None = None) -> TokenSampler:
    """A sampler with its weights.

    Args:
        source: A `.safetensors` file; None for the shipped one: handwritten digits as tokens of "tiny_one_d_piece".

    Raises:
        FormatError: Not a sampler's file.
    """
    from safetensors import SafetensorError, safe_open

    path = WEIGHTS_DIR / "tiny_one_d_piece_sampler.safetensors" if source is None else Path(source)
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[METADATA_KEY])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        model = TokenSampler(header["sampler"])
        model.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{path} holds no sampler of tokens: {error}") from None
    return model.eval()


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    share = (logits / temperature).softmax(-1).cpu()
    return torch.multinomial(share, 1, generator=generator)[:, 0].to(logits.device)
