"""LV-ViT and SiT's builders: the released key lists, sizes as published, loading, fp32 attention, the backbone."""

import argparse
import gzip
import json
import pickle
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import visiontok as vt
from visiontok.core.learned import part_of
from visiontok.errors import FormatError, IncompatibleError, ParameterError, UnknownNameError
from visiontok.models import lvvit as models
from visiontok.models.checkpoints import read_checkpoint
from visiontok.models.lvvit import LVViT, lvvit, sit_lvvit
from visiontok.models.lvvit_parts import Attention, Block, DropPath, PatchEmbed
from visiontok.training.frd import FeatureRecalibration

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "sit"
KEYS = Path(__file__).resolve().parents[1] / "golden" / "data" / "sit"
SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
    "p_emb": "naive",
}
STAGES = (1, 1, 1, 1)


def key_lists():
    folder = GOLDEN if GOLDEN.is_dir() else KEYS
    return sorted(folder.glob("keys_*.json.gz"))


def ghost(make, *args, **options):
    """A model on the meta device: shapes and counts without the time and memory of weights."""
    with torch.device("meta"):
        return make(*args, **options)


def official(model):
    """State of a patched model under the authors' names."""
    red = model._visiontok
    state = {name: t for name, t in model.state_dict().items() if "visiontok" not in name.split(".")}
    for stage, point in enumerate(red.plan.points):
        part = part_of(model.get_submodule(point.path), point.reducer, point.layer)
        state |= {point.reducer.official(stage) + name: t for name, t in part.state_dict().items()}
    return state


def small(seed=0, **options):
    torch.manual_seed(seed)
    return LVViT(**{**SMALL, **options}).eval()


@pytest.mark.parametrize("path", key_lists(), ids=lambda path: path.name.split(".")[0])
def test_keys_and_shapes_are_those_of_the_released_files(path):
    want = {name: tuple(shape) for name, shape in json.loads(gzip.decompress(path.read_bytes())).items()}
    model = ghost(sit_lvvit, path.name.split("_")[3], aux_head=True)
    frd = ghost(FeatureRecalibration.for_plan, model._visiontok.plan, model.embed_dim)
    found = {name: tuple(t.shape) for name, t in {**official(model), **frd.state_dict()}.items()}
    assert found == want


@pytest.mark.parametrize("name", list(models.VARIANTS))
def test_sizes_are_as_published(name):
    size = models.VARIANTS[name]
    model = ghost(sit_lvvit, name)
    red = model._visiontok
    n0 = (size.img_size // 16) ** 2
    kept = [n0, n0 // 2, n0 // 4, n0 // 8]
    counts = [n for n, blocks in zip(kept, size.stage_blocks) for _ in range(blocks)]
    assert [n - 1 for n in red.plan.tokens] == [*counts[1:], kept[-1]]
    assert getattr(models, f"sit_lvvit_{name}").args == (name,)
    assert getattr(models, f"lvvit_{name}").args == (name,)
    # The larger ones were counted once (1.5, 4.0, 8.1 and 34.4 GMACs); counting takes seconds.
    if name == "tiny":
        report = red.report()
        assert report.gmacs_after == pytest.approx(size.gmacs, rel=0.05)
        assert report.gmacs_before == pytest.approx(size.teacher_gmacs, rel=0.05)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(15.9e6, rel=0.03)


def test_block_equals_its_formula():
    torch.manual_seed(0)
    block = Block(6, 2, skip_lam=3.0).double().requires_grad_(False)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert block.attn.qkv.bias is None
    for b in range(2):
        y, heads = block.norm1(x[b]), []
        q, k, v = (block.attn.qkv.weight @ y.T).T.split(6, dim=1)
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            rows = [torch.stack([q[i, part] @ k[j, part] / 3**0.5 for j in range(5)]).softmax(0) for i in range(5)]
            heads.append(torch.stack([sum(row[j] * v[j, part] for j in range(5)) for row in rows]))
        z = x[b] + block.attn.proj(torch.cat(heads, dim=1)) / 3.0
        hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(z)))
        torch.testing.assert_close(block(x)[b], z + block.mlp.fc2(hidden) / 3.0)


