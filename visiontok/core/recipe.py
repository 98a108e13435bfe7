"""Recipes: a paper's setting as data, with the numbers it expects and where they were published.

A recipe is YAML read by the safe loader under limits of size and depth and without aliases. It can name a reducer of
the registry, never a class or a module.

```yaml
schema: 1
method: tome
fields: {prop_attn: true}
schedule: {r: 13}
model: deit_small_patch16_224
dataset: imagenet-1k
expected: {top1: 79.4, gflops: 2.7, source: "ToMe, table 4"}
train: {epochs: 30, lr: 1.0e-5, distill: none}        # optional, for `visiontok train`
```
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from visiontok.core.reducer import Reducer
from visiontok.core.schedule import parse_budget
from visiontok.errors import FormatError, did_you_mean

__all__ = ["TRAIN_KEYS", "Expected", "Recipe", "load_recipe", "parse_recipe"]

SCHEMA = 1
MAX_BYTES = 64 << 10
MAX_DEPTH = 8
SCHEDULES = ("r", "keep", "gflops", "tokens")

_KEYS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "method": (str,),
    "fields": (dict,),
    "schedule": (dict,),
    "model": (str,),
    "dataset": (str,),
    "expected": (dict,),
    "train": (dict,),
}
_NUMBER = (int, float)
# Settings of a training run that belong to a method or paper; where it runs and what it reads do not.
TRAIN_KEYS: dict[str, tuple[type, ...]] = {
    "epochs": (int,),
    "batch_size": (int,),
    "grad_accum_steps": (int,),
    "lr": _NUMBER,
    "opt": (str,),
    "weight_decay": _NUMBER,
    "momentum": _NUMBER,
    "sched": (str,),
    "warmup_epochs": (int,),
    "warmup_lr": _NUMBER,
    "min_lr": _NUMBER,
    "cooldown_epochs": (int,),
    "clip_grad": _NUMBER,
    "smoothing": _NUMBER,
    "mixup": _NUMBER,
    "cutmix": _NUMBER,
    "drop_path": _NUMBER,
    "augment": (bool,),
    "model_ema": (bool,),
    "model_ema_decay": _NUMBER,
    "amp": (bool,),
    "amp_dtype": (str,),
    "distill": (str,),
    "distill_logits": _NUMBER,
    "distill_tokens": _NUMBER,
    "distill_tau": _NUMBER,
    "rtsm_lr_scale": _NUMBER,
    "shuffle": _NUMBER,
    "attentive_mask": _NUMBER,
}
# PyYAML's functions are typed only in part.
_yaml: Any = yaml
_REQUIRED = ("schema", "method", "model", "dataset", "expected")


@dataclass(frozen=True)
class Expected:
    """Published numbers of a recipe.

    Attributes:
        source: Where they were published: paper, table or file.
        top1: Top-1 accuracy, percent.
        gflops: GMACs per image, what papers call GFLOPs.
    """

    source: str
    top1: float | None = None
    gflops: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A reducer with its parameters, the model and data set they are for, and what to expect.

    Attributes:
        method: Registry name of the reducer.
        model: Model name, with a tag where the numbers hang on one.
        dataset: Data set name.
        expected: Published numbers.
        fields: Parameters of the reducer.
        schedule: Its budget, one of `SCHEDULES`, or empty.
        train: Settings of the training run, keys of `TRAIN_KEYS`, or None where the recipe trains nothing.
    """

    method: str
    model: str
    dataset: str
    expected: Expected
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    schedule: Mapping[str, Any] = field(default_factory=dict[str, Any])
    train: Mapping[str, Any] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Keyword arguments of the reducer: `fields` and `schedule`."""
        return {**self.fields, **self.schedule}

    def reducer(self) -> Reducer:
        """The reducer with its parameters.

        Raises:
            UnknownNameError, ParameterError: A parameter does not exist or is out of range.
        """
        from visiontok import reducers

        return reducers.create(self.method, **self.params)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe file.

    Raises:
        FormatError: Not a file, larger than 64 KB, not YAML, or not a recipe of this schema.
    """
    file = Path(path)
    if not file.is_file():
        raise FormatError(f"recipe '{file}' does not exist.")
    with open(file, "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    try:
        return parse_recipe(data)
    except FormatError as error:
        raise FormatError(f"recipe '{file}': {error}") from error


def parse_recipe(text: str | bytes) -> Recipe:
    """Reads a recipe from text.

    Raises:
        FormatError: The text is too large, is not YAML, or does not follow the schema.
    """
    values = _mapping(_safe_yaml(text), "a recipe", _KEYS)
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise FormatError(f"a recipe needs {', '.join(missing)}.")
    if values["schema"] != SCHEMA:
        raise FormatError(f"schema {values['schema']} is not supported, this visiontok reads schema {SCHEMA}.")
    return Recipe(
        method=_method(values["method"]),
        model=values["model"],
        dataset=values["dataset"],
        expected=_expected(values["expected"]),
        fields=_fields(values.get("fields", {})),
        schedule=_schedule(values.get("schedule", {})),
        train=_train(values["train"]) if "train" in values else None,
    )


def _safe_yaml(text: str | bytes) -> Any:
    if len(text) > MAX_BYTES:
        raise FormatError(f"a recipe has at most {MAX_BYTES} bytes.")
    try:
        # Events first: a bomb of aliases or of brackets is refused before any object is built.
        _check_events(text)
        _check_keys(_yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except FormatError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"not valid YAML: {' '.join(str(error).split())}") from error


def _check_events(text: str | bytes) -> None:
    depth = 0
    for event in _yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise FormatError("aliases (*name) are not allowed in a recipe.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise FormatError(f"a recipe is nested at most {MAX_DEPTH} deep.")


def _check_keys(node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            # A key that is a list or a mapping is refused by the loader itself.
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise FormatError(f"key '{key.value}' appears twice.")
                seen.add(key.value)
            _check_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item)


def _mapping(values: Any, what: str, keys: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise FormatError(f"{what} is a mapping with the keys {', '.join(keys)}, got {type(values).__name__}.")
    checked = cast("dict[Any, Any]", values)
    for key, value in checked.items():
        if key not in keys:
            raise FormatError(f"{what} has no key {key!r}.{did_you_mean(str(key), keys)} Keys: {', '.join(keys)}.")
        # A bool is an int to Python; here it is one only where nothing else is meant.
        if not isinstance(value, keys[key]) or isinstance(value, bool) != (keys[key] == (bool,)):
            names = " or ".join(kind.__name__ for kind in keys[key])
            raise FormatError(f"{key} must be {names}, got {value!r}.")
    return checked


def _method(name: str) -> str:
    from visiontok.reducers import registry

    # Resolves aliases and refuses what is not registered; dotted paths of classes can never match.
    return vars(registry.get(name))["name"]


def _expected(values: dict[str, Any]) -> Expected:
    checked = _mapping(values, "expected", {"top1": (int, float), "gflops": (int, float), "source": (str,)})
    if not checked.get("source", "").strip():
        raise FormatError("expected needs a source: the paper and table, or the file, that published the numbers.")
    numbers = {name: float(checked[name]) for name in ("top1", "gflops") if name in checked}
    for name, value in numbers.items():
        if not math.isfinite(value) or value <= 0:
            raise FormatError(f"expected.{name} must be a positive number, got {value}.")
    return Expected(source=checked["source"], **numbers)


def _fields(values: dict[Any, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise FormatError(f"fields are keyed by parameter names, got {key!r}.")
        if key in SCHEDULES:
            raise FormatError(f"the budget '{key}' belongs under schedule, not under fields.")
        _plain(value, f"fields.{key}")
    return values


def _schedule(values: dict[Any, Any]) -> dict[str, Any]:
    if len(values) > 1:
        raise FormatError(f"schedule holds one of {', '.join(SCHEDULES)}, got {', '.join(map(str, values))}.")
    schedule = _mapping(values, "schedule", dict.fromkeys(SCHEDULES, (int, float, str, list, dict)))
    for key, value in schedule.items():
        _plain(value, f"schedule.{key}")
    # YAML has no tuple: (r, inflection) is written as text.
    return {key: parse_budget(value) if isinstance(value, str) else value for key, value in schedule.items()}


def _train(values: dict[Any, Any]) -> dict[str, Any]:
    checked = _mapping(values, "train", TRAIN_KEYS)
    for key, value in checked.items():
        _plain(value, f"train.{key}")
    return checked


def _plain(value: Any, where: str) -> None:
    parts: list[Any] = []
    if isinstance(value, dict):
        mapping = cast("dict[Any, Any]", value)
        wrong = next((key for key in mapping if not isinstance(key, (str, int)) or isinstance(key, bool)), None)
        if wrong is not None:
            raise FormatError(f"{where} has the key {wrong!r}; keys are texts or layer numbers.")
        parts = list(mapping.values())
    elif isinstance(value, list):
        parts = cast("list[Any]", value)
    elif not (value is None or isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))):
        raise FormatError(f"{where} holds {value!r}; numbers, texts, booleans, lists and mappings are accepted.")
    for part in parts:
        _plain(part, where)
