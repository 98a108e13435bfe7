"""Golden files: found by walking a folder, never by name; each is checked completely or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

BUNDLED = Path(__file__).parent / "data"
PROJECT = Path(__file__).resolve().parents[2]


def golden_folder() -> Path:
    """`$VISIONTOK_GOLDEN`, else `../shared/golden` beside the project, else the few files carried here."""
    given = os.environ.get("VISIONTOK_GOLDEN")
    if given:
        folder = Path(given)
        if not folder.is_dir():
            raise FileNotFoundError(f"VISIONTOK_GOLDEN={given} is not a folder")
        return folder
    shared = PROJECT.parent / "shared" / "golden"
    return shared if shared.is_dir() else BUNDLED


def flat(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def implemented_names() -> set[str]:
    """Every name under which the package could hold a method: reducers and the modules of its method folders."""
    import visiontok as vt
    from visiontok import reducers

    names = {*vt.list_reducers(), *(alias for cls in reducers.registry.classes() for alias in cls.aliases)}
    for package in ("reducers", "ops", "tokenizers", "models"):
        spec = importlib.util.find_spec(f"visiontok.{package}")
        for folder in [] if spec is None else spec.submodule_search_locations or []:
            names |= {path.stem for path in Path(folder).glob("*.py") if path.stem != "__init__"}
    return {flat(name) for name in names}


@dataclass
class Case:
    """One golden file.

    Attributes:
        path: The file.
        method, level, notes: Its metadata.
        params: Its parameters.
        atol32: Absolute tolerance for fp32 floats; fp64 is 1e-10.
    """

    path: Path
    method: str
    level: str
    params: dict[str, Any]
    notes: str = ""
    atol32: float = 2e-4
    tensors: dict[str, Tensor] = field(default_factory=dict)
    compared: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path) -> Case:
        """Reads the metadata only."""
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        return cls(path, meta["method"], meta["level"], json.loads(meta["params"]), meta.get("notes", ""))

    @property
    def id(self) -> str:
        return f"{self.method}-{self.path.stem}"

    def load(self) -> Case:
        """Reads the tensors and forgets earlier comparisons."""
        with safe_open(self.path, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.compared = set()
        return self

    def given(self, name: str) -> Tensor | None:
        """The tensor `in.<name>`, or None."""
        return self.tensors.get(f"in.{name}")

    def need(self, name: str) -> Tensor:
        """The tensor `in.<name>`."""
        return self.tensors[f"in.{name}"]

    def has(self, name: str) -> bool:
        """Whether `out.<name>` is in the file."""
        return f"out.{name}" in self.tensors

    def weights(self) -> dict[str, Tensor]:
        """The state dict."""
        return {name.removeprefix("weight."): t for name, t in self.tensors.items() if name.startswith("weight.")}

    def check(self, name: str, got: Tensor, exact: bool = False) -> None:
        """Compares a result with `out.<name>` and ticks that off.

        Args:
            name: Without `out.`.
            got: The result; integers, and anything with `exact`, must be equal.
        """
        want = self.tensors[f"out.{name}"]
        assert tuple(got.shape) == tuple(want.shape), f"{name}: shape {tuple(got.shape)}, golden {tuple(want.shape)}"
        if exact or not want.is_floating_point():
            wrong = got.to(want.dtype) != want
            assert not bool(wrong.any()), f"{name}: {int(wrong.sum())} of {wrong.numel()} entries differ"
        else:
            atol = 1e-10 if want.dtype == torch.float64 else self.atol32
            error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
            assert error <= atol, f"{name}: off by {error:.3g}, allowed {atol:g}"
        self.compared.add(f"out.{name}")

    def finish(self) -> None:
        """Fails if any `out.*` tensor was not compared."""
        left = sorted(name for name in self.tensors if name.startswith("out.") and name not in self.compared)
        assert not left, f"{self.id}: never compared: {', '.join(left)}"
        assert self.compared, f"{self.id}: nothing was compared"


def discover(folder: Path) -> list[Case]:
    """Every golden file below a folder, in a stable order."""
    return [Case.open(path) for path in sorted(folder.rglob("*.safetensors"))]
