"""Loop-level ground truth in float64, one sample at a time, written from the papers and the golden READMEs.

Nothing here imports visiontok. Tokens are rows; `assign` is a list of slots, -1 for dropped. Ties go to the lowest
index and every order is stable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Rows = np.ndarray


class Match(NamedTuple):
    """Absolute token positions, as in `visiontok.ops.matching.Match`."""

    src: list[int]
    dst: list[int]
    order: list[int]


class Energies(NamedTuple):
    """PiToMe's decision, with positions counted without the prefix."""

    energy: list[float]
    a: list[int]
    b: list[int]
    protected: list[int]
    match: Match


def stack(one: Callable[..., Any], *batches: Any, **options: Any) -> np.ndarray:
    """Runs `one` on every sample and stacks the results."""
    return np.stack([np.asarray(one(*sample, **options)) for sample in zip(*batches)])


# ---- matching


def unit(metric: Rows) -> Rows:
    out = np.asarray(metric, dtype=np.float64).copy()
    for i in range(len(out)):
        length = math.sqrt(float((out[i] * out[i]).sum()))
        out[i] = out[i] / length if length > 0 else 0.0
    return out


def argmax(values: Sequence[float]) -> int:
    best = 0
    for i in range(1, len(values)):
        if values[i] > values[best]:
            best = i
    return best


