"""The verbs: patch, patched, unpatch, detached, supports, describe, list_*, compatibility."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal, overload

from torch import nn

from visiontok import backbones, reducers
from visiontok.core import patching
from visiontok.core.chain import Chain
from visiontok.core.plan import Support, support
from visiontok.core.reducer import Card, Reducer
from visiontok.core.reduction import Reduction
from visiontok.core.towers import Towers
from visiontok.errors import (
    AlreadyPatchedError,
    IncompatibleError,
    NothingPatchedError,
    NotPatchedError,
    ParameterError,
)
from visiontok.finding import TOWERS, resolve_target, unwrapped

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


@overload
def patch(model: Any, reducer: dict[str, Any], /, **options: Any) -> Towers: ...  # pyright: ignore
@overload
def patch(model: Any, reducer: Any = None, /, *, tower: Literal["both"], **options: Any) -> Towers: ...
@overload
def patch(model: Any, reducer: Any = None, /, **options: Any) -> Reduction: ...
def patch(
    model: Any,
    reducer: Any = None,
    /,
    *,
    recipe: Any = None,
    tower: str | None = None,
    trace: bool = False,
    restore: str | None = None,
    check_finite: bool = False,
    **params: Any,
) -> Reduction | Towers:
    """Patches a model in place so that it runs with fewer tokens.

    state_dict keys, parameters and the forward signature stay as they are; `Reduction.unpatch` restores the model bit
    for bit. Patch before building the optimizer and before wrapping in DDP.

    Args:
        model: A model of a known family, a module that contains exactly one, or a transformers pipeline around one.
        reducer: A name, a `Reducer`, or a list of these and of `(name, {params})`. For a model with two towers also a
            dict `{"visual": reducer, "text": reducer}`.
        recipe: Path of a recipe file instead of a reducer.
        tower: Of a model with two towers: `visual` (the default), `text` or `both`.
        trace: Keep the maps of the last forward for `Reduction.trace`.
        restore: None leaves features reduced. `gather` returns full-length features (each token a copy of the one it
            merged into, dropped tokens a copy of the nearest kept one), `zero` the same with zeros for dropped tokens.
        check_finite: Raise FloatingPointError when a reduction yields NaN or Inf (debugging; slow).
        **params: Fields of a reducer given by name.

    Returns:
        The `Reduction`; for `both` and for a dict a `Towers`, which holds one per tower.

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
    options = {"trace": trace, "restore": restore, "check_finite": check_finite}
    if isinstance(reducer, dict) or tower == "both":
        towers = _patch_towers(model, reducer, tower, options, params)
        for part in towers.values():
            _warn_if_idle(part)
        return towers
    reduction = _patch_tower(model, _resolve(reducer, params), tower, Chain(**options))
    _warn_if_idle(reduction)
    return reduction


def _patch_towers(
    model: Any, reducer: Any, tower: str | None, options: dict[str, Any], params: dict[str, Any]
) -> Towers:
    if isinstance(reducer, dict):
        if params or tower not in (None, "both"):
            raise ParameterError("a dict of reducers names its towers and parameters itself; give neither beside it.")
        chosen = {name: _resolve(item if isinstance(item, list) else [item], {}) for name, item in reducer.items()}
    else:
        chosen = {name: _resolve(reducer, params) for name in TOWERS}
    if not chosen:
        raise ParameterError("the dict of reducers is empty.")
    done: dict[str, Reduction] = {}
    try:
        for name, reducers_of in chosen.items():
            done[name] = _patch_tower(model, reducers_of, name, Chain(**options))
    except BaseException:
        Towers(done).unpatch()
        raise
    return Towers(done)


def _patch_tower(model: Any, chosen: list[Reducer], tower: str | None, chain: Chain) -> Reduction:
    target, backbone = resolve_target(model, tower)
    if patching.is_patched(target):
        raise AlreadyPatchedError(
            f"{type(target).__name__} is patched already; change it with Reduction.set(...) or call "
            "visiontok.unpatch(model) first."
        )
    reduction = backbone.handle(target, chosen, chain)
    reduction.install()
    return reduction


@contextlib.contextmanager
def patched(model: nn.Module, reducer: Any = None, /, **options: Any) -> Iterator[Any]:
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
    inner = model if isinstance(model, nn.Module) else unwrapped(model)
    found = [vars(m)[patching.ATTRIBUTE] for m in inner.modules() if patching.ATTRIBUTE in vars(m)]
    handles = [handle for handle in found if isinstance(handle, Reduction)]
    if not handles:
        raise NotPatchedError(f"{type(model).__name__} is not patched.")
    for handle in handles:
        # A handle may have taken those of its parts with it.
        if handle.in_place:
            handle.unpatch()
    return model


def supports(reducer: Any, model: nn.Module, *, tower: str | None = None) -> Support:
    """Whether a reducer can be used on a model, and if not why.

    Args:
        reducer: A name or a Reducer.
        model: Any module or pipeline; patched or not.
        tower: As in `patch`.
    """
    (chosen,) = _resolve(reducer, {})
    try:
        target, backbone = resolve_target(model, tower)
    except (NothingPatchedError, IncompatibleError) as error:
        return Support(False, str(error))
    return support(chosen, backbone, target)


def compatibility() -> list[dict[str, Any]]:
    """One row per reducer and backbone: `reducer`, `backbone`, `ok`, `reason`; checked on each backbone's example."""
    rows: list[dict[str, Any]] = []
    for cls in backbones.registry.classes():
        backbone = cls()
        try:
            model: nn.Module | None = backbone.example()[0]
        except ImportError:
            model = None
        for name in list_reducers():
            missing = Support(False, f"{backbone.library} is not installed.")
            fits = missing if model is None else support(reducers.create(name), backbone, model)
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


def _warn_if_idle(reduction: Reduction) -> None:
    asked = any(reducer.fields() or part.always for reducer in reduction.reducers for part in reducer.parts())
    if not asked and not reduction.plan.removes and reduction.reducers[0].name != "identity":
        first = reduction.reducers[0]
        known = ", ".join(f"{name}=" for name in first.budget_names) or "see visiontok.describe"
        text = f"{first.name} was patched without a budget and removes nothing; give one ({known})."
        warnings.warn(text, stacklevel=3)
