"""The verbs: patch, patched, unpatch, detached, supports, describe, list_*, compatibility."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.jit import ScriptModule

from visiontok import backbones, reducers
from visiontok.core import patching
from visiontok.core.backbone import Backbone
from visiontok.core.plan import Support, support
from visiontok.core.reducer import Card, Reducer
from visiontok.core.reduction import Reduction
from visiontok.core.runtime import Chain
from visiontok.errors import (
    AlreadyPatchedError,
    IncompatibleError,
    NothingPatchedError,
    NotPatchedError,
    ParameterError,
    did_you_mean,
)

__all__ = [
    "compatibility",
    "describe",
    "list_backbones",
    "list_reducers",
    "patch",
    "patched",
    "resolve_target",
    "supports",
    "unpatch",
]


def list_reducers(pattern: str = "*") -> list[str]:
    """Names of the reducers that match a shell-style pattern."""
    return reducers.registry.names(pattern)


def list_backbones(pattern: str = "*") -> list[str]:
    """Names of the backbones that match a shell-style pattern."""
    return backbones.registry.names(pattern)


def describe(name: str) -> Card:
    """The card of a reducer: paper, year, licence, site, signals, parameters with defaults, drawbacks.

    Raises:
        UnknownNameError: No such reducer.
    """
    return reducers.registry.get(name).describe()


def patch(
    model: nn.Module,
    reducer: Any = None,
    /,
    *,
    recipe: Any = None,
    trace: bool = False,
    restore: str | None = None,
    check_finite: bool = False,
    **params: Any,
) -> Reduction:
    """Patches a model in place so that it runs with fewer tokens.

    state_dict keys, parameters and the forward signature stay as they are; `Reduction.unpatch` restores the model bit
    for bit. Patch before building the optimizer and before wrapping in DDP.

    Args:
        model: A model of a known family, or a module that contains exactly one.
        reducer: A name, a `Reducer`, or a list of these and of `(name, {params})`.
        recipe: Path of a recipe file instead of a reducer.
        trace: Keep the maps of the last forward for `Reduction.trace`.
        restore: None leaves features reduced. `gather` returns full-length features (each token a copy of the one it
            merged into, dropped tokens a copy of the nearest kept one), `zero` the same with zeros for dropped tokens.
        check_finite: Raise FloatingPointError when a reduction yields NaN or Inf (debugging; slow).
        **params: Fields of a reducer given by name.

    Returns:
        The handle.

    Raises:
        NothingPatchedError: The model, and every part of it, is of no known family.
        AlreadyPatchedError: It is patched; use `Reduction.set`.
        UnknownNameError, ParameterError: The reducer or a parameter does not exist or is out of range.
        IncompatibleError: The reducer cannot work on this model, or the model is wrapped.
        All are raised before anything is changed.
    """
    if recipe is not None:
        if reducer is not None or params:
            raise ParameterError("give a recipe or a reducer with parameters, not both.")
        from visiontok.core.recipe import load_recipe

        reducer = load_recipe(recipe).reducer()
    if restore not in (None, "gather", "zero"):
        raise ParameterError(f"restore must be None, 'gather' or 'zero', got {restore!r}.")
    chosen = _resolve(reducer, params)
    target, backbone = resolve_target(model)
    if patching.is_patched(target):
        raise AlreadyPatchedError(
            f"{type(target).__name__} is patched already; change it with Reduction.set(...) or call "
            "visiontok.unpatch(model) first."
        )
    reduction = Reduction(target, backbone, chosen, Chain(trace, restore, check_finite))
    reduction.install()
    _warn_if_idle(reduction)
    return reduction


@contextlib.contextmanager
def patched(model: nn.Module, reducer: Any = None, /, **options: Any) -> Iterator[Reduction]:
    """`patch` for the length of a `with` block; restores the model also when the block raises."""
    reduction = patch(model, reducer, **options)
    try:
        yield reduction
    finally:
        reduction.unpatch()


def unpatch(model: nn.Module) -> nn.Module:
    """Restores a patched model (or the patched part of it) bit for bit and returns `model`.

    Raises:
        NotPatchedError: Nothing in it is patched.
    """
    found = [vars(m)[patching.ATTRIBUTE] for m in model.modules() if patching.ATTRIBUTE in vars(m)]
    handles = [handle for handle in found if isinstance(handle, Reduction)]
    if not handles:
        raise NotPatchedError(f"{type(model).__name__} is not patched.")
    for handle in handles:
        handle.unpatch()
    return model


def supports(reducer: Any, model: nn.Module) -> Support:
    """Whether a reducer can be used on a model, and if not why.

    Args:
        reducer: A name or a Reducer.
        model: Any module; patched or not.
    """
    (chosen,) = _resolve(reducer, {})
    try:
        target, backbone = resolve_target(model)
    except (NothingPatchedError, IncompatibleError) as error:
        return Support(False, str(error))
    return support(chosen, backbone, target)


def compatibility() -> list[dict[str, Any]]:
    """One row per reducer and backbone: `reducer`, `backbone`, `ok`, `reason`; checked on each backbone's example."""
    rows: list[dict[str, Any]] = []
    for cls in backbones.registry.classes():
        backbone = cls()
        model, _ = backbone.example()
        for name in list_reducers():
            fits = support(reducers.create(name), backbone, model)
            rows.append({"reducer": name, "backbone": backbone.name, "ok": fits.ok, "reason": fits.reason})
    return rows


