"""Loads the Triton kernels for the interpreter (CPU tensors) or for the compiler, in one process."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

PACKAGE = "visiontok.ops.triton"


@contextlib.contextmanager
def kernels(name: str, *, interpret: bool) -> Iterator[ModuleType]:
    """One module of kernels, decorated for the interpreter or the compiler; forgotten afterwards.

    Args:
        name: `merging`, `matching`, …
        interpret: Whether kernels run on CPU tensors in the interpreter.
    """
    triton = pytest.importorskip("triton")
    before = _forget()
    # The interpreter decides when a kernel is decorated, and again when the bodies of helpers run.
    with triton.knobs.runtime.scope(), _standard_interpreted() if interpret else contextlib.nullcontext():
        triton.knobs.runtime.interpret = interpret
        try:
            yield importlib.import_module(f"{PACKAGE}.{name}")
        finally:
            _forget()
            sys.modules.update(before)


@contextlib.contextmanager
def _standard_interpreted() -> Iterator[None]:
    # sum, max, zeros, cdiv and more are themselves kernels' helpers, decorated when Triton was imported.
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    remapped = interpreter._patch_lang(tl.standard.sum.fn)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Each call of a helper would remap the language again, which takes longer than most helpers.
            direct = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)  # noqa: E731
            patch.setattr(interpreter.InterpretedFunction, "__call__", direct)
            # The compiler does not look for overflows either.
            options = interpreter.InterpreterOptions(sanitize_overflow=False)
            patch.setattr(interpreter.interpreter_builder, "options", options)
            made: dict[Any, Any] = {}
            for module in (tl.standard, tl):
                for name, helper in list(vars(module).items()):
                    if isinstance(helper, JITFunction):
                        helper = made.setdefault(helper.fn, interpreter.InterpretedFunction(helper.fn))
                        patch.setattr(module, name, helper)
            yield
    finally:
        remapped.restore()


def _forget() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]
    return {name: sys.modules.pop(name) for name in names}


class Built(NamedTuple):
    """What the compiler made of a kernel.

    Attributes:
        registers: Per thread.
        spills: Bytes of local memory and stack, 0 if everything fits.
        shared: Dynamic shared memory in bytes.
        instructions: SASS mnemonic to count, e.g. HGMMA, HMMA, ATOM, RED, LDL, STL.
    """

    registers: int
    spills: int
    shared: int
    instructions: Mapping[str, int]


_MNEMONICS = ("HGMMA", "HMMA", "FFMA", "LDL", "STL", "LDGSTS", "ATOM", "ATOMG", "ATOMS", "RED", "REDG")


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    arch: int | str = 90,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Built:
    """Compiles a kernel for a GPU that need not be there.

    Args:
        kernel: A `@triton.jit` function, loaded with `interpret=False`.
        types: Run-time arguments: `*bf16`, `*fp32`, `*i32`, `*i64`, `i32`, `fp32`, …
        constants: `tl.constexpr` arguments and None pointers.
        arch: 80, 90 (NVIDIA) or a name such as `gfx942` (AMD; registers and instructions are not read then).
        num_warps: As in a launch.
        num_stages: As in a launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    missing = [name for name in names if name not in types and name not in constants]
    assert not missing, f"no type for {missing}"
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    constexprs = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    amd = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)
    made = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    return read(made)


def read(made: Any) -> Built:
    """Resources and instructions of a compiled kernel.

    Args:
        made: What `triton.compile` or a warm-up returned, for NVIDIA or AMD (registers and instructions are not read).
    """
    import triton

    if "cubin" not in made.asm:
        return Built(0, 0, made.metadata.shared, {})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    counts = {name: len(re.findall(rf"\b{name}[. ]", sass)) for name in _MNEMONICS}
    return Built(registers, stack + local, made.metadata.shared, {name: n for name, n in counts.items() if n})


@contextlib.contextmanager
def cold_cache() -> Iterator[None]:
    """A Triton cache of its own, so that a compilation really happens."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before
