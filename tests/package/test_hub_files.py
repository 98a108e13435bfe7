"""S2, S4: a saved reduction is data. Whatever a file holds, loading it patches as told or raises a VisionTokError."""

from __future__ import annotations

import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import visiontok as vt
from visiontok.core import patching, saving

FLIPS = 400


def _model() -> Any:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return _model()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    with vt.patched(model, "pitome", keep=0.8, preset="clip") as red:
        red.save_pretrained(tmp_path)
    return tmp_path


def _attempt(model: Any, folder: Path) -> vt.VisionTokError | None:
    """Loads and runs; anything but success or a VisionTokError propagates. The model is left clean either way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            red = vt.from_pretrained(model, folder)
    except vt.VisionTokError as error:
        assert not patching.is_patched(model), "a refused file left the model patched"
        return error
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))
    except vt.VisionTokError as error:
        return error
    finally:
        red.unpatch()
    return None


def test_round_trip(model: Any, saved: Path) -> None:
    assert [path.name for path in saved.iterdir()] == [saving.CONFIG]
    assert _attempt(model, saved) is None
    with vt.patched(model, "pitome", keep=0.8, preset="clip") as red, torch.no_grad():
        want = model(torch.ones(1, 3, 32, 32))
        plan = red.plan.tokens
    red = vt.from_pretrained(model, saved)
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 3, 32, 32)), want)
    assert red.plan.tokens == plan
    red.unpatch()


def test_bit_flips_in_the_config(model: Any, saved: Path) -> None:
    path = saved / saving.CONFIG
    original = path.read_bytes()
    dice = random.Random(0)
    refused = 0
    for _ in range(FLIPS):
        damaged = bytearray(original)
        for _ in range(dice.choice((1, 1, 2, 5))):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        refused += _attempt(model, saved) is not None
    assert FLIPS // 3 < refused < FLIPS


def test_truncation_at_every_place(model: Any, saved: Path) -> None:
    path = saved / saving.CONFIG
    original = path.read_bytes().rstrip()
    for length in range(0, len(original), 7):
        path.write_bytes(original[:length])
        assert isinstance(_attempt(model, saved), vt.errors.FormatError)


JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    7,
    0.5,
    1e999,
    "",
    "x" * 5000,
    "__import__('os')",
    [],
    [1, "a"],
    {},
    {"a": 1},
    [[[]]],
    "(3, 1",
]


SHARED = tuple(vt.describe("identity").parameters)


# Checks of fields are the base class's, except where a method adds its own: a few of each kind.
TRIED = (vt.list_reducers()[0], "clca", "pitome", "tome")


@pytest.mark.parametrize(
    "name", [name if name in TRIED else pytest.param(name, marks=pytest.mark.full) for name in vt.list_reducers()]
)
def test_fields_of_any_type_and_value(name: str, model: Any, tmp_path: Path) -> None:
    good = {
        "schema": 1, "visiontok_version": "0", "backbone": "timm_vit", "model_class": "VisionTransformer", "depth": 2,
        "restore": None,
    }  # fmt: skip
    # What all reducers have is tried on the first one.
    shared = () if name == vt.list_reducers()[0] else SHARED
    fields = [*(key for key in vt.describe(name).parameters if key not in shared), "no_such_field"]
    for key in fields:
        for value in JUNK:
            config = {**good, "reducers": [{"name": name, "fields": {key: value}}]}
            (tmp_path / saving.CONFIG).write_text(json.dumps(config))
            _attempt(model, tmp_path)


FOREIGN: list[tuple[list[Any], Any]] = [
    *(([key], value) for key in ("schema", "depth", "reducers", "backbone") for value in ("os", [], {}, -1, None)),
    *((["restore"], value) for value in ("os", [], {}, -1, "__import__('os').system('true')")),
    (["reducers", 0, "name"], "os.system"),
    (["reducers", 0, "name"], "visiontok.reducers.tome.ToMe"),
    (["reducers", 0, "name"], "../tome"),
    (["reducers", 0, "name"], "__class__"),
    (["reducers", 0, "class"], "ToMe"),
    (["reducers", 0, "_target_"], "os.system"),
    (["reducers", 0, "fields", "__class__"], "os.system"),
    (["auto_map"], {"AutoModel": "evil.Model"}),
    (["trust_remote_code"], True),
    (["model_class"], "torch.nn.Module"),
]


@pytest.mark.parametrize(("place", "value"), FOREIGN, ids=str)
def test_a_config_can_name_nothing_but_registered_names(place: list[Any], value: Any, model: Any, saved: Path) -> None:
    path = saved / saving.CONFIG
    config = json.loads(path.read_text())
    spot = config
    for key in place[:-1]:
        spot = spot[key]
    spot[place[-1]] = value
    path.write_text(json.dumps(config))
    assert _attempt(model, saved) is not None


def test_a_config_imports_nothing(model: Any, saved: Path) -> None:
    config = json.loads((saved / saving.CONFIG).read_text())
    config["reducers"][0]["name"] = "antigravity"
    (saved / saving.CONFIG).write_text(json.dumps(config))
    assert isinstance(_attempt(model, saved), vt.errors.UnknownNameError)
    assert "antigravity" not in sys.modules


def test_deep_large_and_foreign_files_are_refused(model: Any, tmp_path: Path) -> None:
    path = tmp_path / saving.CONFIG
    for content in (b"[" * 60_000, b" " * 70_000, b"\xff\xfe\x00", b"\x80\x04\x95pickle", b"null", b"[]", b"3", b"NaN"):
        path.write_bytes(content)
        assert isinstance(_attempt(model, tmp_path), vt.errors.FormatError)


def test_a_missing_folder_or_file_is_refused_without_a_look_at_the_network(
    model: Any, tmp_path: Path, offline: list[str]
) -> None:
    before = len(offline)
    for source in (tmp_path, tmp_path / "gone", "a/b/c"):
        with pytest.raises(vt.VisionTokError):
            vt.from_pretrained(model, source)
    assert offline[before:] == []


class TestLearnedParts:
    """Bit flips in the safetensors file, with a stand-in for a reducer that has learned parts."""

    @pytest.fixture
    def weights(self, model: Any, tmp_path: Path) -> Path:
        from safetensors.torch import save_file

        path = tmp_path / saving.WEIGHTS
        save_file({"visiontok.scale": torch.arange(6.0), "visiontok.bias": torch.ones(2, 3)}, path)
        return path

    def _holder(self) -> torch.nn.Module:
        part = torch.nn.Module()
        part.scale = torch.nn.Parameter(torch.zeros(6))
        part.bias = torch.nn.Parameter(torch.zeros(2, 3))
        holder = torch.nn.Module()
        holder.visiontok = part
        return holder

    def _load(self, path: Path) -> vt.VisionTokError | None:
        from visiontok import hub

        try:
            hub._load_learned(self._holder(), path)
        except vt.VisionTokError as error:
            return error
        return None

    def test_the_intact_file_loads(self, weights: Path) -> None:
        from visiontok import hub

        holder = self._holder()
        hub._load_learned(holder, weights)
        assert holder.visiontok.scale.tolist() == [0, 1, 2, 3, 4, 5]

    def test_bit_flips(self, weights: Path) -> None:
        original = weights.read_bytes()
        dice = random.Random(1)
        header = 8 + int.from_bytes(original[:8], "little")
        refused = 0
        for _ in range(FLIPS):
            damaged = bytearray(original)
            damaged[dice.randrange(header)] ^= 1 << dice.randrange(8)
            weights.write_bytes(damaged)
            refused += self._load(weights) is not None
        assert refused > FLIPS // 2

    @pytest.mark.parametrize("length", [0, 4, 8, 20, 60, -1])
    def test_truncated(self, weights: Path, length: int) -> None:
        weights.write_bytes(weights.read_bytes()[:length])
        assert isinstance(self._load(weights), vt.errors.FormatError)

    def test_other_shapes_are_refused(self, weights: Path) -> None:
        from safetensors.torch import save_file

        save_file({"visiontok.scale": torch.arange(7.0), "visiontok.bias": torch.ones(2, 3)}, weights)
        assert isinstance(self._load(weights), vt.errors.FormatError)

    def test_a_pickle_is_refused(self, weights: Path) -> None:
        torch.save({"visiontok.scale": torch.arange(6.0)}, weights)
        assert isinstance(self._load(weights), vt.errors.FormatError)
