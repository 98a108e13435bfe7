"""Reports versions, hardware and which implementations visiontok uses here, and why; paste it into an issue."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from pathlib import Path

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    report = collect()
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    from visiontok.cli.output import pairs

    for section, values in report.items():
        print(f"{section}\n{pairs((f'  {name}', str(value)) for name, value in values.items())}\n")
    return 0


def collect() -> dict[str, dict[str, str]]:
    """The report: sections of name and value."""
    from visiontok.bench.environment import PACKAGES, versions

    found = versions(PACKAGES)
    return {
        "versions": {name: found.get(name, "not installed") for name in ("python", *PACKAGES)},
        "machine": _machine(),
        "accelerators": _accelerators(),
        "kernels": _kernels(),
        "storage": _storage(),
    }


def _machine() -> dict[str, str]:
    import torch

    from visiontok.bench.environment import cpu, git_sha, usable_cores

    name, flags = cpu()
    browser = next((path for path in map(shutil.which, _BROWSERS) if path), None)
    return {
        "os": platform.platform(),
        "cpu": name,
        "isa": " ".join(flags) or "unknown",
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cores": str(usable_cores()),
        "torch threads": f"{torch.get_num_threads()} intra-op, {torch.get_num_interop_threads()} inter-op",
        "browser": browser or "none (browser tests are skipped)",
        "git": git_sha() or "not a checkout",
    }


def _accelerators() -> dict[str, str]:
    import importlib.util

    import torch

    values = {"cuda": f"{torch.version.cuda or 'not built in'}, {torch.cuda.device_count()} device(s) usable"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        values[f"gpu {index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    triton = importlib.util.find_spec("triton") is not None
    values["triton"] = "installed" + ("" if torch.cuda.is_available() else ", unused without a GPU") if triton else "no"
    return values


def _kernels() -> dict[str, str]:
    from visiontok.ops import dispatch
    from visiontok.ops.cpu import building

    rows = {"setting": f"VISIONTOK_KERNELS={dispatch.wanted()}"}
    built = building.library()
    rows["C++ library"] = built.note if built.library is not None else f"none: {built.note}"
    rows["Triton launch table"] = _launch_table()
    for choice in dispatch.report():
        refused = "".join(f"; not {name}: {why}" for name, why in choice.refused)
        rows[choice.op] = f"{choice.implementation} ({choice.reason}{refused})"
    return rows


def _launch_table() -> str:
    """Architectures with entries of their own, and what the GPUs at hand use."""
    import torch

    try:
        from visiontok.ops.triton.configuring import architecture, table
    except (ImportError, AttributeError) as error:
        return f"unused, Triton is missing or too old ({error})"
    known = sorted({name for entries in table().values() for name in entries})
    here = {architecture(torch.device("cuda", index)) for index in range(torch.cuda.device_count())}
    uses = "".join(f"; {name} here{'' if name in known else ' uses any'}" for name in sorted(here))
    return f"{len(table())} kernels, entries for {', '.join(known)}{uses}"


def _storage() -> dict[str, str]:
    from huggingface_hub import constants

    places = {
        "hub cache": Path(constants.HF_HUB_CACHE),
        "torch cache": Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser(),
        "working folder": Path.cwd(),
    }
    return {name: f"{path}, {_free(path)}" for name, path in places.items()}


def _free(path: Path) -> str:
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    return f"{shutil.disk_usage(existing).free / 2**30:.1f} GiB free"
