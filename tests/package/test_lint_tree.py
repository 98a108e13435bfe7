"""The house rules that a linter does not know (S2, S4 and ARCHITECTURE §2), checked on the syntax tree."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "visiontok"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
# Libraries that only some users have: importing one at module level would break everybody else.
OPTIONAL = {
    "accelerate",
    "datasets",
    "diffusers",
    "gradio",
    "lmms_eval",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "open_clip",
    "pandas",
    "peft",
    "plotly",
    "pyarrow",
    "ray",
    "sklearn",
    "submitit",
    "timm",
    "torchvision",
    "transformers",
    "triton",
    "webdataset",
}
FORBIDDEN = {
    "pickle.load",
    "pickle.loads",
    "dill.load",
    "joblib.load",
    "marshal.loads",
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
}
# Who may import whom: a layer imports itself and those after it.
LAYERS = [
    {"cli", "demo", "demos", "lmms_eval_plugin", "__main__"},
    {"bench", "viz", "tokenizers", "training"},
    {"api", "finding", "hub", "models", "warming"},
    {"reducers", "backbones"},
    {"core"},
    {"registry"},
    {"ops"},
    {"errors"},
]

every_file = pytest.mark.parametrize("path", FILES, ids=NAMES)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(tree: ast.AST, *, top: bool) -> Iterator[str]:
    """Dotted names that a file imports; with `top` only those that run when the file is imported."""
    if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and top:
        return
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.dump(tree.test):
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    if isinstance(tree, ast.ImportFrom):
        if tree.level:
            raise AssertionError("relative import; write the full path")
        yield from (f"{tree.module}.{alias.name}" for alias in tree.names)
    for child in ast.iter_child_nodes(tree):
        yield from _imports(child, top=top)


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def _calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call))


def test_the_rules_see_the_package() -> None:
    assert {"visiontok/__init__.py", "visiontok/core/runtime.py", "visiontok/reducers/tome.py"} <= set(NAMES)


@every_file
def test_no_file_is_over_four_hundred_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@every_file
def test_no_assert_statements(path: Path) -> None:
    # `python -O` removes them, so they guard nothing.
    assert [node.lineno for node in ast.walk(_tree(path)) if isinstance(node, ast.Assert)] == []


@every_file
def test_nothing_optional_is_imported_at_module_level(path: Path) -> None:
    roots = {name.partition(".")[0] for name in _imports(_tree(path), top=True)}
    # Kernels cannot be written without their language; their folder is imported only where they run.
    allowed = {"triton"} if path.parent == PACKAGE / "ops" / "triton" else set()
    assert roots & OPTIONAL <= allowed


@every_file
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    for call in _calls(path):
        name = _called(call)
        if name == "torch.load":
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("weights_only") == "True", f"line {call.lineno}: torch.load without weights_only=True"
        assert name not in FORBIDDEN, f"line {call.lineno}: {name}"
        for word in call.keywords:
            assert (word.arg, ast.unparse(word.value)) not in {
                ("shell", "True"), ("trust_remote_code", "True"), ("allow_pickle", "True")
            }, f"line {call.lineno}: {word.arg}=True"  # fmt: skip
    names = set(_imports(_tree(path), top=False))
    assert not {n for n in names if n in ("pickle.load", "pickle.loads", "torch.load") or n.startswith("dill")}


@every_file
def test_modules_are_never_named_by_data(path: Path) -> None:
    # A config names reducers and backbones through the registry only (S4). A name that is no literal is allowed where
    # it starts with our own package, and in the files that look up what they list themselves.
    own = (
        "visiontok/__init__.py",
        "visiontok/registry.py",
        "visiontok/cli/",
        "visiontok/demo",
        "visiontok/bench/environment",
        "visiontok/bench/launch.py",
    )
    if str(path.relative_to(ROOT)).startswith(own):
        return
    for call in _calls(path):
        if _called(call) in ("importlib.import_module", "import_module", "__import__"):
            name = call.args[0]
            ours = ast.unparse(name).startswith(("f'{__name__}.", "f'visiontok."))
            assert isinstance(name, ast.Constant) or ours, f"line {call.lineno}: {ast.unparse(call)}"


def _part(name: str) -> str:
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def _layer(part: str) -> int | None:
    return next((index for index, layer in enumerate(LAYERS) if part in layer), None)


@every_file
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    level = _layer(own)
    assert level is not None, f"{own} belongs to no layer; add it to LAYERS"
    # `from visiontok import X` names a part, a class (lazy) or the version.
    for name in _imports(_tree(path), top=True):
        if not name.startswith("visiontok"):
            continue
        target = _layer(_part(name))
        if target is not None:
            assert target >= level, f"{own} imports {name}, which is above it"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "ops" or "ops" in p.parts], ids=str)
def test_ops_know_nothing_of_modules_or_models(path: Path) -> None:
    mine = [name for name in _imports(_tree(path), top=False) if name.startswith("visiontok")]
    assert all(_part(name) in ("ops", "errors") for name in mine), mine


REDUCERS = [p for p in FILES if p.parent.name == "reducers" and p.name != "__init__.py"]
BACKBONES = [p for p in FILES if p.parent.name == "backbones" and p.name != "__init__.py"]


@pytest.mark.parametrize("path", REDUCERS, ids=lambda p: p.stem)
def test_a_reducer_imports_core_ops_torch_and_the_standard_library(path: Path) -> None:
    for name in _imports(_tree(path), top=False):
        root = name.partition(".")[0]
        if root == "visiontok":
            assert _part(name) in ("core", "ops", "errors", "reducers"), name
        else:
            assert root == "torch" or root in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", BACKBONES, ids=lambda p: p.stem)
def test_a_backbone_imports_core_and_knows_no_reducer(path: Path) -> None:
    import visiontok as vt

    for name in _imports(_tree(path), top=False):
        if name.startswith("visiontok"):
            # Families share mixins, and the models that no library has are ours: their examples are built here.
            assert _part(name) in ("core", "errors", "ops", "backbones", "models"), name
    known = {*vt.list_reducers(), *(vt.reducers.registry.get(name).__name__ for name in vt.list_reducers())}
    # "random" and "identity" are words of torch too, so only names that can mean nothing else are looked for.
    known -= {"random", "identity", "Random", "Identity"}
    tree = _tree(path)
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {
        node.value.lower() for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert words & known == set()


@pytest.mark.parametrize("path", [p for p in FILES if "core" in p.parts], ids=lambda p: p.stem)
def test_the_core_imports_no_reducer_and_no_backbone(path: Path) -> None:
    # Inside functions too, but for the recipe and saved-config readers, which are given names.
    allowed = {"recipe"}
    for name in _imports(_tree(path), top=path.stem in allowed):
        if name.startswith("visiontok"):
            assert _part(name) in ("core", "ops", "errors", "registry", "__version__"), name
