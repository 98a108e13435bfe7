"""Hooks on transformers' decoders, which hand every call of the model its run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from visiontok.backbones import hf_attention, hf_cache
from visiontok.backbones.hf_attention import KEYWORD
from visiontok.backbones.hf_decoder import ATTENTION, Run, stack_of
from visiontok.core.multimodal import MultimodalReduction
from visiontok.errors import IncompatibleError

__all__ = ["attach", "detach", "running"]


def attach(model: Any) -> None:
    """Puts hooks on the decoder and its layers, and watches its attention."""
    stack = stack_of(model)
    if getattr(stack, "_compiled_call_impl", None) is not None:
        raise IncompatibleError("the decoder is compiled already, so that hooks would be ignored; patch, then compile.")
    hf_attention.set_implementation(hf_attention.configs_of(stack), True)
    stack.register_forward_pre_hook(Enter(), with_kwargs=True)
    for index, layer in enumerate(stack.layers):
        layer.register_forward_pre_hook(Before(index), with_kwargs=True)
        layer.register_forward_hook(After(index), with_kwargs=True)
    stack.register_forward_hook(Leave(), with_kwargs=True)


def detach(model: Any) -> None:
    """Takes them away again."""
    with contextlib.suppress(IncompatibleError):
        stack = stack_of(model)
        hf_attention.set_implementation(hf_attention.configs_of(stack), False)
        for module in (stack, *stack.layers):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_with_kwargs.pop(key, None)


class _Now(threading.local):
    def __init__(self) -> None:
        self.run: Run | None = None


_now = _Now()


@contextlib.contextmanager
def running(model: Any, reduction: MultimodalReduction, given: Mapping[str, Any]) -> Iterator[Run]:
    """Makes a call of the model known to its hooks."""
    before, run = _now.run, Run(model, reduction, given)
    _now.run = run
    try:
        yield run
    finally:
        _now.run = before


class _Hook:
    """Marks the hooks made here."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A model that was saved whole names attention functions that a fresh process has not registered yet.
        self.__dict__.update(state)
        for name in ATTENTION:
            with contextlib.suppress(KeyError):
                hf_attention.watched(name)


class Enter(_Hook):
    """Before the decoder: hands it the run of this call."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = _now.run
        if run is None:
            return None
        if not run.later:
            run.open(kwargs["inputs_embeds"], kwargs.get("attention_mask"))
        return args, {**kwargs, KEYWORD: run}


class Before(_Hook):
    """Before a layer."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = kwargs.get(KEYWORD)
        if run is None:
            return None
        kwargs = dict(kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        x = run.before(self.index, x, kwargs)
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x}


class After(_Hook):
    """After a layer."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        run = kwargs.get(KEYWORD)
        if run is not None:
            run.after(self.index, kwargs)


class Leave(_Hook):
    """After the decoder."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        run = kwargs.get(KEYWORD)
        if run is not None:
            run.leave(hf_cache.cache_in(output))
