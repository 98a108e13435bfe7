"""Watching attention through transformers' attention interface: a function that shows q, k, v and then delegates."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["KEYWORD", "base_name", "configs_of", "delegate", "set_implementation", "watched", "watching"]

# Keyword under which a decoder's run travels with the call, down to the attention function.
KEYWORD = "visiontok_run"
_PREFIX = "visiontok_"

# See(module, query, key, value, mask, scaling), called before the attention itself.
See = Callable[[nn.Module, Tensor, Tensor, Tensor, Any, float], None]


class _Now(threading.local):
    def __init__(self) -> None:
        self.see: See | None = None


_now = _Now()


@contextlib.contextmanager
def watching(see: See | None) -> Iterator[None]:
    """Shows `see` every attention of this thread that runs under a watched implementation."""
    before, _now.see = _now.see, see
    try:
        yield
    finally:
        _now.see = before


def base_name(name: str) -> str:
    """The implementation behind a watched one."""
    return name.removeprefix(_PREFIX)


def watched(name: str) -> str:
    """Registers the watched form of an attention implementation, with its mask function, and returns its name.

    A name that has no mask function would make transformers drop every mask without a word.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base, full = base_name(name), _PREFIX + base_name(name)
    if full not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(full, _Watched(base))
        ALL_MASK_ATTENTION_FUNCTIONS.register(full, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return full


def set_implementation(configs: list[Any], watch: bool) -> None:
    """Switches configurations to the watched form of their attention implementation, or back."""
    for config in configs:
        name = config._attn_implementation or "eager"
        # The internal attribute: the property would change every sub-configuration too.
        if watch:
            config._attn_implementation_internal = watched(name)
        elif name.startswith(_PREFIX):
            config._attn_implementation_internal = base_name(name)


class _Watched:
    """Attention that first shows its inputs to whoever watches."""

    def __init__(self, base: str) -> None:
        self.base = base

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        run = kwargs.pop(KEYWORD, None)
        see = _now.see if run is None else run.see
        if see is not None:
            see(module, query, key, value, attention_mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        return delegate(self.base, module)(module, query, key, value, attention_mask, **kwargs)


def delegate(base: str, module: nn.Module) -> Callable[..., Any]:
    """The function that an implementation stands for in a module; `eager` is the module's own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def configs_of(module: nn.Module) -> list[Any]:
    """The distinct configurations of a module and its parts that name an attention implementation."""
    found = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]
