"""Backbone: says where in its model a reduction may happen and which signals it has there. Knows no reducer."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from visiontok.core.signals import Signal, Site

__all__ = ["Backbone", "Block", "Swap", "class_paths", "own_class"]


class Block(NamedTuple):
    """A block of the model in running order."""

    path: str
    module: nn.Module


class Swap(NamedTuple):
    """A module whose class is replaced while patched.

    Attributes:
        path: Dotted path in the model, `""` for the model itself.
        module: The module.
        mixin: Class put before the module's own class.
    """

    path: str
    module: nn.Module
    mixin: type


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as its library made it, patched or not."""
    return getattr(type(module), "_visiontok_base", type(module))


def class_paths(module: nn.Module) -> list[str]:
    """`module.qualname` of every class in the MRO of the module's own class, most derived first."""
    return list(_paths(own_class(module)))


@functools.lru_cache(maxsize=4096)
def _paths(cls: type) -> tuple[str, ...]:
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)


class Backbone(ABC):
    """Base of all families; one file per family, host libraries are imported inside functions only.

    Attributes:
        name: What `visiontok list` and plans call it.
        hosts: Class paths of the models it takes.
        library: What must be installed.
        provides: Signals on offer at each site.
        grid_only: Whether only maps with a grid can be run (windows).
        positional: Whether blocks read `TokenState.positions`.
        tower: `visual` or `text`.
    """

    name: ClassVar[str] = ""
    hosts: ClassVar[tuple[str, ...]] = ()
    library: ClassVar[str] = ""
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {}
    grid_only: ClassVar[bool] = False
    positional: ClassVar[bool] = False
    tower: ClassVar[str] = "visual"

    def matches(self, model: nn.Module) -> bool:
        """Whether the model belongs to the family; classes are compared by name, so nothing is imported."""
        return any(path in self.hosts for path in class_paths(model))

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[Block]:
        """The blocks in running order."""

    @abstractmethod
    def prefix(self, model: nn.Module) -> int:
        """Leading tokens (class, distillation, registers) that no reducer may touch."""

    @abstractmethod
    def length(self, model: nn.Module) -> int:
        """Tokens of the model's nominal input, prefix included."""

    @abstractmethod
    def grid(self, model: nn.Module) -> tuple[int, int] | None:
        """(h, w) of the nominal input's patch tokens."""

    @abstractmethod
    def check(self, model: nn.Module, site: Site) -> None:
        """Raises IncompatibleError, naming the module, if a part of the model cannot be run at that site."""

    @abstractmethod
    def swaps(self, model: nn.Module) -> list[Swap]:
        """The classes to replace, blocks included."""

    def handle(self, model: nn.Module, reducers: Any, chain: Any) -> Any:
        """The `Reduction` that patches a model with reducers; not yet in place."""
        from visiontok.core.reduction import Reduction

        return Reduction(model, self, reducers, chain)

    def signals(self, model: nn.Module, site: Site) -> frozenset[Signal]:
        """Signals on offer at a site for this very model."""
        return self.provides.get(site, frozenset())

    def width(self, model: nn.Module) -> int:
        """C, channels of a token."""
        raise NotImplementedError

    def heads(self, model: nn.Module) -> int:
        """Attention heads of a block."""
        raise NotImplementedError

    def classes(self, model: nn.Module) -> int:
        """Outputs of the model's head; 0 if it has none."""
        return 0

    def class_token(self, model: nn.Module) -> Tensor | None:
        """(1, 1, C) the learned class token, if any."""
        return None

    def aid(self, model: nn.Module, index: int) -> Any:
        """What a block needs of the model beyond itself to run there, as `Stage.aid`; copied and moved with the model.

        Args:
            model: The model.
            index: The block's.
        """
        return None

    def input_size(self, model: nn.Module) -> tuple[int, ...]:
        """Shape of one nominal input without the batch."""
        raise NotImplementedError

    def nominal(self, model: nn.Module, size: tuple[int, ...], batch: int = 1) -> Any:
        """Inputs on the meta device, of this size without the batch: a tensor, a tuple or keyword arguments."""
        from visiontok.core.flops import meta_input

        return meta_input(model, size, batch)

    @abstractmethod
    def example(self) -> tuple[nn.Module, Any]:
        """A tiny random model and an input for it; drives docs and the conformance tests."""

    def examples(self) -> dict[str, tuple[nn.Module, Any]]:
        """All variants worth testing, by name; the first is `example()`."""
        return {"default": self.example()}

    @staticmethod
    def accepts(function: Any, argument: str) -> bool:
        """Whether a host function takes an argument of that name."""
        return argument in inspect.signature(function).parameters
