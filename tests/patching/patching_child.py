"""Runs in a spawned process; imports nothing at the top, so that it can watch what importing visiontok does."""

from __future__ import annotations

from typing import Any


def globals_of(prefixes: tuple[str, ...]) -> dict[str, int]:
    """Identity of everything that the modules with these prefixes, and the classes in them, hold."""
    import inspect
    import sys

    found: dict[str, int] = {}
    for name, module in list(sys.modules.items()):
        if module is None or not name.startswith(prefixes):
            continue
        for key, value in list(vars(module).items()):
            if key.startswith("__") or inspect.ismodule(value):
                continue
            found[f"{name}.{key}"] = id(value)
            if inspect.isclass(value) and value.__module__ == name:
                found.update({f"{name}.{key}.{k}": id(v) for k, v in vars(value).items() if inspect.isfunction(v)})
    return found


def settings() -> dict[str, Any]:
    """Process-wide switches."""
    import logging
    import os
    import warnings

    import torch

    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "rng": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "handlers": len(logging.getLogger().handlers),
        "filters": len(warnings.filters),
        "environment": dict(os.environ),
    }


def child(pipe: Any) -> None:
    """Takes a pickled patched model and an image, sends back its output and what changed in torch and timm."""
    import pickle

    import timm
    import torch

    watched = ("torch.nn", "torch.functional", "torch.utils.checkpoint", "timm.models", "timm.layers")
    assert timm.__version__
    before, switches = globals_of(watched), settings()
    import visiontok as vt

    vt.list_reducers()
    vt.list_backbones()
    imported, imported_switches = globals_of(watched), settings()
    sent = pipe.recv_bytes()
    model, image = pickle.loads(sent)  # noqa: S301
    with torch.no_grad():
        reduced = model(image)
        vt.unpatch(model)
        plain = model(image)
    used, used_switches = globals_of(watched), settings()
    changed = {key for old in (imported, used) for key in before if old.get(key, before[key]) != before[key]}
    kept = {key for old in (imported_switches, used_switches) for key in switches if old[key] != switches[key]}
    pipe.send(
        {"reduced": reduced.tolist(), "plain": plain.tolist(), "changed": sorted(changed), "switches": sorted(kept)}
    )
    pipe.close()
