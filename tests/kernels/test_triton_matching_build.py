"""Matching, plans and energies compiled for GPUs that need not be there: resources, instructions, variants (K3)."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from triton_modes import PACKAGE, Built, kernels, read

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Tokens in each layer of DeiT-S as ToMe merges 13 a layer.
SCHEDULE = [197 - 13 * layer for layer in range(12)]


class _Driver:
    """What the compiler asks of a GPU's driver."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int | str) -> Iterator[dict[str, ModuleType]]:
    """The modules of kernels, whose launchers compile for `arch` from CPU tensors and launch nothing."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    amd = isinstance(arch, str)
    real = JITFunction.run
    with kernels("scoring", interpret=False), pytest.MonkeyPatch.context() as patch:
        driver = _Driver(GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32))
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(torch.version, "hip", "7.0" if amd else None)
        patch.setattr(JITFunction, "run", lambda *args, **options: real(*args, **{**options, "warmup": True}))
        yield {name: importlib.import_module(f"{PACKAGE}.{name}") for name in ("matching", "planning", "scoring")}


def made(kernel: Any) -> list[Built]:
    """Every variant of a kernel that was compiled."""
    return [read(one) for one in kernel.device_caches[0][0].values()]


def assert_fits(built: Built, tensor_cores: bool = False) -> None:
    assert built.spills == 0
    assert built.registers < 255
    # What any GPU since Ampere gives a block.
    assert built.shared <= 99 * 1024
    assert not {"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "LDL", "STL"} & set(built.instructions), built.instructions
    if tensor_cores:
        assert {"HGMMA", "HMMA"} & set(built.instructions), built.instructions


def match(ops: dict[str, ModuleType], length: int, heads: int, width: int, dtype: torch.dtype, prefix: int = 1) -> None:
    key = torch.zeros(2, length, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)[1]
    ops["matching"].match_slots(key, 13, prefix)


def best(ops: dict[str, ModuleType], length: int, width: int, dtype: torch.dtype) -> None:
    place = torch.arange(length)
    ops["matching"].best_match(torch.zeros(2, length, width, dtype=dtype), place[1::2], place[::2])


def plan(ops: dict[str, ModuleType], length: int, ascending: bool) -> None:
    a, b = torch.randperm(length).expand(2, -1).split([length // 2, length - length // 2], dim=1)
    score, partner = torch.zeros(2, length // 2), torch.zeros(2, length // 2, dtype=torch.int64)
    ops["planning"].plan(score, partner, a, b, 13, 0, length, ascending)


def energy(ops: dict[str, ModuleType], length: int, width: int, dtype: torch.dtype, kind: str) -> None:
    ops["scoring"].energy(torch.zeros(2, length, width, dtype=dtype), 0.5, 1.0, kind)


# What to call with each length, and the kernels it compiles: module, name, whether it has products.
Calls = list[tuple[Callable[..., None], tuple[Any, ...], list[tuple[str, str, bool]]]]
NORM = ("matching", "norm_kernel", False)
DEFAULT: Calls = [
    (match, (6, 64, BRAIN), [("matching", "match_kernel", True)]),
    (best, (320, HALF), [("matching", "best_kernel", True), NORM]),
    (plan, (False,), [("planning", "rank_kernel", False), ("planning", "place_kernel", False)]),
    (energy, (64, BRAIN, "elu"), [("scoring", "energy_kernel", True), NORM]),
]


@pytest.mark.parametrize(("call", "rest", "compiled"), DEFAULT, ids=lambda value: getattr(value, "__name__", None))
def test_one_variant_serves_all_layers(
    call: Callable[..., None], rest: tuple[Any, ...], compiled: list[tuple[str, str, bool]]
) -> None:
    with compiling(90) as ops:
        for length in SCHEDULE:
            call(ops, length, *rest)
        for module, name, tensor_cores in compiled:
            variants = made(getattr(ops[module], name))
            assert len(variants) == 1, name
            assert_fits(variants[0], tensor_cores)


EVERYWHERE: Calls = [
    *[
        (match, case, [("matching", "match_kernel", True)])
        for case in [
            (1, 64, HALF), (1, 64, SINGLE), (3, 64, BRAIN), (12, 64, SINGLE), (16, 64, BRAIN), (16, 80, BRAIN),
            (16, 80, SINGLE), (1, 128, BRAIN), (1, 24, HALF), (6, 64, BRAIN, 0), (4, 128, HALF),
        ]
    ],
    *[
        (best, case, [("matching", "best_kernel", True), NORM])
        for case in [(64, HALF), (320, BRAIN), (1280, BRAIN), (64, SINGLE), (640, SINGLE), (72, HALF)]
    ],
    *[
        (energy, case, [("scoring", "energy_kernel", True)])
        for case in [(64, HALF, "hinge"), (384, BRAIN, "gauss"), (64, SINGLE, "gauss"), (768, SINGLE, "elu")]
    ],
    *[
        (plan, (ascending,), [("planning", "rank_kernel", False), ("planning", "place_kernel", False)])
        for ascending in (False, True)
    ],
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
@pytest.mark.parametrize(("call", "rest", "compiled"), EVERYWHERE, ids=lambda value: getattr(value, "__name__", None))
def test_every_kernel_fits(
    arch: int | str, call: Callable[..., None], rest: tuple[Any, ...], compiled: list[tuple[str, str, bool]]
) -> None:
    with compiling(arch) as ops:
        call(ops, 197, *rest)
        for module, name, tensor_cores in compiled:
            for built in made(getattr(ops[module], name)):
                # What AMD's compiler made is not read.
                assert_fits(built, tensor_cores and arch != "gfx942")
