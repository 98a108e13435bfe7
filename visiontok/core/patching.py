"""install / remove: cached importable subclasses, re-binding of accelerate's hooks, detached copies.

A patched module's class is replaced by a subclass `(mixin, own class)` that keeps the own class's name, qualified name
and module, is made once per pair, and pickles as "the own class plus the mixin". Nothing else about the module changes,
so state_dict keys, hooks, wrap policies, deepcopy, checkpointing and torch.compile keep working.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import nn

from visiontok.core.backbone import Swap, own_class
from visiontok.errors import AlreadyPatchedError, IncompatibleError, NotPatchedError

__all__ = ["detached", "install", "is_patched", "remove", "subclass"]

ATTRIBUTE = "_visiontok"

_cache: dict[tuple[type, type], type] = {}


class Patched:
    """Marks every class made here; holds what all of them need to pickle."""

    _visiontok_mixin: type
    _visiontok_base: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(max(int(protocol), 2))
        return (_rebuild, (self._visiontok_mixin, self._visiontok_base), *state[2:])


def _rebuild(mixin: type, base: type) -> Any:
    cls = subclass(mixin, base)
    return object.__new__(cls)


def subclass(mixin: type, base: type) -> type:
    """The class `(mixin, base)` that passes for `base`; the same object every time."""
    key = (mixin, base)
    if key not in _cache:
        namespace = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_visiontok_mixin": mixin,
            "_visiontok_base": base,
        }
        _cache[key] = type(base.__name__, (mixin, Patched, base), namespace)
    return _cache[key]


def is_patched(module: nn.Module) -> bool:
    """Whether this very module carries a patch."""
    return isinstance(module, Patched)


def check(swaps: Sequence[Swap]) -> None:
    """Raises if a class swap would have no effect or hit a patched module; changes nothing.

    Raises:
        AlreadyPatchedError: A module is patched.
        IncompatibleError: A module has a `forward` of its own that visiontok did not put there.
    """
    seen: dict[int, str] = {}
    for path, module, _ in swaps:
        where = path or type(module).__name__
        if id(module) in seen:
            raise IncompatibleError(
                f"{seen[id(module)]} and {where} are the same module; each place needs a module of its own to be "
                "patched."
            )
        seen[id(module)] = where
        if is_patched(module):
            raise AlreadyPatchedError(
                f"{where} is patched already; change it with Reduction.set(...) or call visiontok.unpatch(model) first."
            )
        stranger = _stranger(module)
        if stranger is not None:
            raise IncompatibleError(
                f"{where} has a forward of its own on the instance ({stranger}), which would bypass the "
                "patch; remove it first, patch, then put it back."
            )


def install(swaps: Sequence[Swap]) -> None:
    """Replaces the classes; all or none."""
    check(swaps)
    done: list[nn.Module] = []
    try:
        for _, module, mixin in swaps:
            _swap(module, subclass(mixin, type(module)))
            done.append(module)
    except BaseException:
        for module in done:
            _swap(module, own_class(module))
        raise


def remove(modules: Sequence[nn.Module]) -> None:
    """Gives the modules their own classes back; all or none.

    Raises:
        NotPatchedError: A module is not patched, or was wrapped in another class after patching (FSDP2).
        IncompatibleError: A module was given a forward of its own after patching, which would keep calling the patch.
    """
    for module in modules:
        cls = type(module)
        if "_visiontok_base" not in vars(cls):
            hint = "unshard or unwrap it first" if isinstance(module, Patched) else "it is not patched"
            raise NotPatchedError(f"cannot unpatch {cls.__name__}: its class was changed after patching; {hint}.")
        stranger = _stranger(module)
        if stranger is not None:
            raise IncompatibleError(
                f"cannot unpatch {cls.__name__}: it was given a forward of its own ({stranger}) after patching; remove "
                "that first."
            )
    for module in modules:
        _swap(module, own_class(module))
        vars(module).pop(ATTRIBUTE, None)


def _swap(module: nn.Module, cls: type) -> None:
    # accelerate leaves the class's forward, bound, on the instance: as `_old_forward` while its hook is on, as
    # `forward` once the hook was removed.
    bound = [name for name in ("forward", "_old_forward") if _is_own(module, vars(module).get(name))]
    module.__class__ = cls
    for name in bound:
        vars(module)[name] = cls.forward.__get__(module)


def _stranger(module: nn.Module) -> str | None:
    """What stands on the instance in place of the class's forward, in words, or None."""
    held = vars(module)
    name = "_old_forward" if "_hf_hook" in held and "_old_forward" in held else "forward"
    if name not in held or _is_own(module, held[name]):
        return None
    # Not the repr: that of a partial or a bound method prints the whole model.
    return getattr(held[name], "__qualname__", None) or type(held[name]).__name__


def _is_own(module: nn.Module, method: Any) -> bool:
    if not isinstance(method, MethodType) or method.__self__ is not module:
        return False
    return method.__func__ is getattr(type(module), "forward", None)


def detached(model: nn.Module) -> nn.Module:
    """A copy of the model that shares every parameter and buffer and may be patched on its own.

    Args:
        model: Any module, patched or not; a patched one yields a patched copy.

    Returns:
        New modules around the same tensors.
    """
    shared: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        shared[id(tensor)] = tensor
    return copy.deepcopy(model, shared)
