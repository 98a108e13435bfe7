"""ToMe on a timm ViT on a CPU: ours, the official formulation and the free-slice oracle against timm's SDPA baseline.

    python benchmarks/cpu_vit.py --model deit_small_patch16_224 --r 13 --batch 16 --dtype float32

One thread, process CPU time, interleaved rounds; prints medians with quantiles, speed-ups and the three efficiencies of
ARCHITECTURE §6. The official formulation is its sequence of operations written anew: manual attention, argsort,
expanded gathers, scatter_reduce.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import visiontok as vt


def official_merge(x: Tensor, size: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """One merge as the released code formulates it."""
    with torch.no_grad():
        metric = metric / metric.norm(dim=-1, keepdim=True)
        a, b = metric[..., ::2, :], metric[..., 1::2, :]
        scores = a @ b.transpose(-1, -2)
        scores[..., 0, :] = -torch.inf
        best, partner = scores.max(dim=-1)
        ranked = best.argsort(dim=-1, descending=True)[..., None]
        staying, leaving = ranked[..., r:, :], ranked[..., :r, :]
        dst = partner[..., None].gather(dim=-2, index=leaving)
        staying = staying.sort(dim=1)[0]

    def merge(t: Tensor) -> Tensor:
        source, target = t[..., ::2, :], t[..., 1::2, :]
        batch, count, channels = source.shape
        kept = source.gather(dim=-2, index=staying.expand(batch, count - r, channels))
        gone = source.gather(dim=-2, index=leaving.expand(batch, r, channels))
        target = target.scatter_reduce(-2, dst.expand(batch, r, channels), gone, reduce="sum")
        return torch.cat([kept, target], dim=1)

    size = torch.ones_like(x[..., 0, None]) if size is None else size
    merged, size = merge(x * size), merge(size)
    return merged / size, size


def official(model: Any, images: Tensor, removals: list[int]) -> Tensor:
    """A forward of the official formulation: materialised attention with log(size)."""
    x, size = tokens_of(model, images), None
    for block, r in zip(model.blocks, removals):
        attn, h = block.attn, block.norm1(x)
        batch, length, channels = h.shape
        qkv = attn.qkv(h).reshape(batch, length, 3, attn.num_heads, channels // attn.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        logits = (q @ k.transpose(-2, -1)) * attn.scale
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        y = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, channels)
        x = x + attn.proj(y)
        if r > 0:
            x, size = official_merge(x, size, k.mean(1), r)
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


def oracle(model: Any, images: Tensor, removals: list[int]) -> Tensor:
    """The same token counts for free: `x[:, :K]`, no matching, no size bias."""
    x = tokens_of(model, images)
    for block, r in zip(model.blocks, removals):
        x = x + block.attn(block.norm1(x))
        x = x[:, : x.shape[1] - r]
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """Embedded tokens before block 0."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def interleave(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """CPU milliseconds of each run, one of each per round, order rotated so that none is always first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.process_time()
            runs[name]()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--r", type=int, default=13)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="append the result to this JSONL file")
    args = parser.parse_args()

    import timm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model: nn.Module = timm.create_model(args.model).eval().to(dtype)
    reduced = vt.detached(model)
    reduction = vt.patch(reduced, "tome", r=args.r)
    counts = [reduction.plan.length, *reduction.plan.tokens]
    removals = [before - after for before, after in zip(counts, counts[1:])]
    images = torch.randn(args.batch, *model.pretrained_cfg["input_size"]).to(dtype)  # type: ignore[index]

    with torch.inference_mode():
        gap = (official(model, images, removals).float() - reduced(images).float()).abs().max().item()
        times = interleave(
            {
                "baseline (timm, SDPA)": lambda: model(images),
                "official formulation": lambda: official(model, images, removals),
                "visiontok": lambda: reduced(images),
                "oracle slice": lambda: oracle(model, images, removals),
            },
            args.rounds,
        )
    report = reduction.report()
    base, slice_ = (np.median(times[name]) for name in ("baseline (timm, SDPA)", "oracle slice"))
    print(f"{args.model} r={args.r} batch {args.batch} {args.dtype}, 1 thread, {args.rounds} rounds, {cpu()}")
    print(f"GMACs {report.gmacs_before:.2f} -> {report.gmacs_after:.2f} (x{report.ideal_speedup:.3f}); "
          f"largest difference to the official formulation {gap:.1e}")  # fmt: skip
    print(f"{'':<24}{'p20':>9}{'p50':>9}{'p80':>9}  {'S':>6}{'E_total':>9}{'E_hw':>7}{'E_method':>10}")
    rows: dict[str, dict[str, float]] = {}
    for name, values in times.items():
        low, middle, high = np.percentile(values, [20, 50, 80])
        speed = base / middle
        # Ratios of the same round cancel slow drifts of the machine; their median is the efficiency.
        method = float(np.median(times["oracle slice"] / values))
        rows[name] = {"p20": low, "p50": middle, "p80": high, "speedup": speed,
                      "e_total": speed / report.ideal_speedup, "e_hw": base / slice_ / report.ideal_speedup,
                      "e_method": method}  # fmt: skip
        tail = (
            "" if name.startswith("baseline") else "{e_total:>9.2f}{e_hw:>7.2f}{e_method:>10.3f}".format(**rows[name])
        )
        print(f"{name:<24}{low:>9.1f}{middle:>9.1f}{high:>9.1f}  {speed:>6.2f}{tail}")
    if args.out:
        record = {"model": args.model, "r": args.r, "batch": args.batch, "dtype": args.dtype, "rounds": args.rounds,
                  "cpu": cpu(), "torch": torch.__version__, "gap": gap, "rows": rows}  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def cpu() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name} ({os.cpu_count()} cores)"


if __name__ == "__main__":
    main()
