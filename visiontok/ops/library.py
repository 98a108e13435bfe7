"""Registers the kernels as operators of torch, so that torch.compile sees one node with known shapes.

Opaque operators with a CPU implementation rather than `triton_op`, which is taken apart on every device and then fails
where there is no GPU. Gradients are the business of the autograd functions that call them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["define", "launcher"]

_library = torch.library.Library("visiontok", "FRAGMENT")


def launcher(path: str) -> Callable[..., Any]:
    """A kernel's launcher, imported when it is first called.

    Args:
        path: `module.function` inside `visiontok.ops.triton`.
    """
    module, _, name = path.rpartition(".")

    def launch(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = getattr(importlib.import_module(f"visiontok.ops.triton.{module}"), name)
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(x, *args, **kwargs)
        # Triton launches on the current device, whatever the tensors lie on.
        with torch.cuda.device(x.device):
            return run(x, *args, **kwargs)

    return launch


def define(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], kernel: str | Callable[..., Any]
) -> Callable[..., Any]:
    """Registers an operator `visiontok::…`.

    Args:
        schema: In torch's notation.
        reference: Runs on the CPU: plain torch, same signature.
        fake: Makes empty outputs of the right shapes.
        kernel: What runs on GPUs, as in `launcher`, or a function that calls it.

    Returns:
        The operator. Eager calls go past torch's dispatcher to the kernel, which is cheaper.
    """
    name = schema.partition("(")[0]
    eager = launcher(kernel) if isinstance(kernel, str) else kernel
    _library.define(schema)
    _library.impl(name, reference, "CPU")
    _library.impl(name, eager, "CUDA")
    torch.library.register_fake(f"visiontok::{name}", fake, lib=_library)
    overload = getattr(torch.ops.visiontok, name).default

    def call(*args: Any) -> Any:
        return (overload if torch.compiler.is_compiling() else eager)(*args)

    return call
