"""PiToMe on BLIP-2's EVA ViT: a file laid out as the README says, from loops, passes; a wrong one does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import test_golden
import torch
from golden_case import Case
from test_golden_runner import rows, typed, write

WIDTH, HEADS, DEPTH, RATIO = 24, 3, 4, 0.8
KINDS = ["protect"] * DEPTH
MARGINS = [0.75 - 0.4 * (i / DEPTH) for i in range(DEPTH)]


class Eva(naive.VisionTransformer):
    """Queries and values have a bias, keys have none."""

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        if not name.endswith("qkv"):
            return super()._linear(name, x)
        q, v = (self.weights[name.replace("qkv", bias)] for bias in ("q_bias", "v_bias"))
        return x @ self.weights[f"{name}.weight"].T + np.concatenate((q, np.zeros_like(q), v))


def weights(seed: int) -> dict[str, np.ndarray]:
    """A random state dict with LAVIS's names, fp32 values in float64."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 17, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, 4, 4),
        "patch_embed.proj.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(DEPTH):
        at = f"blocks.{i}."
        shapes |= {f"{at}attn.qkv.weight": (3 * WIDTH, WIDTH), f"{at}attn.q_bias": (WIDTH,),
                   f"{at}attn.v_bias": (WIDTH,)}  # fmt: skip
        for name, out, into in (("attn.proj", WIDTH, WIDTH), ("mlp.fc1", 50, WIDTH), ("mlp.fc2", WIDTH, 50)):
            shapes |= {f"{at}{name}.weight": (out, into), f"{at}{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"{at}{name}.weight": (WIDTH,), f"{at}{name}.bias": (WIDTH,)}
    draw = np.random.default_rng(seed)
    return {
        name: np.float64(np.float32(draw.standard_normal(shape) * 0.2 + ("norm" in name and name.endswith("weight"))))
        for name, shape in shapes.items()
    }


def find(layer: int, metric: np.ndarray) -> naive.Energies:
    items = len(metric) - 1
    return naive.pitome(metric, math.floor(items - items * RATIO), "protect", MARGINS[layer], 1.0, 1)


def decide(layer: int, metric: np.ndarray, hidden: np.ndarray) -> Any:
    match = find(layer, metric).match
    return naive.assignment(match, len(metric), 1)


def blip2(path: Path, dtype: torch.dtype, proportional: bool = True) -> Case:
    state = weights(7)
    model = Eva(state, HEADS)
    images = np.float64(np.float32(rows(5, 2, 3, 16, 16)))
    plain = [model.run(image, lambda *_: None, False) for image in images]
    ran = [model.run(image, decide, proportional) for image in images]
    tensors: dict[str, Any] = {"in.x": images, **{f"weight.{name}": value for name, value in state.items()}}
    tensors["out.baseline"] = np.stack([x for x, _, _ in plain])
    tensors["out.y"] = np.stack([x for x, _, _ in ran])
    for i in range(DEPTH):
        layers = [layers[i] for _, _, layers in ran]
        found = [find(i, layer["metric"]) for layer in layers]
        saved = {name: [layer[name] for layer in layers] for name in ("hidden", "size", "group", "metric")}
        saved |= {"a_idx": [one.a for one in found], "b_idx": [one.b for one in found],
                  "protected_idx": [one.protected for one in found],
                  "dst_idx": [[one.b.index(slot - 1) for slot in one.match.dst] for one in found]}  # fmt: skip
        tensors |= {f"out.layer{i}.{name}": np.array(value) for name, value in saved.items()}
    tokens = [len(layer["hidden"]) for layer in ran[0][2]]
    tensors = typed(tensors, dtype)
    tensors["out.tokens"] = torch.tensor(tokens)
    params = {"img_size": 16, "patch_size": 4, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS,
              "mlp_ratio": 50 / 24, "qkv_bias": True, "norm_eps": 1e-6, "patch": "blip2", "ratio": RATIO,
              "kinds": KINDS, "margins": MARGINS, "alpha": 1.0, "tokens_per_layer": tokens}  # fmt: skip
    return write(path, "pitome", "model", params, tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blip2_model(tmp_path: Path, dtype: torch.dtype) -> None:
    case = blip2(tmp_path, dtype)
    assert test_golden.skip_reason(case) is None
    test_golden.run(case)
    assert case.params["tokens_per_layer"] == [14, 12, 10, 9]


def test_attention_without_sizes_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="off by"):
        test_golden.run(blip2(tmp_path, torch.float64, proportional=False))
