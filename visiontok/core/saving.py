"""The saved form of a reduction: one small JSON file with a strict schema, safetensors for learned parts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from visiontok import __version__
from visiontok.core.reducer import Reducer
from visiontok.core.schedule import parse_budget
from visiontok.errors import FormatError

if TYPE_CHECKING:
    from visiontok.core.reduction import Reduction

__all__ = ["CONFIG", "SCHEMA", "WEIGHTS", "learned_parts", "read_config", "revive_fields", "save_pretrained"]

CONFIG = "visiontok_config.json"
WEIGHTS = "visiontok.safetensors"
SCHEMA = 1

_LIMIT = 64 * 1024
_KEYS = {
    "schema": int,
    "visiontok_version": str,
    "reducers": list,
    "backbone": str,
    "model_class": str,
    "depth": int,
    "restore": (str, type(None)),
}


def save_pretrained(reduction: Reduction, directory: str | Path) -> Path:
    """Writes `visiontok_config.json` (and learned parts, if any) into a directory.

    Args:
        reduction: A reduction in place.
        directory: Made if missing.

    Returns:
        The path of the configuration.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "schema": SCHEMA,
        "visiontok_version": __version__,
        "reducers": [{"name": r.name, "fields": _plain(r.fields())} for r in reduction.reducers],
        "backbone": reduction.plan.backbone,
        "model_class": reduction.plan.model,
        "depth": reduction.plan.depth,
        "restore": reduction.restore_mode,
    }
    learned = learned_parts(reduction.model)
    if learned:
        from safetensors.torch import save_file

        save_file(learned, folder / WEIGHTS, metadata={"visiontok": json.dumps(config)})
    path = folder / CONFIG
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads and checks a configuration.

    Raises:
        FormatError: Too large, not JSON, a key missing, unknown (unless written by a newer version: dropped with a
            warning) or of a wrong type.
    """
    file = Path(path)
    if file.stat().st_size > _LIMIT:
        raise FormatError(f"{file.name} has {file.stat().st_size} bytes; a configuration has at most {_LIMIT}.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.name} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise FormatError(f"{file.name} must hold an object, got {type(config).__name__}.")
    schema = config.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise FormatError(f"{file.name}: schema must be an int >= 1, got {schema!r}.")
    unknown = sorted(set(config) - set(_KEYS))
    if unknown and schema <= SCHEMA:
        raise FormatError(f"{file.name}: unknown keys {', '.join(unknown)}; known: {', '.join(_KEYS)}.")
    if unknown:
        made = config.get("visiontok_version")
        ignored = f"{file.name} was written by visiontok {made}; ignored {', '.join(unknown)}. Upgrade to use them."
        warnings.warn(ignored, stacklevel=3)
    for key, kind in _KEYS.items():
        if key not in config:
            raise FormatError(f"{file.name}: key {key!r} is missing.")
        if not isinstance(config[key], kind) or isinstance(config[key], bool):
            raise FormatError(f"{file.name}: {key} has the wrong type {type(config[key]).__name__}.")
    for item in config["reducers"]:
        if not isinstance(item, dict) or set(item) != {"name", "fields"} or not isinstance(item["name"], str):
            raise FormatError(f"{file.name}: a reducer is {{'name': text, 'fields': object}}, got {item!r}.")
        if not isinstance(item["fields"], dict):
            raise FormatError(f"{file.name}: fields of {item['name']} must be an object, got {item['fields']!r}.")
    if not config["reducers"]:
        raise FormatError(f"{file.name}: reducers is empty.")
    return {key: config[key] for key in _KEYS}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has neither tuples nor int keys; budgets that need them are written as text and read by parse_budget.
    return {key: _plain_value(value) for key, value in fields.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Reducer):
        return {"name": value.name, "fields": _plain(value.fields())}
    return repr(value) if isinstance(value, (tuple, dict)) else value


def revive_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as `save_pretrained` was given them."""
    written = ("(", "[", "{")

    def revived(value: Any) -> Any:
        if isinstance(value, Mapping) and set(value) == {"name", "fields"}:
            return {"name": value["name"], "fields": revive_fields(value["fields"])}
        return parse_budget(value) if isinstance(value, str) and value.startswith(written) else value

    return {key: revived(value) for key, value in fields.items()}


def learned_parts(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that reducers added to a model, by state_dict key."""
    return {name: tensor for name, tensor in model.state_dict().items() if "visiontok" in name.split(".")}
