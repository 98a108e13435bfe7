"""The attention kernels for GPUs that need not be there: registers, spills, tensor cores, no atomics, one variant."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from triton_modes import Built, build, cold_cache, kernels

KERNELS = ("attention", "key_votes", "class_rows")
_FUNCTION = {"attention": "_attention_kernel", "key_votes": "_vote_kernel", "class_rows": "_row_kernel"}


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with kernels("attention", interpret=False) as loaded:
        yield loaded


class Launches:
    """Stands in for a kernel and keeps what its launcher gives it."""

    def __init__(self) -> None:
        self.made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.made.append((args, options))


def launched(
    module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...] = (197,), width: int = 64,
    dtype: torch.dtype = torch.bfloat16, bare: bool = False,
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:  # fmt: skip
    """The launches of one function over several lengths, from fused projections of 12 heads.

    Args:
        module: The kernels.
        name: The launcher.
        monkeypatch: Undoes the recording.
        lengths: Token counts.
        width: d.
        dtype: Of q, k, v.
        bare: Without bias, weights and known sums.
    """
    record = Launches()
    monkeypatch.setattr(module, _FUNCTION[name], record)
    for length in lengths:
        qkv = torch.zeros(2, length, 3 * 12 * width, dtype=dtype)
        q, k, v = qkv.unflatten(-1, (3, 12, width)).permute(2, 0, 3, 1, 4).unbind(0)
        bias, lse = (None, None) if bare else (torch.zeros(2, length), torch.zeros(2, 12, length))
        if name == "attention":
            module.attention(q, k, v, bias, 0.125)
        elif name == "key_votes":
            module.key_votes(q, k, torch.zeros(2, 12, length), bias, 0.125, lse, together=not bare)
        else:
            module.class_rows(q, k, bias, 0.125, 1, lse)
    monkeypatch.undo()
    return record.made


def compiled(
    module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, arch: int | str = 90, **operands: Any
) -> Built:
    """The kernel as its launcher asks for it, for one architecture."""
    ((args, options),) = launched(module, name, monkeypatch, **operands)
    kernel = getattr(module, _FUNCTION[name])
    options = dict(options)
    warps, stages, _ = (options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion"))
    if isinstance(arch, str) and options["PRECISION"]:
        options["PRECISION"] = "ieee"
    given = dict(zip(kernel.arg_names, args)) | options
    constants = {key: value for key, value in given.items() if key.isupper() or value is None}
    types = {key: _type(value) for key, value in given.items() if key not in constants}
    return build(kernel, types, constants, arch=arch, num_warps=warps, num_stages=stages)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def check(built: Built, most: int, shared: int = 100) -> None:
    """No spills, no atomics, products on tensor cores, and so few registers and so little shared memory (KiB)."""
    assert built.spills == 0
    assert not {"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "LDL", "STL"} & set(built.instructions)
    assert {"HGMMA", "HMMA"} & set(built.instructions)
    # Rows of known alignment are copied to shared memory in the background.
    assert built.instructions.get("LDGSTS", 0) > 0
    assert built.registers <= most
    assert built.shared <= shared * 1024


@pytest.mark.parametrize(
    ("name", "bare", "most"), [("attention", False, 168), ("key_votes", False, 192), ("class_rows", True, 128)]
)
def test_halves_on_hopper(
    module: ModuleType, name: str, bare: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(compiled(module, name, monkeypatch, bare=bare), most, 64)


@pytest.mark.full
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("width", [32, 64, 72, 128])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_every_width_and_dtype(
    module: ModuleType, name: str, arch: int, width: int, dtype: torch.dtype, bare: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    check(compiled(module, name, monkeypatch, arch, width=width, dtype=dtype, bare=bare), 255)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_amd(module: ModuleType, name: str, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its local memory.
    assert compiled(module, name, monkeypatch, "gfx942", width=width, dtype=dtype).shared <= 64 * 1024


class Absent:
    """A driver for a GPU that is not there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.full
@pytest.mark.parametrize("width", [64, 72])
@pytest.mark.parametrize("name", KERNELS)
def test_twelve_layers_share_one_variant(
    module: ModuleType, name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.driver import driver

    lengths = tuple(197 - 13 * layer for layer in range(12))
    made = launched(module, name, monkeypatch, lengths, width)
    assert len(made) == 12
    kernel = getattr(module, _FUNCTION[name])
    monkeypatch.setattr(driver, "_active", Absent())
    with cold_cache():
        for args, options in made:
            kernel.warmup(*args, grid=(1,), **options)
    assert sum(len(cache[0]) for cache in kernel.device_caches.values()) == 1
    kernel.device_caches.clear()
