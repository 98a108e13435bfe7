"""What a number was measured with: versions, device, threads, commit."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("visiontok", "torch", "timm", "transformers", "diffusers", "open_clip_torch", "gradio", "numpy", "triton")
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "neon", "sve")


def versions(packages: tuple[str, ...] = ("visiontok", "torch", "timm")) -> dict[str, str]:
    """Versions of Python and of the installed ones among `packages`, read without importing them."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_sha() -> str | None:
    """Commit of the checkout that visiontok runs from, `-dirty` where it has changes; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    sha = _git(root, "rev-parse", "HEAD")
    if sha is None:
        return None
    return sha + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def cpu() -> tuple[str, list[str]]:
    """The CPU's name and which of `ISA_FLAGS` it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), []
    lines = [line.partition(":") for line in text.splitlines()]
    values = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    return values.get("model name") or platform.machine(), [flag for flag in ISA_FLAGS if flag in flags]


def device_name(device: Any) -> str:
    """`cpu: <model>` or `cuda: <GPU>`."""
    import torch

    where = torch.device(device)
    if where.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(where)}"
    return f"{where.type}: {cpu()[0]}" if where.type == "cpu" else where.type


def sdpa_backend(device: Any) -> str:
    """The attention backends that PyTorch may choose from on a device, the preferred one first."""
    import torch

    if torch.device(device).type != "cuda":
        return "cpu"
    backends = torch.backends.cuda
    allowed = {
        "flash": backends.flash_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }
    return "+".join(name for name, enabled in allowed.items() if enabled)


def describe(device: Any) -> dict[str, Any]:
    """The environment part of a result row."""
    import torch

    return {
        "versions": versions(),
        "git_sha": git_sha(),
        "device": device_name(device),
        "driver": torch.version.cuda if torch.device(device).type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "sdpa_backend": sdpa_backend(device),
    }


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
