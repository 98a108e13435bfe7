"""The tables of performance.md, made from the stored results under benchmarks/results; docs/build.py puts them in."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = Path(__file__).with_name("performance.md")
_NOTHING = "Nothing is stored yet."
# Columns of the table of ops, in this order; a GPU has no cpp, a CPU no triton.
_CONTESTANTS = ("torch", "cpp", "triton", "fold", "official", "slice", "unpatched")
_OPS = (
    "match", "merge", "match_merge", "merge_add_norm", "best_match", "restore", "attention", "votes", "class_row",
)  # fmt: skip
_ROLES = ("baseline", "official", "reference", "automatic", "cpp", "triton", "slice")
# Where the design's goals are set.
_ESTIMATED = (("deit_s", 256), ("vit_b", 256), ("vit_l", 128), ("vit_l_384", 64))

Row = dict[str, str]


def tables() -> dict[str, str]:
    """Markdown by the name between the page's marks."""
    return {
        "models": models(),
        "reducers": reducers(),
        "ops": ops(),
        "kernels": kernels(),
        "roofline": roofline(),
        "decide": decide(),
        "overhead": overhead(),
        "import": imports(),
        "mllm": mllm(),
        "flextok": flextok(),
        "one_d_piece": one_d_piece(),
    }


def filled(text: str, made: dict[str, str]) -> str:
    """A page with what is between `<!-- name: begin -->` and `<!-- name: end -->` replaced.

    Raises:
        LookupError: A mark is missing.
    """
    for name, table in made.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise LookupError(f"{PAGE.name} has no marks {begin} … {end}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def page() -> str:
    """performance.md with current tables."""
    return filled(PAGE.read_text(encoding="utf-8"), tables())


def models() -> str:
    """ToMe on whole models: baseline, official, implementations, oracle."""
    return _by_device(_latest("models.csv", _MODEL, lambda row: row["reducer"] == "tome"), _models_of)


def reducers() -> str:
    """Every other reducer on a whole model."""
    return _by_device(_latest("models.csv", _MODEL, lambda row: row["reducer"] != "tome"), _reducers_of)


_MODEL = ("model", "reducer", "budget", "implementation", "dtype", "batch", "mode", "device")


def _models_of(rows: Sequence[Row]) -> list[str]:
    lines = ["| model | batch | dtype | | ms, p50 (p20 … p80) | S | E_total | E_hw | E_method | kernels |",
             "|---|--:|---|---|--:|--:|--:|--:|--:|---|"]  # fmt: skip

    def place(row: Row) -> tuple[float, str, str, int, str, int]:
        role = _ROLES.index(row["implementation"])
        return float(row["gmacs_before"]), row["model"], row["mode"], int(row["batch"]), row["dtype"], role

    for row in sorted(rows, key=place):
        ideal = float(row["gmacs_before"]) / float(row["gmacs_after"])
        total = "" if row["implementation"] == "baseline" else _number(row["e_total"], 2)
        mode = "" if row["mode"] == "eager" else f", {row['mode']}"
        lines.append(
            f"| {row['model']}, {row['budget']} (x{ideal:.2f}) | {row['batch']} | {row['dtype']}{mode} "
            f"| {row['implementation']} | {_spread(row)} | {_number(row['speedup'], 2)} | {total} "
            f"| {_number(row['e_hw'], 2)} | {_number(row['e_method'], 3)} | {row['uses']} |"
        )
    return lines


def _reducers_of(rows: Sequence[Row]) -> list[str]:
    lines = ["| reducer | model | batch | tokens | ideal | S | E_total | E_hw | E_method |",
             "|---|---|--:|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for row in rows:
        if row["implementation"] != "automatic":
            continue
        ideal = float(row["gmacs_before"]) / float(row["gmacs_after"])
        tokens = row["tokens"].replace("-", " → ")
        lines.append(
            f"| {row['reducer']} {row['budget']} | {row['model']} | {row['batch']} | {tokens} "
            f"| {ideal:.2f} | {_number(row['speedup'], 2)} | {_number(row['e_total'], 2)} | {_number(row['e_hw'], 2)} "
            f"| {_number(row['e_method'], 3)} |"
        )
    return lines


def ops() -> str:
    """Single ops in milliseconds, one line per op, shape, batch and dtype."""
    return _by_device(_latest("ops.csv", ("op", "implementation", "shape", "dtype", "batch", "device")), _ops_of)


def _ops_of(rows: Sequence[Row]) -> list[str]:
    there = [name for name in _CONTESTANTS if any(row["implementation"] == name for row in rows)]
    lines = [f"| op | shape | batch | dtype | {' | '.join(there)} | floor | official / best |",
             f"|---|---|--:|---|{'--:|' * len(there)}--:|--:|"]  # fmt: skip
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["batch"], row["dtype"], row["op"]), []).append(row)
    titles = _module("shapes").SHAPES
    order = list(titles)

    def place(item: tuple[tuple[str, ...], list[Row]]) -> tuple[int, int, str, int]:
        shape, batch, dtype, op = item[0]
        return order.index(shape), int(batch), dtype, _OPS.index(op)

    for (shape, batch, dtype, op), group in sorted(groups.items(), key=place):
        times = {row["implementation"]: float(row["p50_ms"]) for row in group}
        own = [times[name] for name in ("torch", "cpp", "triton", "fold") if name in times]
        gain = f"{times['official'] / min(own):.1f}" if own and "official" in times else ""
        cells = " | ".join(_number(str(times[name]), 3) if name in times else "" for name in there)
        floor = _number(group[0]["floor_ms"], 3)
        lines.append(f"| {op} | {titles[shape].title} | {batch} | {dtype} | {cells} | {floor} | {gain} |")
    return lines


