"""Learned parts of reducers: made for their points, registered as child `visiontok`, loaded from checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visiontok.core.backbone import Backbone
from visiontok.core.plan import Plan, Point
from visiontok.core.reducer import Build, Reducer
from visiontok.core.schedule import Budget
from visiontok.core.signals import Site
from visiontok.errors import FormatError

__all__ = ["load", "part_of", "register", "remove"]

CHILD = "visiontok"


def register(model: nn.Module, backbone: Backbone, plan: Plan, parts: Sequence[Reducer]) -> None:
    """Makes the learned parts of a plan and hangs them into the model; parts that still fit are kept.

    Args:
        model: The patched model.
        backbone: Its family.
        plan: What acts where.
        parts: The reducers, composites taken apart.
    """
    blocks = backbone.blocks(model)
    wanted: dict[int, dict[str, nn.Module]] = {}
    stages: dict[int, int] = {}
    for point in _points(plan):
        build = _build(model, backbone, plan, point, stages.get(id(point.reducer), 0))
        module = _made(point.reducer, build)
        if module is not None:
            stages[id(point.reducer)] = build.stage + 1
            wanted.setdefault(point.block, {})[_key(point.reducer, point.layer)] = module
    for index, block in enumerate(blocks):
        _hang(block.module, wanted.get(index, {}), block.module)
    heads: dict[str, nn.Module] = {}
    for part in parts:
        if part.site is Site.HEAD and _learns(part):
            at = Point(Site.HEAD, plan.depth, "", part, Budget(), plan.length, plan.length)
            module = _made(part, _build(model, backbone, plan, at, 0))
            heads |= {} if module is None else {_key(part, None): module}
    _hang(model, heads, blocks[-1].module)


def part_of(holder: nn.Module, reducer: Reducer, layer: int | None) -> nn.Module | None:
    """The learned part that belongs to a reducer at a layer (None: at the head), or None."""
    held = holder._modules.get(CHILD)
    return held._modules.get(_key(reducer, layer)) if isinstance(held, nn.ModuleDict) else None


def remove(holders: Sequence[nn.Module]) -> None:
    """Takes all learned parts out again."""
    for holder in holders:
        holder._modules.pop(CHILD, None)


def load(
    model: nn.Module, plan: Plan, reducers: Sequence[Reducer], state: Mapping[str, Tensor], strict: bool
) -> list[str]:
    """See `Reduction.load_learned`."""
    own = {name for name in model.state_dict() if CHILD in name.split(".")}
    if any(name in own for name in state):
        offered = {name for name in state if CHILD in name.split(".")}
        return _load_into(model, {name: name for name in own}, state, offered, strict)
    names: dict[str, str] = {}
    prefixes: set[str] = set()
    stages: dict[int, int] = {}
    for point in _points(plan):
        path = f"{point.path}.{CHILD}.{_key(point.reducer, point.layer)}."
        mine = [name for name in own if name.startswith(path)]
        if mine:
            stage = stages.get(id(point.reducer), 0)
            stages[id(point.reducer)] = stage + 1
            official = point.reducer.official(stage)
            prefixes.add(official)
            names |= {official + name.removeprefix(path): name for name in mine}
    for part in (part for reducer in reducers for part in reducer.parts() if part.site is Site.HEAD):
        path, official = f"{CHILD}.{_key(part, None)}.", part.official(0)
        prefixes.add(official)
        names |= {official + name.removeprefix(path): name for name in own if name.startswith(path)}
    mine_there = {name for name in state if any(p and name.startswith(p) for p in prefixes)}
    return _load_into(model, names, state, mine_there, strict)


def _load_into(
    model: nn.Module, names: Mapping[str, str], state: Mapping[str, Tensor], offered: set[str], strict: bool
) -> list[str]:
    current = model.state_dict()
    missing = sorted(set(names) - set(state)) if strict else []
    unknown = sorted(offered - set(names))
    shapes = [
        f"{name} is {tuple(state[name].shape)}, needs {tuple(current[own].shape)}"
        for name, own in sorted(names.items())
        if name in state and state[name].shape != current[own].shape
    ]
    if missing or unknown or shapes:
        said = [f"{what}: {', '.join(keys)}" for what, keys in
                (("missing", missing), ("unknown", unknown), ("of another shape", shapes)) if keys]  # fmt: skip
        raise FormatError(f"the learned parts cannot be loaded; {'; '.join(said)}.")
    used = sorted(set(names) & set(state))
    for name in used:
        current[names[name]].copy_(state[name])
    return used


def _points(plan: Plan) -> list[Point]:
    acting = (point for point in plan.points if point.before != point.after or point.reducer.always)
    return [point for point in acting if not point.undo and _learns(point.reducer)]


def _made(reducer: Reducer, build: Build) -> nn.Module | None:
    # The same start for every patch under one seed, and no draw from the stream that the user's code goes on with.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + build.layer)
        return reducer.modules(build)


def _learns(reducer: Reducer) -> bool:
    return type(reducer).modules is not Reducer.modules


def _key(reducer: Reducer, layer: int | None) -> str:
    return reducer.name if layer is None else f"{reducer.name}_{layer}"


def _build(model: nn.Module, backbone: Backbone, plan: Plan, point: Point, stage: int) -> Build:
    return Build(
        site=point.site,
        layer=point.layer,
        depth=plan.depth,
        width=backbone.width(model),
        heads=backbone.heads(model),
        before=point.before - plan.prefix,
        after=point.after - plan.prefix,
        prefix=plan.prefix,
        stage=stage,
        classes=backbone.classes(model),
        class_token=backbone.class_token(model),
    )


def _hang(holder: nn.Module, made: Mapping[str, nn.Module], like: nn.Module) -> None:
    old = holder._modules.get(CHILD)
    if not made:
        holder._modules.pop(CHILD, None)
        return
    model_tensor = next((p for p in like.parameters() if p.is_floating_point()), None)
    kept: dict[str, nn.Module] = {}
    for key, module in made.items():
        before = old._modules.get(key) if isinstance(old, nn.ModuleDict) else None
        kept[key] = before if before is not None and _fits(before, module) else _placed(module, model_tensor)
    child = nn.ModuleDict(kept)
    child.train(like.training)
    holder.add_module(CHILD, child)


def _fits(old: nn.Module, new: nn.Module) -> bool:
    shapes = [{name: tensor.shape for name, tensor in module.state_dict().items()} for module in (old, new)]
    return type(old) is type(new) and shapes[0] == shapes[1]


def _placed(module: nn.Module, like: Tensor | None) -> nn.Module:
    return module if like is None else module.to(device=like.device, dtype=like.dtype)
