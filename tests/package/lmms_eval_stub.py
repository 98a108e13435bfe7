"""The part of lmms-eval 0.7.3 that calls a plugin, rewritten: registry, base class, instances, results.

`install` puts it where `import lmms_eval` finds it. Names, signatures, defaults and the order of checks are those of
0.7.3 (`models/registry_v2.py`, `api/model.py`, `api/instance.py`, `evaluator.py`); everything else is left out. Where
lmms-eval is installed the tests use the real one.
"""

from __future__ import annotations

import abc
import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

VERSION = "0.7.3"


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.simple_class_path is None and self.chat_class_path is None:
            raise ValueError("at least one class path")


class ModelRegistryV2:
    def __init__(self) -> None:
        self._manifests: dict[str, ModelManifest] = {}

    def register_manifest(self, manifest: ModelManifest, *, overwrite: bool = False) -> None:
        self._manifests[manifest.model_id] = manifest

    def load_payload(self, payload: Any) -> None:
        """What `load_entrypoint_manifests` does with each entry point that it has loaded."""
        payload = payload() if callable(payload) else payload
        if isinstance(payload, ModelManifest):
            return self.register_manifest(payload, overwrite=True)
        if not isinstance(payload, Iterable) or isinstance(payload, (str, bytes, dict)):
            raise TypeError("Entry point payload must be ModelManifest, iterable of them, or callable returning one")
        for manifest in payload:
            self.register_manifest(manifest, overwrite=True)

    def get_model_class(self, model_name: str, force_simple: bool = False) -> Any:
        manifest = self._manifests[model_name]
        if force_simple and manifest.simple_class_path is not None:
            kind, path = "simple", manifest.simple_class_path
        elif manifest.chat_class_path is not None:
            kind, path = "chat", manifest.chat_class_path
        else:
            kind, path = "simple", str(manifest.simple_class_path)
        module_name, cls_name = path.rsplit(".", 1)
        cls = getattr(importlib.import_module(module_name), cls_name)
        if not (isinstance(cls, type) and issubclass(cls, lmms)):
            raise TypeError(f"Model class '{path}' is not a subclass of lmms")
        if (kind == "simple") is not getattr(cls, "is_simple", True):
            raise TypeError(f"Model '{model_name}' resolved as {kind} but {cls.__name__}.is_simple disagrees")
        return cls


class CacheHook:
    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        pass


class lmms(abc.ABC):
    is_simple: bool = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        args = dict(part.split("=", 1) for part in arg_string.split(",") if part)
        more = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(**{key: _value(text) for key, text in args.items()}, **more)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def clean(self) -> None:
        self.task_dict = {}


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple:
        return self.arguments


def install(monkeypatch: Any) -> ModelRegistryV2:
    """Puts the stub into `sys.modules` for one test and returns an empty registry."""
    parts = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms, "CacheHook": CacheHook},
        "lmms_eval.api.instance": {
            "Instance": Instance,
            "GenerationResult": GenerationResult,
            "TokenCounts": TokenCounts,
        },
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest, "ModelRegistryV2": ModelRegistryV2},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return ModelRegistryV2()


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.isnumeric():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text