def descending(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


def partners(metric: Rows, a: list[int], b: list[int]) -> tuple[list[float], list[int]]:
    """Best cosine of each token of a among b, and the index into b."""
    rows = unit(metric)
    scores, found = [], []
    for i in a:
        cosines = [float(rows[i] @ rows[j]) for j in b]
        best = argmax(cosines)
        scores.append(cosines[best])
        found.append(best)
    return scores, found


def bipartite(metric: Rows, a: list[int], b: list[int], r: int, ascending: bool) -> Match:
    if r == 0:
        return Match([], [], [*a, *b])
    scores, found = partners(metric, a, b)
    ranked = descending(scores)
    leaving, staying = ranked[:r], ranked[r:]
    staying = sorted(staying) if ascending else staying
    return Match([a[i] for i in leaving], [b[found[i]] for i in leaving], [a[i] for i in staying] + b)


def even_odd(metric: Rows, r: int, prefix: int) -> Match:
    length = len(metric)
    r = max(min(r, (length - prefix) // 2), 0)
    if r == 0:
        return Match([], [], list(range(prefix, length)))
    a = [i for i in range(prefix, length) if i % 2 == 0]
    b = [i for i in range(prefix, length) if i % 2 == 1]
    return bipartite(metric, a, b, r, ascending=prefix > 0)


def every_kth(metric: Rows, k: int, drop_tail: bool) -> Match:
    whole = len(metric) // k * k
    b = [i for i in range(whole) if i % k == k - 1]
    a = [i for i in range(whole) if i % k != k - 1] + ([] if drop_tail else list(range(whole, len(metric))))
    _, found = partners(metric, a, b)
    return Match(a, [b[j] for j in found], b)


def energy(metric: Rows, margin: float, alpha: float = 1.0, hinge: bool = False) -> list[float]:
    rows = unit(metric)
    out = []
    for i in range(len(rows)):
        total = 0.0
        for j in range(len(rows)):
            cosine = float(rows[i] @ rows[j])
            above, near = (cosine >= margin, cosine) if hinge else (cosine > margin, cosine - margin)
            total += near if above else alpha * math.expm1(cosine - margin)
        out.append(total / len(rows))
    return out


def gaussian_energy(metric: Rows, margin: float) -> list[float]:
    rows, sigma = unit(metric), 1 - margin
    out = []
    for i in range(len(rows)):
        total = sum(math.exp(-(((1 - float(rows[i] @ rows[j])) / sigma) ** 2) / 2) for j in range(len(rows)))
        out.append(total / len(rows) / (sigma * math.sqrt(2 * math.pi)))
    return out


def pitome(metric: Rows, r: int, kind: str, margin: float, alpha: float, prefix: int, hinge: bool = False) -> Energies:
    items = np.asarray(metric, dtype=np.float64)[prefix:]
    scores = gaussian_energy(items, margin) if kind == "text" else energy(items, margin, alpha, hinge)
    ranked = descending(scores)
    protected: list[int] = []
    if kind == "bsm_pitome":
        a, b = ranked[0::2], ranked[1::2]
        found = bipartite(items, a, b, r, ascending=False)
    else:
        movable, protected = ranked[: 2 * r], ranked[2 * r :]
        a, b = (movable[:r], movable[r:]) if kind == "text" else (movable[0::2], movable[1::2])
        _, best = partners(items, a, b) if r else ([], [])
        found = Match(a, [b[j] for j in best], protected + b)
    return Energies(scores, a, b, protected, Match(*([i + prefix for i in part] for part in found)))


# ---- moving tokens


def assignment(match: Match, length: int, prefix: int) -> tuple[list[int], int]:
    """Slots of a match: prefix, then `order`; tokens in neither list are dropped."""
    order = [*range(prefix), *match.order]
    assign = [-1] * length
    for slot, token in enumerate(order):
        assign[token] = slot
    for token, into in zip(match.src, match.dst):
        assign[token] = assign[into]
    return assign, len(order)


def members(assign: Sequence[int], slots: int) -> list[list[int]]:
    return [[i for i, slot in enumerate(assign) if slot == k] for k in range(slots)]


def group(assign: Sequence[int], slots: int) -> tuple[list[int], list[int]]:
    groups = members(assign, slots)
    csr = [0]
    for tokens in groups:
        csr.append(csr[-1] + len(tokens))
    return csr, [i for tokens in groups for i in tokens] + [i for i, slot in enumerate(assign) if slot < 0]


def segment_sum(x: Rows, assign: Sequence[int], slots: int, weight: Sequence[float] | None = None) -> Rows:
    out = np.zeros((slots, x.shape[1]))
    for i, slot in enumerate(assign):
        if slot >= 0:
            out[slot] += x[i] * (1.0 if weight is None else weight[i])
    return out


def segment_max(x: Rows, assign: Sequence[int], slots: int) -> Rows:
    out = np.zeros((slots, x.shape[1]))
    for k, tokens in enumerate(members(assign, slots)):
        for c in range(x.shape[1] if tokens else 0):
            out[k, c] = np.max([x[i, c] for i in tokens])
    return out


def reduce(x: Rows, assign: Sequence[int], slots: int, mode: str, weight: Sequence[float] | None = None) -> Rows:
    x = np.asarray(x, dtype=np.float64)
    weight = [1.0] * len(x) if weight is None else weight
    if mode == "amax":
        return segment_max(x, assign, slots)
    if mode == "sum":
        return segment_sum(x, assign, slots, weight)
    out = np.zeros((slots, x.shape[1]))
    for k, tokens in enumerate(members(assign, slots)):
        if not tokens:
            continue
        if mode == "absmax":
            for c in range(x.shape[1]):
                # Of two entries of equal magnitude the positive one.
                out[k, c] = max((x[i, c] for i in tokens), key=lambda v: (abs(v), v))
            continue
        total = sum(weight[i] for i in tokens)
        for i in tokens:
            out[k] += x[i] * (weight[i] / total if total > 0 else 0.0)
        if mode == "mlerp" and len(tokens) > 1:
            length = math.sqrt(float((out[k] ** 2).sum()))
            longest = max(math.sqrt(float((x[i] ** 2).sum())) for i in tokens)
            out[k] = out[k] / length * longest if length > 0 else 0.0
    return out


def sizes(
    assign: Sequence[int], slots: int, mass: Sequence[float] | None = None, live: int | None = None
) -> list[float]:
    mass = [1.0] * len(assign) if mass is None else mass
    out = [float(sum(mass[i] for i in tokens)) for tokens in members(assign, slots)]
    return out if live is None else [size if k < live else 0.0 for k, size in enumerate(out)]


def restore(y: Rows, assign: Sequence[int], fill: str, x: Rows | None = None, prefix: int = 0) -> Rows:
    out = np.zeros((len(assign), y.shape[1]))
    # A dropped patch never takes the value of a class token just because that comes first in the sequence.
    kept = [i for i, slot in enumerate(assign) if slot >= 0 and i >= prefix]
    for i, slot in enumerate(assign):
        if slot >= 0:
            out[i] = y[slot]
        elif fill == "mean":
            out[i] = y.mean(axis=0)
        elif fill == "self" and x is not None:
            out[i] = x[i]
        elif fill == "nearest":
            near = min(kept, key=lambda j: (abs(i - j), j)) if kept else None
            out[i] = y[0 if near is None else assign[near]]
    return out


def compose(first: Sequence[int], later: Sequence[int]) -> list[int]:
    return [-1 if slot < 0 else later[slot] for slot in first]


def one_hot(assign: Sequence[int], slots: int) -> Rows:
    """(slots, N) 0/1 matrix: which current token holds which original one."""
    out = np.zeros((slots, len(assign)))
    for i, slot in enumerate(assign):
        if slot >= 0:
            out[slot, i] = 1.0
    return out


# ---- a whole model


def _norm(x: Rows, weight: Rows, bias: Rows, eps: float) -> Rows:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


def _gelu(x: Rows) -> Rows:
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


class VisionTransformer:
    """A pre-norm ViT on one image, from a timm state dict, with a point between attention and MLP of each block.

    Args:
        weights: timm names to float64 arrays.
        heads: Attention heads.
        eps: Of every LayerNorm.
    """

    def __init__(self, weights: dict[str, Rows], heads: int, eps: float = 1e-6) -> None:
        self.weights, self.heads, self.eps = weights, heads, eps
        self.depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))

    def _linear(self, name: str, x: Rows) -> Rows:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Rows) -> Rows:
        return _norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.eps)

    def embed(self, image: Rows) -> Rows:
        kernel = self.weights["patch_embed.proj.weight"]
        p = kernel.shape[-1]
        rows = []
        for top in range(0, image.shape[1], p):
            for left in range(0, image.shape[2], p):
                patch = image[:, top : top + p, left : left + p]
                rows.append(np.tensordot(kernel, patch, axes=3) + self.weights["patch_embed.proj.bias"])
        lead = [self.weights[name][0] for name in ("cls_token", "dist_token") if name in self.weights]
        return np.concatenate([*lead, np.stack(rows)]) + self.weights["pos_embed"][0]

    def attention(self, block: str, x: Rows, bias: Rows | None) -> tuple[Rows, Rows]:
        """The branch's output and the head-averaged keys."""
        width = x.shape[1] // self.heads
        qkv = self._linear(f"{block}.attn.qkv", x).reshape(len(x), 3, self.heads, width)
        out = []
        for head in range(self.heads):
            q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
            logits = q @ k.T / math.sqrt(width) + (0.0 if bias is None else bias[None, :])
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        return self._linear(f"{block}.attn.proj", np.concatenate(out, axis=1)), qkv[:, 1].mean(axis=1)

    def mlp(self, block: str, x: Rows) -> Rows:
        return self._linear(f"{block}.mlp.fc2", _gelu(self._linear(f"{block}.mlp.fc1", x)))

    def run(
        self, image: Rows, decide: Callable[[int, Rows, Rows], tuple[list[int], int] | None], proportional: bool
    ) -> Any:
        """Forward of one image.

        Args:
            image: (3, H, W).
            decide: From layer, metric and hidden state to (assign, slots), or None for no reduction.
            proportional: Whether attention adds log(size) once something was merged.

        Returns:
            The last hidden state, the last sizes, and per layer a dict of hidden, size, group, metric.
        """
        x = self.embed(image)
        size, place, layers = np.ones(len(x)), list(range(len(x))), []
        merged = False
        for i in range(self.depth):
            block = f"blocks.{i}"
            y, metric = self.attention(
                block, self.norm(f"{block}.norm1", x), np.log(size) if proportional and merged else None
            )
            x = x + y
            found = decide(i, metric, x)
            note: dict[str, Any] = {}
            if found is not None:
                note["metric"], note["residual"], merged = metric, x, True
                assign, slots = found
                x = reduce(x, assign, slots, "mean", size)
                size, place = np.array(sizes(assign, slots, size)), compose(place, assign)
            x = x + self.mlp(block, self.norm(f"{block}.norm2", x))
            layers.append({**note, "hidden": x, "size": size, "group": np.array(place)})
        return x, size, layers
