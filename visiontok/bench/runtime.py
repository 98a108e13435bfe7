"""How a trial runs its models: device, dtype, memory format, autocast, compilation, threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from visiontok.bench.results import TrialSpec
from visiontok.errors import ParameterError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Runtime:
    """Where and in which precision the models of one trial run.

    Args:
        spec: the trial.

    Raises:
        ParameterError: the device is not there, or a dtype is unknown.
    """

    def __init__(self, spec: TrialSpec) -> None:
        self.device = _device(spec.device)
        self.dtype = _dtype(spec.dtype)
        self.autocast = _dtype(spec.amp_dtype) if spec.amp else None
        self.memory_format = torch.channels_last if spec.channels_last else torch.contiguous_format
        self.compile_backend = spec.torchcompile

    @property
    def precision(self) -> str:
        """`float32`, or the autocast dtype with `(amp)`."""
        dtype = self.dtype if self.autocast is None else self.autocast
        return str(dtype).removeprefix("torch.") + (" (amp)" if self.autocast is not None else "")

    def place(self, model: nn.Module) -> nn.Module:
        """Moves a model to the device, dtype and memory format."""
        return model.to(device=self.device, dtype=self.dtype, memory_format=self.memory_format)  # pyright: ignore

    def move(self, images: Tensor) -> Tensor:
        """Moves images `(B, C, H, W)` likewise."""
        return images.to(device=self.device, dtype=self.dtype, memory_format=self.memory_format)

    def runnable(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The model as a function of images: compiled if the trial asks for it, under autocast if so.

        Compiling comes after patching, so call this last.
        """
        call: Any = model
        if self.compile_backend is not None:
            call = torch.compile(model, backend=self.compile_backend)
        if self.autocast is None:
            return call

        def under_autocast(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype=self.autocast):
                return call(images)

        return under_autocast

    def peak_memory(self) -> float | None:
        """Peak GPU memory in MB since `reset_peak`, None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None

    def reset_peak(self) -> None:
        """Starts a new measurement of the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Sets the intra-op threads and restores them; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ParameterError(f"unknown dtype '{name}', expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ParameterError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device