def kernels() -> str:
    """What the compiler makes of each Triton kernel."""
    rows = _latest("resources.csv", ("kernel", "width", "arch"))
    if not rows:
        return _NOTHING
    lines = ["| kernel | width | inputs | for | warps | stages | registers | spills | shared, KiB | MMA |",
             "|---|--:|---|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for row in sorted(rows, key=lambda row: (row["kernel"], row["arch"], int(row["width"]))):
        lines.append(
            f"| {row['kernel']} | {row['width']} | {row['dtype']} | {row['arch']} | {row['warps']} | {row['stages']} "
            f"| {row['registers']} | {row['spills']} | {float(row['shared']) / 1024:.1f} "
            f"| {row['tensor_core_instructions']} |"
        )
    versions = ", ".join(sorted({row["triton"] for row in rows}))
    return _told([f"Triton {versions}; spills in bytes per thread, MMA: tensor core instructions."], rows, lines)


def roofline() -> str:
    """Estimates for a GPU that none of this has run on."""
    shapes = _module("shapes")
    lines = ["| block, bf16 | batch | unpatched, µs | match | merge + add + norm | add + norm | extra | of the block |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for name, batch in _ESTIMATED:
        shape = shapes.SHAPES[name]
        match, merge, norm = (
            1e6 * shapes.seconds(shapes.floor(op, shape, batch, 2)) for op in ("match", "merge_add_norm", "add_norm")
        )
        block = 1e6 * sum(map(shapes.seconds, shapes.block_floor(shape, batch, 2)))
        extra = match + merge - norm
        lines.append(
            f"| {shape.title}, r = {shape.r} | {batch} | {block:.0f} | {match:.1f} | {merge:.1f} | {norm:.1f} "
            f"| {extra:+.1f} | {extra / block:.1%} |"
        )
    told = (
        f"**Estimates, not measurements**: least bytes over {shapes.H200_BYTES / 1e12:g} TB/s or FLOPs over "
        f"{shapes.H200_FLOPS / 1e12:g} TFLOP/s (an H200), whichever takes longer, no gaps between launches."
    )
    return f"{told}\n\n" + "\n".join(lines)


def decide() -> str:
    """Cost of one decision of every method."""
    rows = _latest("decide.csv", ("method", "model", "tokens", "batch", "device"))
    if not rows:
        return _NOTHING
    sizes = sorted({int(row["tokens"]) for row in rows})
    heads = []
    for size in sizes:
        first = next(row for row in rows if int(row["tokens"]) == size)
        heads.append(f"{size} tokens, block {_number(first['block_p50_ms'], 0)} ms (p20 "
                     f"{_number(first['block_p20_ms'], 0)}): share | decide + apply ms | tokens")  # fmt: skip
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---|---|---|" * len(sizes)]
    for name in sorted({row["method"] for row in rows}):
        cells = []
        for size in sizes:
            row = next((r for r in rows if r["method"] == name and int(r["tokens"]) == size), None)
            if row is None or not row["share_p50"]:
                cells.append("does not run here | | ")
                continue
            share, low = float(row["share_p50"]), float(row["share_p20"])
            cells.append(f"{share:.1%} ({low:.1%}) | {_number(row['decide_ms'], 2)} + {_number(row['apply_ms'], 2)} "
                         f"| {row['tokens']} → {row['tokens_after']}")  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    about = f"{rows[0]['model']}, batch {rows[0]['batch']}, {rows[0]['rounds']} rounds. {_machine(rows)}"
    return _told([about], rows, lines)


def overhead() -> str:
    """What a patch that removes nothing costs."""
    rows = _latest("overhead.csv", ("model", "reducer", "batch", "device"))
    if not rows:
        return _NOTHING
    lines = ["| model | batch | rounds | unpatched ms | patched ms | median ratio of a round (p20 … p80) | outputs |",
             "|---|--:|--:|--:|--:|--:|---|"]  # fmt: skip
    for row in sorted(rows, key=lambda row: (row["model"], int(row["batch"]))):
        lines.append(
            f"| {row['model']}, {row['reducer']} r=0 | {row['batch']} | {row['rounds']} | {_number(row['base_ms'], 1)} "
            f"| {_number(row['patched_ms'], 1)} | {_number(row['ratio_p50'], 3)} ({_number(row['ratio_p20'], 3)} … "
            f"{_number(row['ratio_p80'], 3)}) | {'equal bit for bit' if row['equal'] == 'True' else 'differ'} |"
        )
    return _told([_machine(rows)], rows, lines)


def imports() -> str:
    """Time to import the package and to print the help."""
    rows = _latest("import.csv", ("case", "device"))
    if not rows:
        return _NOTHING
    bare = min(float(row["p50_ms"]) for row in rows)
    lines = ["| | ms, median | over a bare interpreter |", "|---|--:|--:|"]
    for row in sorted(rows, key=lambda row: float(row["p50_ms"])):
        lines.append(f"| `{row['case']}` | {_number(row['p50_ms'], 0)} | {float(row['p50_ms']) - bare:.0f} |")
    return _told([f"{rows[0]['runs']} interleaved runs. {_machine(rows)}"], rows, lines)


def flextok() -> str:
    """FlexTok's velocities beside the official packing."""
    rows = _latest("flextok_decode.csv", ("variant", "batch", "tokens", "device"))
    if not rows:
        return _NOTHING
    lines = ["| model | batch | tokens | official, s | ours, s | ratio (least) | memory, official / ours, MiB "
             "| velocities differ by | after two steps |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for row in sorted(rows, key=lambda row: (row["variant"], int(row["batch"]))):
        lines.append(
            f"| {row['variant']} | {row['batch']} | {row['tokens']} | {_number(row['official_s'], 2)} "
            f"| {_number(row['ours_s'], 2)} | {_number(row['ratio'], 2)} ({_number(row['ratio_least'], 2)}) "
            f"| {row['peak_official_mib']} / {row['peak_ours_mib']} | {row['velocity_difference']} "
            f"| {row['two_steps_difference']} of {row['two_steps_largest']} |"
        )
    return _told([f"{rows[0]['repeats']} interleaved runs. {_machine(rows)}"], rows, lines)


def one_d_piece() -> str:
    """One-D-Piece beside the official sequence of operations."""
    rows = _latest("one_d_piece.csv", ("model", "what", "implementation", "batch", "tokens", "device"))
    if not rows:
        return _NOTHING
    lines = ["| model | | batch | tokens | ms per image | of official, one by one | ids equal | images differ by |",
             "|---|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for row in sorted(
        rows, key=lambda row: (row["model"], row["what"] != "encode", row["implementation"][:4] == "ours")
    ):
        lines.append(
            f"| {row['model']} | {row['what']}: {row['implementation']} | {row['batch']} | {row['tokens']} "
            f"| {_number(row['ms_per_image'], 0)} | x{_number(row['ratio'], 2)} | {float(row['same_ids']):.1%} "
            f"| {row['difference']} |"
        )
    return _told([f"{rows[0]['repeats']} interleaved runs. {_machine(rows)}"], rows, lines)


def mllm() -> str:
    """Prefill of multimodal models: one line per method and budget."""
    path = RESULTS / "mllm_prefill.csv"
    if not path.exists():
        return _NOTHING
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    head = "| method | visual tokens | batch | ms | speed-up | GMAC ratio | E_method | language: speed-up | GMAC ratio "
    lines = [head + "| E_language | probes | compaction |", "|---" * 12 + "|"]
    for row in rows:
        cells = (
            row["reducer"], row["keep"], row["batch"], f"{float(row['full_ms']):.0f} → {float(row['reduced_ms']):.0f}",
            *(f"{float(row[name]):.2f}" for name in ("speedup", "gmac_ratio")),
            f"{float(row['e_method']):.3f}",
            *(f"{float(row[name]):.2f}" for name in ("language_speedup", "language_gmac_ratio")),
            f"{float(row['e_language']):.3f}", f"{float(row['probe_share']):.1%}",
            f"{float(row['compaction_ms']):.2f} ms",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _latest(name: str, key: Sequence[str], keep=lambda row: True) -> list[Row]:  # noqa: ANN001
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if keep(row)]
    # Other versions or commands are other measurements of the same thing: the last one counts.
    rows.sort(key=lambda row: row.get("date", ""))
    return list({tuple(row[part] for part in key): row for row in rows}.values())


def _by_device(rows: Sequence[Row], lines_of) -> str:  # noqa: ANN001
    if not rows:
        return _NOTHING
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        parts.append(_told([_machine(own)], own, lines_of(own)))
    return "\n\n".join(parts)


def _machine(rows: Iterable[Row]) -> str:
    rows = list(rows)
    first = rows[0]
    isa = f", {first['isa']}" if first.get("isa") else ""
    threads = f", {first['threads']} thread(s)" if first["device"].startswith("cpu") else ""
    days = sorted({row["date"][:10] for row in rows})
    versions = "; ".join(dict.fromkeys(row["versions"].replace("=", " ") for row in rows))
    return f"{first['device']}{isa}{threads}; {versions}; {' to '.join(dict.fromkeys((days[0], days[-1])))}."


def _told(about: Sequence[str], rows: Iterable[Row], lines: Sequence[str]) -> str:
    commands = "\n".join(dict.fromkeys(row["command"] for row in rows))
    return "\n\n".join([*about, f"```bash\n{commands}\n```", "\n".join(lines)])


def _spread(row: Row) -> str:
    digits = 1 if float(row["p50_ms"]) < 100 else 0
    low, middle, high = (_number(row[f"{name}_ms"], digits) for name in ("p20", "p50", "p80"))
    return f"{middle} ({low} … {high})"


def _number(text: str, digits: int) -> str:
    return f"{float(text):.{digits}f}" if text else ""


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"visiontok_benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise LookupError(f"benchmarks/{name}.py is missing")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