def _resolve(reducer: Any, params: dict[str, Any]) -> list[Reducer]:
    if isinstance(reducer, (list, tuple)):
        if params:
            names = ", ".join(params)
            raise ParameterError(f"{names} cannot be given with a list of reducers; write (name, {{params}}) items.")
        if not reducer:
            raise ParameterError("the list of reducers is empty.")
        return [_resolve_one(item) for item in reducer]
    if isinstance(reducer, Reducer):
        return [reducer.replaced(**params) if params else reducer]
    return [_resolve_one((reducer, params))]


def _resolve_one(item: Any) -> Reducer:
    if isinstance(item, Reducer):
        return item
    name, params = item if isinstance(item, (list, tuple)) and len(item) == 2 else (item, {})
    if not isinstance(name, str) or not isinstance(params, dict):
        raise ParameterError(f"a reducer is a name, (name, {{parameters}}) or a Reducer, got {item!r}.")
    return reducers.create(name, **params)


def resolve_target(model: Any) -> tuple[nn.Module, Backbone]:
    """The module that would be patched, and its family.

    Raises:
        ParameterError, IncompatibleError, NothingPatchedError: As in `patch`.
    """
    if not isinstance(model, nn.Module):
        raise ParameterError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    wrapper = type(model).__name__
    parallel = {type(module).__name__ for module in model.modules()} & {"DataParallel", "DistributedDataParallel"}
    for kind in sorted(parallel):
        advice = "DataParallel is not supported, use DDP" if kind == "DataParallel" else "patch before wrapping"
        raise IncompatibleError(f"the model is wrapped in {kind}: {advice} (patch model.module, then wrap it).")
    if isinstance(model, (ScriptModule, OptimizedModule)):
        kind = "a compiled TorchScript module" if isinstance(model, ScriptModule) else "the result of torch.compile"
        advice = "patch the eager model" if isinstance(model, ScriptModule) else "patch the model that you compiled"
        raise IncompatibleError(f"the model is {kind}; {advice} instead.")
    backbone = backbones.find(model)
    if backbone is not None:
        return model, backbone
    found = [(path, module, backbones.find(module)) for path, module in model.named_modules() if path]
    hits = [(path, module, backbone) for path, module, backbone in found if backbone is not None]
    if len(hits) == 1:
        return hits[0][1], hits[0][2]
    if hits:
        paths = ", ".join(path for path, _, _ in hits)
        raise NothingPatchedError(f"{wrapper} holds several models that could be patched ({paths}); pass one of them.")
    hosts = [host for cls in backbones.registry.classes() for host in cls.hosts]
    hint = did_you_mean(wrapper, [host.rpartition(".")[2] for host in hosts])
    raise NothingPatchedError(
        f"no part of {wrapper} ({type(model).__module__}) is of a known family, nothing was patched.{hint} Known: "
        f"{', '.join(hosts)}."
    )


def _warn_if_idle(reduction: Reduction) -> None:
    asked = any(reducer.fields() or part.always for reducer in reduction.reducers for part in reducer.parts())
    if not asked and not reduction.plan.removes and reduction.reducers[0].name != "identity":
        first = reduction.reducers[0]
        known = ", ".join(f"{name}=" for name in first.budget_names) or "see visiontok.describe"
        text = f"{first.name} was patched without a budget and removes nothing; give one ({known})."
        warnings.warn(text, stacklevel=3)
