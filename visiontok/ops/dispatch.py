"""The one place that picks an implementation of an op, and says why.

An op is a plain function with one signature. Each implementation has the same signature and a verifier that looks at
the call (device, dtype, tracing, gradients) and answers whether it fits; the first that fits is used. The reason of
every first choice is logged once and listed by `visiontok doctor`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.errors import UnknownNameError

__all__ = ["Choice", "Op", "cacheable", "report", "tracing", "use"]

_log = logging.getLogger("visiontok.dispatch")


class Choice(NamedTuple):
    """What the dispatcher would use for a kind of call."""

    op: str
    implementation: str
    reason: str


@dataclass
class _Implementation:
    name: str
    run: Callable[..., Any]
    fits: Callable[[Tensor], bool]
    reason: str


def tracing() -> bool:
    """True while torch.compile, torch.export, the ONNX exporter or jit.trace records the call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def cacheable() -> bool:
    """True if a tensor made now is an ordinary one that later calls may share: no tracing, no fake tensors."""
    # Under FakeTensorMode and its like a cached tensor would be a fake that poisons every real call after it.
    return not tracing() and torch._C._len_torch_dispatch_stack() == 0


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

    def implementation(self, name: str, fits: Callable[[Tensor], bool], reason: str) -> Callable[..., Any]:
        """Registers an implementation; earlier ones win where both fit."""

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            self.implementations.append(_Implementation(name, run, fits, reason))
            return run

        return add

    def choose(self, x: Tensor) -> _Implementation:
        """Returns the implementation for a call whose main operand is `x`."""
        if self.forced is not None:
            return next(i for i in self.implementations if i.name == self.forced)
        return next(i for i in self.implementations if i.fits(x))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = self.choose(x)
        if not torch.compiler.is_compiling() and chosen.name not in self._said:
            self._said.add(chosen.name)
            _log.info("%s: %s (%s)", self.name, chosen.name, chosen.reason)
        return chosen.run(x, *args, **kwargs)


_ops: dict[str, Op] = {}


def op(name: str) -> Op:
    """Returns the op of that name, created on first use."""
    return _ops.setdefault(name, Op(name))


@contextlib.contextmanager
def use(name: str, implementation: str) -> Iterator[None]:
    """Forces one implementation of an op inside a `with` block (tests and benchmarks).

    Raises:
        UnknownNameError: No such op or implementation.
    """
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
    import visiontok.ops.merging  # noqa: F401  (registers its ops)

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows: list[Choice] = []
    for name, target in sorted(_ops.items()):
        for device in devices:
            chosen = target.choose(torch.empty(0, device=device))
            rows.append(Choice(f"{name} [{device}]", chosen.name, chosen.reason))
    return rows
