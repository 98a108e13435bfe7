"""The one place that picks an implementation of an op, and says why.

An op is a plain function with one signature. Each implementation has the same signature and a verifier that looks at
the call (device, dtype, tracing, gradients) and says what speaks against it, if anything; the first that nothing speaks
against is used. The reason of every first choice is logged once and listed by `visiontok doctor`.

`VISIONTOK_KERNELS` in the environment overrules the choice: `auto` (default), `reference` (plain torch only), or
`triton` or `cpp`, which turns a missing kernel library from a silent fall-back into an error.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.errors import ParameterError, UnknownNameError

__all__ = [
    "Choice",
    "Op",
    "cacheable",
    "exporting",
    "op",
    "report",
    "tracing",
    "triton_refuses",
    "triton_refuses_indices",
    "use",
    "wanted",
]

_log = logging.getLogger("visiontok.dispatch")
_SETTINGS = ("auto", "reference", "triton", "cpp")
# The Triton whose language the kernels are written in came with this torch.
_TORCH_FLOOR = (2, 14)
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """What the dispatcher would use for a kind of call.

    Attributes:
        op: Name of the op and the device.
        implementation: What is used for eager inference in fp32.
        reason: Why.
        refused: (implementation, what speaks against it) of those that would come first.
    """

    op: str
    implementation: str
    reason: str
    refused: tuple[tuple[str, str], ...] = ()


@dataclass
class _Implementation:
    name: str
    run: Callable[..., Any]
    refuses: Callable[[Tensor], str | None]
    reason: str


def tracing() -> bool:
    """True while torch.compile, torch.export, the ONNX exporter or jit.trace records the call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def exporting() -> bool:
    """True where the recorded graph will run without visiontok: torch.export, ONNX, jit.trace."""
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return True
    return torch.compiler.is_compiling() and (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export())


def cacheable() -> bool:
    """True if a tensor made now is an ordinary one that later calls may share: no tracing, no fake tensors."""
    # Under FakeTensorMode and its like a cached tensor would be a fake that poisons every real call after it.
    return not tracing() and torch._C._len_torch_dispatch_stack() == 0


@functools.cache
def wanted() -> str:
    """The setting of `VISIONTOK_KERNELS`.

    Raises:
        ParameterError: It has another value than auto, reference, triton or cpp.
    """
    setting = os.environ.get("VISIONTOK_KERNELS", "auto") or "auto"
    if setting not in _SETTINGS:
        raise ParameterError(f"VISIONTOK_KERNELS must be one of {', '.join(_SETTINGS)}, got {setting!r}.")
    return setting


@functools.cache
def _triton_missing() -> str | None:
    if wanted() in ("reference", "cpp"):
        return f"VISIONTOK_KERNELS={wanted()}"
    reason = None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _TORCH_FLOOR:
        reason = f"torch {torch.__version__} is older than {'.'.join(map(str, _TORCH_FLOOR))}, whose Triton they need"
    else:
        try:
            import triton  # noqa: F401
        except Exception as error:  # a broken installation fails in many ways
            reason = f"triton cannot be imported ({type(error).__name__}: {error})"
    if reason is not None and wanted() == "triton":
        raise ParameterError(f"VISIONTOK_KERNELS=triton, but {reason}.")
    return reason


# torch.compile takes its answer as given instead of tracing an import; the public decorator would import the compiler.
_triton_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_refuses(x: Tensor) -> str | None:
    """What speaks against the Triton kernels for a call whose main operand is x, or None."""
    if not x.is_cuda:
        return "not on a GPU"
    if x.dtype not in _KERNEL_DTYPES:
        return f"no kernel for {str(x.dtype).removeprefix('torch.')}"
    return triton_refuses_indices(x)


def triton_refuses_indices(x: Tensor) -> str | None:
    """`triton_refuses` for an op whose main operand is a tensor of indices."""
    if not x.is_cuda:
        return "not on a GPU"
    return _triton_missing() or ("an exported graph must run without visiontok" if exporting() else None)


@dataclass
class Op:
    """An op with several implementations.

    Args:
        name: Name shown in reports.
    """

    name: str
    implementations: list[_Implementation] = field(default_factory=list)
    forced: str | None = None
    _said: set[str] = field(default_factory=set)

    def implementation(
        self, name: str, refuses: Callable[[Tensor], str | None], reason: str
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers an implementation; earlier ones win where both can run.

        Args:
            name: `triton`, `cpp` or what the torch formulation is called.
            refuses: Given the main operand, what speaks against it, or None.
            reason: Why it is used where it is.
        """

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            self.implementations.append(_Implementation(name, run, refuses, reason))
            return run

        return add

    def choose(self, x: Tensor) -> _Implementation:
        """Returns the implementation for a call whose main operand is `x`."""
        if self.forced is not None:
            return next(i for i in self.implementations if i.name == self.forced)
        # A plain loop: this is asked several times per block.
        for implementation in self.implementations:
            if implementation.refuses(x) is None:
                return implementation
        raise LookupError(f"op {self.name} has no implementation that takes every call.")

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = self.choose(x)
        if chosen.name not in self._said and not torch.compiler.is_compiling():
            self._said.add(chosen.name)
            against = "".join(f"; {name}: {why}" for name, why in self.refused(x))
            _log.info("%s: %s (%s%s)", self.name, chosen.name, chosen.reason, against)
        return chosen.run(x, *args, **kwargs)

    def refused(self, x: Tensor) -> list[tuple[str, str]]:
        """The implementations before the chosen one, and what speaks against each."""
        found: list[tuple[str, str]] = []
        for implementation in self.implementations:
            why = implementation.refuses(x)
            if why is None:
                break
            found.append((implementation.name, why))
        return found


_ops: dict[str, Op] = {}


def op(name: str) -> Op:
    """Returns the op of that name, created on first use."""
    return _ops.setdefault(name, Op(name))


def _register_all() -> None:
    import visiontok.ops.attending
    import visiontok.ops.fusing
    import visiontok.ops.matching
    import visiontok.ops.probing
    import visiontok.ops.scoring  # noqa: F401  (they register their ops)


@contextlib.contextmanager
def use(name: str, implementation: str) -> Iterator[None]:
    """Forces one implementation of an op inside a `with` block (tests and benchmarks).

    Raises:
        UnknownNameError: No such op or implementation.
    """
    if name not in _ops:
        _register_all()
    target = _ops.get(name)
    known = [i.name for i in target.implementations] if target else []
    if target is None or implementation not in known:
        raise UnknownNameError(f"no implementation {implementation!r} of op {name!r}; known: {known or sorted(_ops)}.")
    before, target.forced = target.forced, implementation
    try:
        yield
    finally:
        target.forced = before


def report() -> list[Choice]:
    """Returns, for every op, what is used for eager inference on each device at hand, and why."""
    _register_all()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows: list[Choice] = []
    for name, target in sorted(_ops.items()):
        for device in devices:
            probe = torch.empty(0, device=device)
            chosen = target.choose(probe)
            rows.append(Choice(f"{name} [{device}]", chosen.name, chosen.reason, tuple(target.refused(probe))))
    return rows
