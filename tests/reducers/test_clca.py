"""CLCA in its released form against the schedule written out block by block, around merging and clustering reducers."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import visiontok as vt

DEPTH, LOC, WIDTH = 6, (1, 3), 12
FLAGS: dict[str, Any] = {
    "clc": True, "clc_include_gap": True, "clc_recover_at_last": True, "clc_pool_cls": False, "clc_pool_clr": False,
    "num_clr": 1, "ifa_head": True, "ifa_dws_conv_groups": 2,
}  # fmt: skip
# A reducer inside a block: tokens, sizes, keys and the end of the block to tokens and sizes; or before it.
Inner = Callable[..., tuple[Tensor, Any]]


def tiny() -> Any:
    torch.manual_seed(0)
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=5, norm_layer=norm
    )
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.double().eval()


IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def randomized(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(5)
    found = dict(parts)
    for name, part in parts.items():
        if "running_var" in name:
            found[name] = torch.rand(part.shape, generator=noise, dtype=torch.float64) + 0.5
        elif part.is_floating_point():
            found[name] = torch.randn(part.shape, generator=noise, dtype=torch.float64) * 0.5
    return found


def written_out(
    model: Any, learned: dict[str, Tensor], flags: dict[str, Any], before: Inner | None, inside: Inner | None
) -> tuple[list[int], Tensor]:
    """Lengths that every block hands on, and the logits (or the final class token without the head)."""
    count = flags["num_clr"] if flags["clc"] else 0
    x = model._pos_embed(model.patch_embed(IMAGE))
    if count:
        x = torch.cat((x, (learned["clca.clr"] + learned["clca.pos"]).expand(len(x), -1, -1)), dim=1)
    pool = x.shape[1] if flags["clc_pool_clr"] else x.shape[1] - count
    recoveries = [*LOC, *([DEPTH - 2] if flags["clc_recover_at_last"] else [])] if flags["clc"] else []
    cache: list[Tensor] = []
    cls, lengths, returned = [], [], count
    size = x.new_ones(*x.shape[:2], 1)
    for k, block in enumerate(model.blocks):
        if before is not None and k in LOC:
            x = before(x, LOC.index(k), returned)[0]
            size = x.new_ones(*x.shape[:2], 1)
        lengths.append(x.shape[1])
        q, key, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ key.mT / math.sqrt(WIDTH // 2) + size.log().view(len(x), 1, 1, -1)
        x = x + block.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        if inside is not None and k in LOC:
            x, size = inside(x, size, key.mean(dim=1), LOC.index(k))
        x = x + block.mlp(block.norm2(x))
        if k in recoveries:
            pool = x.shape[1]
            returned += sum(rows.shape[1] for rows in cache)
            x, cache = torch.cat((x, *cache), dim=1), []
            size = torch.cat((size, size.new_ones(len(x), x.shape[1] - pool, 1)), dim=1)
        if recoveries and k < recoveries[-1]:
            if flags["clc_include_gap"]:
                cache.append(x[:, 0 if flags["clc_pool_cls"] else 1 : pool].mean(dim=1, keepdim=True))
            if count:
                cache.append(x[:, -count:])
        if k in LOC or k == DEPTH - 1:
            cls.append(x[:, 0])
    lengths = [*lengths[1:], x.shape[1]]
    if not flags["ifa_head"]:
        return lengths, model.head(model.norm(x)[:, 0])
    return lengths, head(torch.stack(cls, dim=-1), learned)


def head(cls: Tensor, learned: dict[str, Tensor]) -> Tensor:
    """The convolutional head as what it is: per channel a weighted sum over layers between two fixed scalings."""

    def scaled(x: Tensor, i: int) -> Tensor:
        part = {name: learned[f"ifa_head.0.{i}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
        scale = (part["weight"] / (part["running_var"] + 1e-5).sqrt()).view(-1, 1)
        return (x - part["running_mean"].view(-1, 1)) * scale + part["bias"].view(-1, 1)

    wide = scaled(cls, 0).repeat_interleave(2, dim=1) * learned["ifa_head.0.1.weight"].squeeze(1)
    wide = scaled((wide.sum(dim=-1) + learned["ifa_head.0.1.bias"]).unsqueeze(-1), 2)
    wide = nn.functional.gelu(wide).squeeze(-1)
    return wide @ learned["ifa_head.0.4.weight"].squeeze(-1).T + learned["ifa_head.0.4.bias"]


def check(inner: Any, before: Any = None, inside: Any = None, aside: bool = False, **changed: Any) -> list[int]:
    flags = {**FLAGS, **changed}
    plain = tiny()
    red = vt.patch(
        copy.deepcopy(plain), "clca", inner=inner, reduction_loc=LOC, compat="official", aside=aside, **flags
    )
    model: Any = red.model
    learned = randomized(official_parts(flags, inner[0]))
    model.double()
    red.load_learned(learned)
    with torch.no_grad():
        lengths, logits = written_out(
            plain, learned, flags, functools.partial(before, learned) if before else None, inside
        )
        got = model(IMAGE)
    assert red.tokens == lengths
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-9)
    return lengths


def official_parts(flags: dict[str, Any], kind: str) -> dict[str, Tensor]:
    """The learned parts of a released checkpoint, by its names."""
    made: dict[str, tuple[int, ...]] = {}
    if flags["clc"] and flags["num_clr"]:
        made |= {"clca.clr": (1, flags["num_clr"], WIDTH), "clca.pos": (1, flags["num_clr"], WIDTH)}
    if flags["ifa_head"]:
        for i, channels in ((0, WIDTH), (2, 2 * WIDTH)):
            for name in ("weight", "bias", "running_mean", "running_var"):
                made[f"ifa_head.0.{i}.{name}"] = (channels,)
        made |= {"ifa_head.0.1.weight": (2 * WIDTH, 1, len(LOC) + 1), "ifa_head.0.1.bias": (2 * WIDTH,)}
        made |= {"ifa_head.0.4.weight": (5, 2 * WIDTH, 1), "ifa_head.0.4.bias": (5,)}
    for stage, clusters in enumerate((8, 4)):
        name = f"cluster_layers.{stage}."
        if kind == "patch_merger":
            made |= {f"{name}norm.weight": (WIDTH,), f"{name}norm.bias": (WIDTH,), f"{name}queries": (clusters, WIDTH)}
        elif kind == "dpc_knn":
            made |= {f"{name}score.weight": (1, WIDTH), f"{name}score.bias": (1,)}
    tensors = {name: torch.zeros(shape) for name, shape in made.items()}
    counts = {f"ifa_head.0.{i}.num_batches_tracked": torch.tensor(0) for i in (0, 2)} if flags["ifa_head"] else {}
    return tensors | counts


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"clc_pool_cls": True},
        {"clc_pool_clr": True, "num_clr": 2},
        {"clc_include_gap": False, "num_clr": 3},
        {"num_clr": 0},
        {"clc_recover_at_last": False},
        {"ifa_head": False},
        {"clc": False, "num_clr": 0},
    ],
    ids=str,
)
def test_the_cache_alone(changed: dict[str, Any]) -> None:
    lengths = check(("identity", {}), **changed)
    assert (lengths[-1] > lengths[0]) == changed.get("clc", True)


def merged(removed: tuple[int, ...], x: Tensor, size: Tensor, metric: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """ToMe pair by pair, protecting the class token; merged tokens stay in the place of their even or odd half."""
    rows, sizes = [], []
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for b in range(len(x)):
        even, odd = list(range(0, x.shape[1], 2)), list(range(1, x.shape[1], 2))
        best = {i: max(odd, key=lambda j: float(unit[b, i] @ unit[b, j])) for i in even[1:]}
        gone = sorted(best, key=lambda i: -float(unit[b, i] @ unit[b, best[i]]))[: removed[stage]]
        slots = [[i] for i in even if i not in gone] + [[j, *(i for i in gone if best[i] == j)] for j in odd]
        rows.append(torch.stack([(x[b, s] * size[b, s]).sum(dim=0) / size[b, s].sum() for s in slots]))
        sizes.append(torch.stack([size[b, s].sum().view(1) for s in slots]))
    return torch.stack(rows), torch.stack(sizes)


@pytest.mark.parametrize("changed", [{}, {"clc": False, "num_clr": 0}], ids=str)
def test_tome_counts_returned_tokens_once(changed: dict[str, Any]) -> None:
    check(("tome", {"r": {1: 8, 3: 4}}), inside=functools.partial(merged, (8, 4)), **changed)


def merger(learned: dict[str, Tensor], x: Tensor, stage: int, returned: int) -> tuple[Tensor, None]:
    """PatchMerger mixes returned tokens like patches."""
    weight, bias, queries = (learned[f"cluster_layers.{stage}.{n}"] for n in ("norm.weight", "norm.bias", "queries"))
    y = nn.functional.layer_norm(x[:, 1:], (WIDTH,), weight, bias)
    return torch.cat((x[:, :1], (queries @ y.mT).softmax(dim=-1) @ y), dim=1), None


def test_patch_merger_mixes_returned_tokens() -> None:
    check(("patch_merger", {"keep": {1: 8, 3: 4}}), before=merger)


def peaks(learned: dict[str, Tensor], x: Tensor, stage: int, returned: int) -> tuple[Tensor, None]:
    """DPC-KNN on what is neither the class token nor returned, weighted by the learned score."""
    patches, out = x[:, 1 : x.shape[1] - returned], []
    weight, bias = (learned[f"cluster_layers.{stage}.score.{n}"] for n in ("weight", "bias"))
    for rows in patches:
        n, share = len(rows), (rows @ weight.T + bias).exp()
        far = torch.tensor([[float((a - b).norm()) for b in rows] for a in rows]).double() / math.sqrt(WIDTH)
        density = [math.exp(-sum(sorted(float(d) ** 2 for d in row)[:3]) / 3) for row in far]
        gap = [min([float(far[i, j]) for j in range(n) if density[j] > density[i]], default=float(far.max()))
               for i in range(n)]  # fmt: skip
        centres = sorted(range(n), key=lambda i: -gap[i] * density[i])[: (8, 4)[stage]]
        mine = [i if i in centres else min(centres, key=lambda c, i=i: float(far[i, c])) for i in range(n)]
        members = [[i for i in range(n) if mine[i] == c] for c in centres]
        out.append(torch.stack([(rows[m] * share[m]).sum(dim=0) / (share[m].sum() + 1e-6) for m in members]))
    return torch.cat((x[:, :1], torch.stack(out), x[:, x.shape[1] - returned :]), dim=1), None


@pytest.mark.parametrize("count", [0, 2])
def test_dpc_knn_sets_returned_tokens_aside(count: int) -> None:
    inner = ("dpc_knn", {"keep": {1: 8, 3: 4}, "k_neighbors": 3, "compat": "official"})
    check(inner, before=peaks, aside=True, num_clr=count)


def test_lengths_follow_from_the_schedule() -> None:
    lengths = check(("identity", {}), num_clr=2)
    cached = list(itertools.accumulate([3] * DEPTH))
    # 3 tokens per block so far return after 1, after 3 what was cached since, and after the last but one.
    assert lengths == [19, 19 + cached[0], 19 + 3, 19 + 3 + 6, 19 + 9 + 3, 19 + 12]
