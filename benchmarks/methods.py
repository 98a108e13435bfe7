"""Every method on the embedded model at 30, 50 and 70 % of its GMACs, paired with random dropping over several seeds.

    python benchmarks/methods.py --out docs/methods_table.md --plot docs/images/methods_pareto.png

Per image and seed, a method's result is compared with that of `random` at the same GMACs; the interval is a bootstrap
over images and seeds. Two measures: top-1, which saturates on digits, and the divergence of the predictions from those
of the unreduced model (KL, in millinats), which does not. Methods with learned parts run with untrained parts and say
so. Nothing is tuned to this table.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import visiontok as vt
from visiontok import reducers
from visiontok.core.flops import count_macs
from visiontok.errors import ParameterError
from visiontok.models.tiny import digits_split, tiny_vit

SIZE = (3, 32, 32)


@dataclasses.dataclass
class Result:
    """One method at one budget over all seeds.

    Attributes:
        right: (S, N) whether each image was classified correctly.
        drift: (S, N) KL divergence from the unreduced predictions.
        gmacs: Reached compute.
        tokens: Tokens after the last block.
        note: What to know about the row.
    """

    right: np.ndarray
    drift: np.ndarray
    gmacs: float
    tokens: int
    note: str = ""


def images() -> tuple[Tensor, Tensor]:
    """All held-out digits."""
    split = digits_split()
    return split.test_images, split.test_labels


@torch.inference_mode()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """(N, classes)."""
    return torch.cat([model(batch) for batch in x.split(100)])


def measure(model: nn.Module, name: str, target: float, seeds: int, x: Tensor, labels: Tensor, plain: Tensor) -> Result:
    """Runs one method at one GMACs target, once per seed."""
    cls: Any = reducers.registry.get(name)
    has_seed = any(field.name == "seed" for field in dataclasses.fields(cls))
    right, drift = [], []
    gmacs, tokens, note = math.nan, 0, ""
    budget = fitted(model, name, target)
    for seed in range(seeds):
        torch.manual_seed(seed)
        changing = has_seed or cls.trainable
        if seed > 0 and not changing:
            right.append(right[0])
            drift.append(drift[0])
            continue
        given: dict[str, Any] = {"seed": seed} if has_seed else {}
        with vt.patched(model, name, **budget, **given) as red:
            report = red.report()
            gmacs, tokens = report.gmacs_after, report.tokens[-1]
            learned = any("visiontok" in key.split(".") for key in model.state_dict())
            note = "untrained parts" if learned else ""
            if cls.ragged:
                note = "padded: each image keeps at most this"
            found = logits(model, x)
        right.append((found.argmax(1) == labels).numpy())
        log = found.log_softmax(1)
        drift.append((plain.softmax(1) * (plain.log_softmax(1) - log)).sum(1).clamp_min(0).double().numpy())
    return Result(np.stack(right), np.stack(drift), gmacs, tokens, note)


def fitted(model: nn.Module, name: str, target: float) -> dict[str, Any]:
    """The budget that meets the target: `gflops`, or the largest `keep` where a method has no such budget.

    Methods with a `start` begin as late as the target allows.
    """
    cls: Any = reducers.registry.get(name)
    fields = {field.name for field in dataclasses.fields(cls)}
    starts = [{"start": at} for at in range(len(model.blocks) // 2, 0, -1)] if "start" in fields else [{}]  # type: ignore[arg-type]
    if "gflops" in cls.budget_names and len(reducers.create(name).parts()) == 1:
        for start in starts:
            try:
                with vt.patched(model, name, gflops=target, **start) as red:
                    points = [point for point in red.plan.points if not point.undo]
                    # Solved once: the same counts serve all seeds.
                    return {"r": {point.layer: point.budget.r for point in points}, **start}
            except ParameterError:
                if start == starts[-1]:
                    raise
    if "keep" not in cls.budget_names:
        raise vt.VisionTokError(f"{name} has no budget to set: its own parameters decide")
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        with vt.patched(model, name, keep=middle) as red:
            low, high = (middle, high) if red.report().gmacs_after <= target else (low, middle)
    if low == 0.0:
        raise vt.VisionTokError(f"{name} cannot reach {target:.4f} GMACs with one keep ratio")
    return {"keep": low}


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (S, N) over seeds and images."""
    rng = np.random.default_rng(0)
    seeds, count = values.shape
    by_seed = values[rng.integers(0, seeds, (draws, seeds))].mean(axis=1)
    picked = rng.integers(0, count, (draws, count))
    low, high = np.quantile(np.take_along_axis(by_seed, picked, axis=1).mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def verdict(low: float, high: float, better: str) -> str:
    """In words, from the interval of a difference to random."""
    if low > 0 or high < 0:
        return "better" if (low > 0) == (better == "higher") else "worse"
    return "="


def lines(results: Mapping[tuple[str, int], Result | str], base: float, shares: list[int]) -> list[str]:
    """The table as Markdown."""
    out = []
    for share in shares:
        baseline = results["random", share]
        if isinstance(baseline, str):
            raise SystemExit(f"random failed at {share} %: {baseline}")
        out += [
            f"### {share} % of the GMACs ({base * share / 100:.4f} of {base:.4f})", "",
            "| method | GMACs | tokens out | top-1 | against random, 95 % | KL, mnat | against random, 95 % | |",
            "|---|--:|--:|--:|--:|--:|--:|---|",
        ]  # fmt: skip
        rows, failed = [], []
        for (name, at), found in results.items():
            if at != share:
                continue
            if isinstance(found, str):
                failed.append(f"- `{name}`: {found}")
                continue
            gain = 100 * (found.right.astype(float) - baseline.right)
            drift = 1e3 * (found.drift - baseline.drift)
            (a, b), (c, d) = interval(gain), interval(drift)
            said = "" if name == "random" else f"{verdict(c, d, 'lower')} (KL), {verdict(a, b, 'higher')} (top-1)"
            said += f"; {found.note}" if found.note else ""
            rows.append((1e3 * found.drift.mean(), (
                f"| `{name}` | {found.gmacs:.4f} | {found.tokens} | {100 * found.right.mean():.2f} "
                f"| {gain.mean():+.2f} [{a:+.2f}, {b:+.2f}] | {1e3 * found.drift.mean():.1f} "
                f"| {drift.mean():+.1f} [{c:+.1f}, {d:+.1f}] | {said} |"
            )))  # fmt: skip
        out += [row for _, row in sorted(rows)]
        out += ["", *(["Not in the table:", "", *failed, ""] if failed else [])]
    return out


def plot(results: Mapping[tuple[str, int], Result | str], path: Path) -> None:
    """KL against GMACs, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.2))
    names = list(dict.fromkeys(name for name, _ in results))
    colors = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    styles = [(color, dash) for dash in ("-", "--", ":", "-.") for color in colors]

    def points(name: str) -> list[tuple[float, float]]:
        found = [result for (other, _), result in results.items() if other == name]
        return sorted((r.gmacs, 1e3 * float(r.drift.mean())) for r in found if not isinstance(r, str))

    for name, (color, dash) in zip((name for name in names if name != "random"), styles):
        if points(name):
            axes.plot(*zip(*points(name)), dash, color=color, marker="o", markersize=3.5, linewidth=1.2, label=name)
    axes.plot(*zip(*points("random")), "-", color="black", linewidth=2.5, marker="s", label="random")
    axes.set_yscale("log")
    axes.set_xlabel("GMACs per image, matcher not counted")
    axes.set_ylabel("KL from the unreduced model (mnat, lower is better)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


_READING = """
## How to read it

![KL against GMACs](images/methods_pareto.png)

- The methods that keep what the class token attends to (`evit`, `topk`, `ats`, `ats_v2`, `evo_vit`, and `dynamic_vit`
  untrained) are worse than random dropping here. All but `evo_vit` and `dynamic_vit` equal their authors' code on the
  golden cases, so this is the methods on this model, not the port: the papers report the opposite on ImageNet, where
  objects have a background. EViT and Evo-ViT are published with training, which this table leaves out.
- The papers put Zero-TPrune before ToMe at these ratios, and Expedite above clustering-free methods for dense tasks;
  neither shows on 8 x 8 digits, and no dense task is measured here.
- Merging methods that compare keys (`tome`, `atm`, `atc`, `dtem`, `mctf`, `tofu`) cannot be told apart here.
- `sit`, `clca`, `dynamic_vit`, `patch_merger`, `dpc_knn` and `dtem` have learned parts, which are untrained here; see
  training.md for `sit` after distillation.
""".splitlines()


def main() -> None:
    """Measures, prints, and writes the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reducer", nargs="*", default=None, help="default: all")
    parser.add_argument("--share", type=int, nargs="+", default=[70, 50, 30])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_vit().eval()
    x, labels = images()
    plain, base = logits(model, x), count_macs(model, SIZE) / 1e9
    names = ["random", *(n for n in args.reducer or vt.list_reducers() if n not in ("random", "identity"))]
    results: dict[tuple[str, int], Result | str] = {}
    for name in names:
        for share in args.share:
            try:
                found: Result | str = measure(model, name, base * share / 100, args.seeds, x, labels, plain)
            except vt.VisionTokError as error:
                found = str(error)
            results[name, share] = found
            numbers = None if isinstance(found, str) else (100 * found.right.mean(), 1e3 * found.drift.mean())
            print(f"{name:20} {share}%  {found if numbers is None else numbers}", flush=True)
    accuracy = 100 * (plain.argmax(1) == labels).double().mean().item()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    head = [
        "# Every method on the embedded model", "",
        "Written by `python benchmarks/methods.py --out docs/methods_table.md "
        f"--plot docs/images/methods_pareto.png` at {commit.stdout.strip() or 'an unknown commit'}; "
        f"{len(x)} held-out digits, {args.seeds} seeds, unreduced model {accuracy:.2f} % at {base:.4f} GMACs.", "",
        *str(__doc__).split("\n\n")[2].splitlines(), "",
    ]  # fmt: skip
    text = "\n".join([*head, *lines(results, base, args.share), *_READING]).rstrip() + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
