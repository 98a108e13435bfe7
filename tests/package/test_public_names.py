"""U2: every public name is documented; `dir()` shows the lazy ones; importing costs nothing."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import visiontok as vt
import visiontok.core
import visiontok.ops
import visiontok.reducers

PARTS = ("visiontok.core", "visiontok.ops", "visiontok.reducers", "visiontok.backbones")
SINGLE = ("visiontok.api", "visiontok.errors", "visiontok.finding", "visiontok.hub", "visiontok.registry")


def _modules() -> list[ModuleType]:
    names = list(SINGLE)
    for part in PARTS:
        package = importlib.import_module(part)
        names += [part, *(f"{part}.{info.name}" for info in pkgutil.iter_modules(package.__path__) if not info.ispkg)]
    return [importlib.import_module(name) for name in names]


def _public() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in _modules():
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found[f"{module.__name__}.{name}"] = value
    return found


def _members(cls: type) -> dict[str, Any]:
    """Methods and properties that a class itself defines for its users."""
    found = {}
    for name, value in vars(cls).items():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(value):
            found[name] = value
    return found


def test_every_module_says_what_it_is_for() -> None:
    assert [module.__name__ for module in _modules() if not (module.__doc__ or "").strip()] == []


def test_every_module_lists_its_public_names() -> None:
    without = [m.__name__ for m in _modules() if m.__name__ not in PARTS and not hasattr(m, "__all__")]
    assert without == []


@pytest.mark.parametrize("name", vt.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(vt, name)
    assert name in dir(vt)
    if name != "__version__":
        assert (value.__doc__ or "").strip()


@pytest.mark.parametrize("name", _public())
def test_every_public_class_and_function_has_a_docstring(name: str) -> None:
    value = _public()[name]
    text = (value.__doc__ or "").strip()
    assert text
    # A dataclass without a docstring gets its signature as one.
    assert not text.startswith(f"{value.__name__}(")


@pytest.mark.parametrize("name", [name for name, value in _public().items() if inspect.isclass(value)])
def test_every_public_method_has_a_docstring(name: str) -> None:
    cls = _public()[name]
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("visiontok")]
    bare = []
    for member, value in _members(cls).items():
        inherited = any((getattr(vars(base).get(member), "__doc__", None) or "").strip() for base in bases)
        if not (value.__doc__ or "").strip() and not inherited and member != "forward":
            bare.append(member)
    # Trivial predicates of a runtime class need no sentence; anything else does.
    assert [member for member in bare if not _one_line(_members(cls)[member])] == []


def _one_line(function: Any) -> bool:
    body = inspect.getsource(function).split("\n")
    return sum(bool(line.strip()) and not line.strip().startswith(("@", "def ", "#")) for line in body) <= 1


@pytest.mark.parametrize("name", vt.list_reducers())
def test_every_reducer_names_its_paper(name: str) -> None:
    cls = vt.reducers.registry.get(name)
    card = vt.describe(name)
    assert card.title
    assert card.summary.endswith(".")
    assert card.cons
    if card.paper == "none":
        assert card.url == ""
        assert name in {"random", "identity"}, "a method without a paper must be a baseline"
    else:
        assert re.search(r"(19|20)\d\d", card.paper)
        assert card.url.startswith("https://")
        assert card.url.rpartition("/")[2] in (cls.__doc__ or ""), "the docstring does not cite the card's paper"
    assert all(parameter in str(card) for parameter in card.parameters)


@pytest.mark.parametrize("name", vt.list_reducers())
def test_every_parameter_of_a_reducer_is_documented(name: str) -> None:
    cls = vt.reducers.registry.get(name)
    text = "\n".join(base.__doc__ or "" for base in cls.__mro__ if base.__module__.startswith("visiontok"))
    missing = [parameter for parameter in vt.describe(name).parameters if not re.search(rf"\b{parameter}\b", text)]
    assert missing == []


HEAVY = ("torch", "numpy", "timm", "yaml", "PIL", "tqdm", "huggingface_hub", "safetensors")


def _fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy_and_lists_its_names() -> None:
    out = _fresh(
        "import sys; import visiontok as vt; names = dir(vt)\n"
        f"print([n for n in {HEAVY!r} if n in sys.modules])\n"
        "print([n for n in sys.modules if n.startswith('visiontok')])\n"
        "print(all(n in names for n in ('list_reducers', 'patch', 'TokenMap', 'reducers', 'from_pretrained')))\n"
    )
    assert out.splitlines() == ["[]", "['visiontok']", "True"]


def test_import_changes_no_global_of_other_libraries() -> None:
    out = _fresh(
        "import torch, timm\n"
        "from timm.models.vision_transformer import Block, VisionTransformer, Attention\n"
        "classes = (Block, VisionTransformer, Attention, torch.nn.Module, torch.Tensor)\n"
        "before = [dict(vars(c)) for c in classes]\n"
        "functions = dict(vars(torch.nn.functional))\n"
        "import visiontok as vt, visiontok.api, visiontok.hub\n"
        "vt.list_reducers(), vt.list_backbones()\n"
        "m = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1)\n"
        "with vt.patched(m, 'tome', r=1): m(torch.randn(1, 3, 16, 16))\n"
        "print(before == [dict(vars(c)) for c in classes], functions == dict(vars(torch.nn.functional)))\n"
    )
    assert out.splitlines()[-1] == "True True"


def test_unknown_names_raise_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = vt.nonsense
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = vt.reducers.Nonsense