@pytest.mark.parametrize(("p_emb", "strides"), [("4c", [2, 2, 2, 2]), ("6c", [2, 1, 1, 2, 2, 2])])
def test_stem_is_convolutions_with_gelu_between(p_emb, strides):
    torch.manual_seed(0)
    stem = PatchEmbed(32, 16, 3, 16, p_emb).eval()
    image = torch.randn(1, 3, 32, 32)
    x = image
    for i, stride in enumerate(strides, start=1):
        x = nn.functional.gelu(x) if i > 1 else x
        bn = getattr(stem, f"bn{i}")
        bn.running_mean.normal_()
        x = nn.functional.conv2d(x, getattr(stem, f"conv{i}").weight, stride=stride, padding=1)
        x = (x - bn.running_mean.view(1, -1, 1, 1)) / (1 + 1e-5) ** 0.5
    tokens = stem(image)
    assert stem.grid_size == (2, 2)
    torch.testing.assert_close(tokens, torch.stack([x[:, :, i, j] for i in (0, 1) for j in (0, 1)], dim=1))
    assert not any(name.endswith("conv1.bias") for name in stem.state_dict())


@pytest.mark.parametrize("patched", [False, True])
def test_attention_is_computed_in_single_precision_under_autocast(patched):
    model, seen = small(), []
    fused = nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return fused(q, k, v, **options)

    if patched:
        vt.patch(model, "tome", r=2)
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", spy), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 3, 32, 32)).dtype == torch.bfloat16
    assert seen == [(torch.float32, False)] * 4
    model.bfloat16()
    assert model(torch.randn(1, 3, 32, 32).bfloat16()).isfinite().all()


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = drop.train()(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x
    rates = [block.drop_path1.p for block in small(drop_path_rate=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_bad_sizes_are_named():
    for options, said in (
        ({"p_emb": "5c"}, "p_emb must be one of 4c, 6c, naive; got '5c'"),
        ({"img_size": 33}, "multiple of patch_size=8, got 33"),
        ({"p_emb": "4c"}, "needs patch_size=16"),
        ({"num_heads": 5}, "num_heads must divide the width 24, got 5"),
        ({"skip_lam": 0}, "skip_lam must be above 0"),
    ):
        with pytest.raises(ParameterError, match=said):
            small(**options)
    with pytest.raises(IncompatibleError, match="image is 16 x 32, but this model's positions are for 32 x 32"):
        small()(torch.zeros(1, 3, 16, 32))
    with pytest.raises(UnknownNameError, match="Did you mean 'small'"):
        lvvit("smal")


def sit_files(tmp_path, seed=1):
    """A trained-like SiT: its checkpoint as training scripts save it, and the model."""
    made = sit_lvvit("tiny", stage_blocks=STAGES, **SMALL, aux_head=True)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) / 5)
    frd = FeatureRecalibration.for_plan(made._visiontok.plan, made.embed_dim)
    state = {**official(made), **frd.state_dict()}
    path = tmp_path / "sit.pth"
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"step": 1}}, path)
    return made, state, path


def test_a_released_checkpoint_loads_with_its_modules(tmp_path):
    made, state, path = sit_files(tmp_path)
    image = torch.randn(2, 3, 32, 32)
    loaded = sit_lvvit("tiny", path, stage_blocks=STAGES, **SMALL)
    assert torch.equal(loaded(image), made(image))
    assert not hasattr(loaded, "aux_head")
    assert not loaded.training

    save_file({f"module.{name}": t.contiguous() for name, t in state.items()}, tmp_path / "model.safetensors")
    again = sit_lvvit("tiny", tmp_path, stage_blocks=STAGES, **SMALL)
    assert torch.equal(again(image), made(image))
    fetched = mock.Mock(return_value=str(path))
    with mock.patch.object(huggingface_hub, "hf_hub_download", fetched):
        sit_lvvit("tiny", "owner/name", filename="sit.pth", revision="v1", stage_blocks=STAGES, **SMALL)
    fetched.assert_called_once_with("owner/name", "sit.pth", revision="v1")


