"""What the compiler makes of the merging kernels, for GPUs that need not be there."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from triton_modes import Built, build, kernels

MODES = ("mean", "sum", "amax", "absmax", "mlerp")
STRIDES = ("x_batch", "x_row", "y_batch", "y_row", "num_tokens", "num_slots")
NO_NORM = {"normed": None, "norm_weight": None, "norm_bias": None}
NO_ROWS = {"rows": None, "rows_out": None, "ROW": 0}
NO_WEIGHTS = {"weight": None, "size": None}


@pytest.fixture(scope="module")
def compiled() -> Iterator[ModuleType]:
    with kernels("merging", interpret=False) as module:
        yield module


def build_merge(module: ModuleType, channels: int, mode: str, *, dtype: str = "bf16", arch: int | str = 90,
                without: tuple[dict[str, Any], ...] = ()) -> Built:  # fmt: skip
    """As `merge` would launch it with all that a block has, less the arguments in `without`."""
    types = dict.fromkeys(("x", "y", "gamma", "out", "normed", "norm_weight", "norm_bias"), f"*{dtype}")
    types |= dict.fromkeys(("weight", "size", "rows", "size_out", "rows_out"), "*fp32")
    types |= dict.fromkeys(("csr", "src"), "*i32") | dict.fromkeys(STRIDES, "i32") | {"eps": "fp32"}
    options = module.launch_options("merge", channels, torch.device("cpu"))
    whole = 1 << (channels - 1).bit_length()
    width = whole if mode == "mlerp" or NO_NORM not in without else min(whole, options["tile"])
    constants = {"MODE": mode, "CHANNELS": channels, "ROW": 2, "ALIGN": 16, "WIDTH": width, "UNROLL": options["unroll"]}
    constants["SLOTS"] = max(options["tile"] // width, 1)
    for part in without:
        constants |= part
    return build(module._merge_kernel, types, constants, arch=arch, num_warps=options["num_warps"])


def build_spread(module: ModuleType, channels: int, *, arch: int | str = 90) -> Built:
    types = dict.fromkeys(("y", "residual", "out"), "*bf16") | {"assign": "*i64", "share": "*fp32"}
    types |= dict.fromkeys(("y_batch", "y_row", "base_batch", "base_row", "num_tokens"), "i32")
    options = module.launch_options("spread", channels, torch.device("cpu"))
    width = min(1 << (channels - 1).bit_length(), options["tile"])
    constants = {"CHANNELS": channels, "ALIGN": 16, "WIDTH": width, "TOKENS": max(options["tile"] // width, 1)}
    return build(module._spread_kernel, types, constants, arch=arch, num_warps=options["num_warps"])


def build_group(module: ModuleType, *, arch: int | str = 90) -> Built:
    import visiontok.ops.triton.grouping as grouping

    types = {"assign": "*i64", "csr": "*i32", "src": "*i32", "num_tokens": "i32", "num_slots": "i32"}
    options = module.launch_options("group", 197, torch.device("cpu"))
    constants = {"BLOCK": options["block"], "TILE": options["tile"]}
    return build(grouping._group_kernel, types, constants, arch=arch, num_warps=options["num_warps"])


def assert_lean(made: Built, registers: int = 160, spills: int = 0) -> None:
    """No spills, no atomics, and registers for at least three blocks of four warps on a multiprocessor."""
    assert made.spills <= spills
    assert not {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"} & set(made.instructions)
    assert 0 < made.registers <= registers


@pytest.mark.parametrize(
    ("mode", "channels", "without"),
    [
        ("mean", 1024, ()),
        pytest.param("mean", 384, (NO_ROWS, {"weight": None}), marks=pytest.mark.full),
        pytest.param("sum", 1024, (NO_ROWS, NO_NORM, NO_WEIGHTS, {"gamma": None}), marks=pytest.mark.full),
        ("amax", 384, (NO_NORM, {"weight": None})),
        ("absmax", 1024, (NO_ROWS, {"weight": None})),
        ("mlerp", 384, ({"weight": None},)),
    ],
)
def test_merge_is_lean(compiled: ModuleType, mode: str, channels: int, without: tuple[dict[str, Any], ...]) -> None:
    assert_lean(build_merge(compiled, channels, mode, without=without))


def test_group_and_spread_are_lean(compiled: ModuleType) -> None:
    assert_lean(build_group(compiled), registers=128)
    assert_lean(build_spread(compiled, 384), registers=64)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("channels", [192, 384, 768, 1024, 1280, 4096])
@pytest.mark.parametrize("mode", MODES)
def test_every_merge_is_lean(compiled: ModuleType, mode: str, channels: int, dtype: str) -> None:
    bare = (NO_ROWS, NO_NORM, NO_WEIGHTS, {"y": None, "gamma": None})
    for without in ((), (NO_NORM,), bare):
        # The assembler puts an address or two aside where that lets one more block run.
        assert_lean(build_merge(compiled, channels, mode, dtype=dtype, without=without), spills=16)


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_other_architectures(compiled: ModuleType, mode: str) -> None:
    for channels in (384, 1024):
        assert_lean(build_merge(compiled, channels, mode, arch=80), spills=16)
        build_merge(compiled, channels, mode, arch="gfx942")
    for arch in (80, "gfx942"):
        build_group(compiled, arch=arch)
        build_spread(compiled, 384, arch=arch)


class NoGpu:
    """A driver that stands for a GPU: launches compile for it, and nothing runs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The launchers with real tensors, up to the launch."""
    import triton
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: run(self, *args, **kwargs | {"warmup": True}))
    with kernels("merging", interpret=False) as module:
        yield module


def variants(kernel: Any) -> list[Any]:
    return list(kernel.device_caches[0][0].values())


def launch_layers(module: ModuleType, channels: int, layers: int, lost: int) -> None:
    """One merge and one restore per layer, with fewer tokens each time."""
    length = 197
    make = functools.partial(torch.zeros, dtype=torch.bfloat16)
    scale = make(channels)
    for _ in range(layers):
        assign = (torch.arange(length) - lost).clamp_min(0).expand(2, -1)
        csr, src = module.group(assign, length - lost)
        x = make(2, length, channels)
        made = module.merge(x, csr, src, y=x, size=torch.ones(2, length), norm=(scale, scale, 1e-6))
        module.spread(made.out, assign, x)
        length -= lost


def test_launchers_load_vectors(launched: ModuleType) -> None:
    launch_layers(launched, 384, layers=1, lost=13)
    for kernel in (launched._merge_kernel, launched._spread_kernel):
        (made,) = variants(kernel)
        ptx = made.asm["ptx"]
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
        # No half number is loaded or stored on its own.
        assert not re.search(r"(ld|st)\.global\S*\.b16", ptx)


@pytest.mark.full
@pytest.mark.parametrize("channels", [384, 1000])
def test_layers_share_one_variant(launched: ModuleType, channels: int) -> None:
    launch_layers(launched, channels, layers=12, lost=13)
    import visiontok.ops.triton.grouping as grouping

    for kernel in (launched._merge_kernel, launched._spread_kernel, grouping._group_kernel):
        assert len(variants(kernel)) == 1
