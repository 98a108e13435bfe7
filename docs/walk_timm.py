"""Walks the names of timm's ViT families and tells for each whether visiontok runs it, or why not.

python docs/walk_timm.py        # prints the table
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import visiontok as vt

HYBRIDS = "vision_transformer_hybrid"
FAMILIES = ("vision_transformer", HYBRIDS, "deit", "eva", "vision_transformer_relpos", "beit", "cait")
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
# Some list the key heads of each block: all heads in some, fewer in the others.
GROUPED = {**TINY, "num_kv_heads": (3, 1)}
# What stands before the blocks of a hybrid fixes its patches; MobileCLIP's fixes their width too.
HYBRID = {key: value for key, value in TINY.items() if key != "patch_size"} | {"img_size": 64}
WIDE = {key: value for key, value in HYBRID.items() if key not in ("embed_dim", "num_heads")}
# The method that must run for a model to count as supported, and what it removes per block.
REDUCER, REMOVED = "tome", 2


class Row(NamedTuple):
    """One name of timm.

    Attributes:
        name: As `timm.create_model` takes it.
        kind: The model's class.
        blocks: Class of its blocks, with the attention's where that is not the plain one.
        positions: What tells tokens their place.
        prefix: Leading tokens that are no patches.
        pool: How the head reads the tokens.
        config: Number of the distinct structure that it shares with others.
        reason: Why it is refused; empty if it is supported.
    """

    name: str
    kind: str
    blocks: str
    positions: str
    prefix: int
    pool: str
    config: int
    reason: str


def names() -> list[str]:
    """All names whose entry point lies in one of the families."""
    return [name for family in FAMILIES for name in timm.list_models(module=family)]


@torch.no_grad()
def walk() -> list[Row]:
    """Makes every model at a tiny size, and runs one of each structure.

    Raises:
        RuntimeError: A model that counts as supported does not run as it must.
    """
    numbers: dict[Any, int] = {}
    reasons: dict[int, str] = {}
    rows: list[Row] = []
    hybrids = set(timm.list_models(module=HYBRIDS))
    for name in names():
        # Convolutional stems come at full size only; without weights they cost little.
        model = tiny(name, "meta" if name in hybrids else "cpu")
        number = numbers.setdefault(structure(model), len(numbers))
        if number not in reasons:
            reasons[number] = refusal(name, tiny(name) if name in hybrids else model)
        rows.append(row(name, model, number, reasons[number]))
    return rows


def tiny(name: str, device: str = "cpu") -> Any:
    """The model at the smallest size that its entry point allows, every structural option as it is."""
    create: Any = timm.create_model
    sizes = (HYBRID, WIDE) if name in timm.list_models(module=HYBRIDS) else (TINY, GROUPED)
    for size in sizes:
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                torch.manual_seed(0)
                return create(name, **size).eval()
        except AssertionError:
            if size is sizes[-1]:
                raise


def structure(model: nn.Module) -> Any:
    """What distinguishes models beyond their sizes: the tree of modules, their flags, the parameters that they have."""
    parts: list[Any] = [getattr(model, "num_prefix_tokens", None), getattr(model, "num_reg_tokens", None)]
    for path, module in model.named_modules():
        flags = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and isinstance(value, (bool, str, type(None)))
        )
        have = tuple((key, value is None) for key, value in module._parameters.items())
        ratio = getattr(module, "num_kv_heads", None) == getattr(module, "num_heads", None)
        parts.append((path, type(module).__qualname__, flags, have, ratio))
    return tuple(parts)


def refusal(name: str, model: Any) -> str:
    """Why the model is refused, or an empty string after it has run as the host with nothing removed and as planned."""
    height, width = model.patch_embed.img_size
    x = torch.randn(2, 3, int(height), int(width), generator=torch.Generator().manual_seed(0))
    fits = vt.supports(REDUCER, model)
    if not fits:
        return fits.reason
    before: Tensor = model(x)
    with vt.patched(model, REDUCER, r=0):
        if not torch.equal(model(x), before):
            raise RuntimeError(f"{name}: not the host's output with nothing removed")
    with vt.patched(model, REDUCER, r=REMOVED) as red:
        after: Tensor = model(x)
        if not torch.isfinite(after).all() or (before.dim() == 2 and after.shape != before.shape):
            raise RuntimeError(f"{name}: its output is {tuple(after.shape)}, not finite or of another shape")
        if red.tokens != red.plan.tokens or red.tokens[-1] >= red.plan.length:
            raise RuntimeError(f"{name}: {red.tokens} tokens, planned were {red.plan.tokens} of {red.plan.length}")
    return ""


def row(name: str, model: Any, number: int, reason: str) -> Row:
    """What the table says of a model."""
    block = model.blocks[0]
    inner = getattr(block, "attn", None) or (block.attns[0].attn if hasattr(block, "attns") else block)
    kind = type(inner).__name__
    blocks = type(block).__name__ + ("" if inner is block or kind == "Attention" else f" ({kind})")
    pool = model.global_pool or "none"
    prefix = 0 if type(model).__name__ == "Cait" else model.num_prefix_tokens
    return Row(name, type(model).__name__, blocks, positions(model), prefix, pool, number, reason)


def positions(model: Any) -> str:
    """What tells the tokens of a model their place."""
    found = ["absolute"] if getattr(model, "pos_embed", None) is not None else []
    rope = getattr(model, "rope", None)
    found += [] if rope is None else [type(rope).__name__.replace("RotaryEmbedding", "RoPE ")]
    for path, module in model.named_modules():
        if hasattr(module, "relative_position_index") and module.relative_position_index is not None:
            owner = "per block" if path.startswith("blocks") else "shared"
            kind = "MLP" if type(module).__name__ == "RelPosMlp" else "table"
            return " + ".join([*found, f"relative {kind}, {owner}"])
    return " + ".join(found) or "none"


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; names that differ in nothing that a column tells share one."""
    yes, refused = [r for r in rows if not r.reason], [r for r in rows if r.reason]
    structures = len({r.config for r in rows})
    lines = [
        f"timm {timm.__version__}: {len(rows)} names of `timm.models.{{{', '.join(FAMILIES)}}}` in {structures} "
        f"structures. {len(yes)} names are supported, {len(refused)} refused. One tiny model of each structure was "
        "run: bit-equal to the unpatched one with nothing removed, and with the planned tokens at "
        f"`{REDUCER}`, r={REMOVED}.",
        "",
        "| models | class | blocks | positions | prefix | pool | supported |",
        "|---|---|---|---|---|---|---|",
    ]

    def key(r: Row) -> tuple[Any, ...]:
        return (r.kind, r.blocks, r.positions, r.prefix, r.pool, r.reason)

    for columns, group in itertools.groupby(sorted(rows, key=lambda r: (*key(r), r.name)), key=key):
        kind, blocks, where, prefix, pool, reason = columns
        models = ", ".join(f"`{r.name}`" for r in group)
        lines.append(f"| {models} | {kind} | {blocks} | {where} | {prefix} | {pool} | {reason or 'yes'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(walk()))