def test_a_teacher_loads_strictly_and_starts_a_student(tmp_path):
    torch.manual_seed(3)
    teacher = small(seed=3, aux_head=True)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(lvvit("tiny", tmp_path / "teacher.pth", **SMALL)(image), teacher(image))
    teacher.load_state_dict(read_checkpoint(tmp_path / "teacher.pth"), strict=True)
    student = sit_lvvit("tiny", teacher=tmp_path / "teacher.pth", stage_blocks=STAGES, **SMALL)
    assert torch.equal(vt.unpatch(student)(image), teacher(image))
    with pytest.raises(FormatError, match="missing: tsm.0.scale"):
        sit_lvvit("tiny", tmp_path / "teacher.pth", stage_blocks=STAGES, **SMALL)
    with pytest.raises(ParameterError, match="checkpoint or teacher, not both"):
        sit_lvvit("tiny", teacher.state_dict(), teacher=teacher.state_dict(), **SMALL)


def test_every_misfit_is_named(tmp_path):
    _, state, path = sit_files(tmp_path)
    with pytest.raises(FormatError, match=r"unexpected \(tsm.0.scale"):
        lvvit("tiny", path, **SMALL)
    wrong = {name: t for name, t in state.items() if name != "norm.bias"} | {"extra": torch.zeros(1)}
    wrong["head.weight"] = torch.zeros(7, 24)
    said = (
        r"1 missing \(norm.bias\); 1 unexpected \(extra\); 1 misshaped \(head.weight \(7, 24\) instead of \(5, 24\)\)"
    )
    with pytest.raises(FormatError, match=said):
        sit_lvvit("tiny", wrong, stage_blocks=STAGES, **SMALL)
    with pytest.raises(FormatError, match=r"tsm.0.weight.3.bias is \(8,\), needs \(4,\)"):
        sit_lvvit("tiny", state, stage_blocks=STAGES, keeping_ratio=0.25, **SMALL)
    with pytest.raises(FormatError, match="no tensors: epoch"):
        read_checkpoint({"epoch": 3})


def test_only_tensors_and_plain_data_are_read(tmp_path):
    for name, content, said in (
        ("evil.pth", pickle.dumps(_Evil(), protocol=2), "cannot be read|holds more than tensors"),
        ("list.pth", None, "found a list"),
        ("broken.safetensors", b"\x00" * 20, "broken.safetensors cannot be read"),
        ("broken.pth", b"no checkpoint", "broken.pth"),
    ):
        file = tmp_path / name
        torch.save([1, 2], file) if content is None else file.write_bytes(content)
        with pytest.raises(FormatError, match=said):
            read_checkpoint(file)
    torch.save({"model": _Evil()}, tmp_path / "evil2.pth")
    with pytest.raises(FormatError, match="evil2.pth.*holds more than tensors and plain data"):
        read_checkpoint(tmp_path / "evil2.pth")
    for source in (tmp_path / "none.pth", "owner/none.pth", "a/b/c"):
        with pytest.raises(ParameterError, match="does not exist; give a file, or a hub repository"):
            read_checkpoint(source)
    with pytest.raises(ParameterError, match="holds no model.safetensors"):
        read_checkpoint(tmp_path)


class _Evil:
    def __reduce__(self):
        raise_if_run = "raise SystemExit('code from a checkpoint ran')"
        return exec, (raise_if_run,)


def test_the_backbone_runs_only_its_own_blocks():
    class Odd(Attention):
        def forward(self, x, attn_mask=None):
            return super().forward(x, attn_mask) * 2

    model = small()
    assert vt.supports("tome", model)
    model.blocks[2].attn = Odd(24, 2)
    assert not vt.supports("tome", model)
    with pytest.raises(IncompatibleError, match=r"blocks.2.attn is a Odd, not LV-ViT's own Attention"):
        vt.patch(model, "tome", r=2)


def test_features_restore_and_timm_derives_the_transform():
    model = small()
    vt.patch(model, "tome", r=2, restore="gather")
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 17, 24)
    data = pytest.importorskip("timm.data")
    config = data.resolve_model_data_config(ghost(lvvit, "large"))
    assert config["input_size"] == (3, 288, 288)
    assert (config["crop_pct"], config["interpolation"], config["mean"][0]) == (1.0, "bicubic", 0.485)
