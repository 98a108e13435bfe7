"""Registers, spills and shared memory of every kernel as its launch table launches it, compiled for GPUs not at hand.

    python benchmarks/resources.py --arch 80 90 gfx942 --store

The launchers run on CPU tensors with their launches caught, so types and options are those of real calls.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import store
import torch
import triton
from triton.runtime.jit import JITFunction

from visiontok.bench.environment import git_sha
from visiontok.bench.kernel_calls import KERNELS, call
from visiontok.ops.triton.configuring import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
from triton_modes import Built, build

FILE = store.RESULTS / "resources.csv"
KEY = ("kernel", "width", "dtype", "arch", "triton")
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """One launch of a kernel: its run-time types, constants and options."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def launches(run: Any) -> list[Launch]:
    """The launches that a call would make, without making them."""
    caught: list[Launch] = []

    def catch(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        given = {p.name: p.default for p in kernel.params if p.has_default} | dict(zip(kernel.arg_names, args))
        given |= {name: value for name, value in named.items() if name in kernel.arg_names}
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        constants = {name: value for name, value in given.items() if name in fixed or value is None}
        types = {name: _type(value) for name, value in given.items() if name not in constants}
        options = {name: value for name, value in named.items() if name in ("num_warps", "num_stages")}
        caught.append(Launch(kernel, types, constants, options))

    with mock.patch.object(JITFunction, "run", catch):
        run()
    return caught


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def built(launch: Launch, arch: int | str) -> Built:
    """What the compiler makes of a launch."""
    # AMD's tensor cores have fp32; launchers ask torch which of the two it is.
    with mock.patch.object(torch.version, "hip", "6.4" if isinstance(arch, str) else None):
        return build(launch.kernel, launch.types, launch.constants, arch=arch, **launch.options)


def measure(kernel: str, width: int, arch: int | str, seen: list[Launch]) -> Iterator[dict[str, Any]]:
    """Rows of a kernel of the launch table: one per launch of its own that is not in `seen`, which grows."""
    dtype = torch.float32 if kernel.endswith("_fp32") else torch.bfloat16
    with mock.patch.object(torch.version, "hip", "6.4" if isinstance(arch, str) else None):
        made = launches(call(kernel, torch.device("cpu"), dtype, width, batch=1))
    name = kernel.removesuffix("_fp32")
    for launch in made:
        if name not in launch.kernel.fn.__name__ and len(made) > 1:
            continue
        if launch in seen:
            continue
        seen.append(launch)
        found = built(launch, arch)
        tensor = sum(found.instructions.get(n, 0) for n in ("HGMMA", "HMMA"))
        atomics = sum(found.instructions.get(n, 0) for n in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG"))
        known = not isinstance(arch, str)
        yield {
            "kernel": kernel, "width": width, "dtype": str(dtype).removeprefix("torch."),
            "arch": arch if isinstance(arch, str) else f"sm_{arch}",
            "warps": launch.options.get("num_warps", 4), "stages": launch.options.get("num_stages", 3),
            "registers": found.registers if known else None, "spills": found.spills if known else None,
            "shared": found.shared, "tensor_core_instructions": tensor if known else None,
            "atomics": atomics if known else None, "triton": triton.__version__,
            "command": store.command(), "commit": (git_sha() or "")[:12],
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles what the flags ask for; 1 if something spills or adds atomically."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kernel", nargs="+", choices=sorted(table()), default=sorted(table()), metavar="KERNEL")
    made.add_argument("--arch", nargs="+", default=["80", "90"], help="80, 90, or an AMD name such as gfx942")
    made.add_argument("--store", action="store_true", help=f"keep the results in {FILE.name}")
    args = made.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for kernel, arch in itertools.product(args.kernel, args.arch):
        seen: list[Launch] = []
        for width in KERNELS[kernel.removesuffix("_fp32")].widths:
            for row in measure(kernel, width, int(arch) if arch.isdigit() else arch, seen):
                rows.append(row)
                print(" ".join(f"{name}={value}" for name, value in list(row.items())[:-3]), flush=True)
    if args.store:
        store.put(FILE, rows, KEY)
    return int(any(row["spills"] or row["atomics"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
