"""The training loop: against a loop written by hand, killed and resumed, with teachers, and its errors."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visiontok as vt
from visiontok.bench.data import ArrayDataset, Failure
from visiontok.core.recipe import TRAIN_KEYS, parse_recipe
from visiontok.errors import FormatError, ParameterError, UnknownNameError, VisionTokError
from visiontok.training import checkpoint
from visiontok.training.config import TrainConfig
from visiontok.training.data import TrainData
from visiontok.training.loop import TrainingError, fit
from visiontok.training.setup import make_optimizer, make_schedule, unpatched

pytest.importorskip("timm")

SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "threads": 1}


def vit(depth: int = 3) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=16, patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=5
        ).eval()


def pictures(count: int = 16, seed: int = 0) -> ArrayDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    images = torch.randn(count, 3, 16, 16, generator=generator)
    columns = torch.arange(16) // 3
    return ArrayDataset(images + 4 * (columns == labels.view(-1, 1, 1, 1)), labels)


def run(**options: Any) -> Any:
    keywords = {key: options.pop(key) for key in ("model", "data", "resume", "on_update") if key in options}
    keywords = {"model": vit(), "data": (pictures(), pictures(8, seed=1)), **keywords}
    return fit(TrainConfig(**{**SHORT, **options}), **keywords)


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# ---- what it computes


def test_it_is_the_loop_one_would_write() -> None:
    options = {"opt": "momentum", "lr": 0.05, "weight_decay": 0.0, "momentum": 0.0, "min_lr": 0.01, "smoothing": 0.0}
    got = run(**options).model
    want, data = vit().train(), pictures()
    order = TrainData(data, 4, seed=42)
    total = 2 * 4
    for epoch in range(2):
        for index, batch in enumerate(order.epoch(epoch)):
            step = epoch * 4 + index
            lr = 0.01 + 0.5 * (0.05 - 0.01) * (1 + math.cos(math.pi * step / total))
            F.cross_entropy(want(batch.images), batch.targets).backward()
            with torch.no_grad():
                for parameter in want.parameters():
                    parameter -= lr * parameter.grad
                    parameter.grad = None
    for name, value in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], value, atol=1e-5, rtol=1e-5)
    assert not got.training


def test_accumulated_batches_are_one_batch() -> None:
    options = {"opt": "momentum", "momentum": 0.0}
    whole, parts = run(batch_size=8, **options), run(batch_size=4, grad_accum_steps=2, **options)
    assert whole.metrics["loss"] == pytest.approx(parts.metrics["loss"], abs=1e-5)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, atol=1e-6, rtol=1e-4)


def test_gradients_are_clipped() -> None:
    before = {name: value.clone() for name, value in vit().named_parameters()}
    model = run(
        opt="momentum", momentum=0.0, lr=1.0, sched="none", clip_grad=1e-3, epochs=1, batch_size=16, weight_decay=0.0
    ).model
    with torch.no_grad():
        moved = torch.stack([(value - before[name]).norm() for name, value in model.named_parameters()]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-2)


def test_it_learns_through_a_reduction() -> None:
    result = run(reducer="tome", params={"r": 3}, epochs=8, lr=2e-2, data=(pictures(), None))
    losses = [record["loss"] for record in result.records if record["kind"] == "epoch"]
    assert losses[-1] < 0.6 * losses[0]
    assert result.reduction.tokens[-1] == 17 - 9


def test_ema_follows() -> None:
    result = run(model_ema=True, model_ema_decay=0.5, reducer="tome", params={"r": 2})
    assert not same(result.ema, result.model)
    assert {"top1", "top1_ema"} <= set(result.metrics)
    frozen = unpatched(result.ema)
    assert frozen.blocks[0].mlp.fc1.weight is result.ema.blocks[0].mlp.fc1.weight


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    run(epochs=1, drop_path=0.2, mixup=0.5)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": 0.8, "cutmix": 1.0},
        {"amp": True},
        {"amp": True, "amp_dtype": "float16"},
        {"drop_path": 0.3, "reducer": "pitome", "params": {"keep": 0.9}},
        {"shuffle": 1.0, "reducer": "tome", "params": {"r": 3}},
        {"attentive_mask": 0.5, "model_ema": True, "reducer": "tome", "params": {"r": 1}},
        {"sched": "step", "opt": "lamb", "warmup_epochs": 1},
    ],
    ids=str,
)
def test_options_run_and_repeat(options: dict[str, Any]) -> None:
    options = {"data": (pictures(8), None), **options}
    first = run(**options)
    assert math.isfinite(first.metrics["loss"])
    assert same(first.model, run(**options).model)
    assert not same(first.model, run(seed=1, **options).model)


# ---- teachers


def test_teacher_is_the_unreduced_model() -> None:
    seen: list[float] = []
    result = run(distill="logits", opt="momentum", lr=1e-9, sched="none", epochs=1, log_every=1)
    seen = [record["loss_logits"] for record in result.records if record["kind"] == "train"]
    assert max(map(abs, seen)) < 1e-7
    reduced = run(distill="logits", reducer="tome", params={"r": 5}, lr=1e-9, epochs=1)
    assert reduced.metrics["loss_logits"] > 1e-6
    assert reduced.metrics["loss"] == pytest.approx(reduced.metrics["loss_cls"] + reduced.metrics["loss_logits"])


def test_feature_recalibration(tmp_path: Path) -> None:
    pytest.importorskip("visiontok.reducers.sit")
    model = vit()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    result = run(
        model=model, reducer="sit", params={"keep": {1: 0.5}}, distill="frd", epochs=3, output=str(tmp_path / "out")
    )
    epochs = [record for record in result.records if record["kind"] == "epoch"]
    assert {"loss_token", "loss_logits", "loss_cls"} <= set(epochs[0])
    assert epochs[-1]["loss_token"] < epochs[0]["loss_token"]
    learned = {name for name in result.model.state_dict() if name not in start}
    assert learned
    assert all("visiontok" in name.split(".") for name in learned)
    assert not any("rtsm" in name for name in result.model.state_dict())
    stored = checkpoint.load(tmp_path / "out" / checkpoint.CHECKPOINT)
    assert any(name.startswith("rtsm.") for name in stored["extra"])
    assert result.reduction.tokens == [9, 9, 9]


def test_recalibration_resumes_too(tmp_path: Path) -> None:
    pytest.importorskip("visiontok.reducers.sit")
    options = {"reducer": "sit", "params": {"keep": {1: 0.5}}, "distill": "frd"}
    whole = run(**options)
    with pytest.raises(Stop):
        run(**options, output=str(tmp_path), on_update=stop_at(5))
    assert same(run(**options, output=str(tmp_path), resume=True).model, whole.model)


def test_recalibration_modules_learn_faster() -> None:
    model, extra = vit(), nn.Linear(4, 4)
    config = TrainConfig(distill="none", lr=1e-3, rtsm_lr_scale=5.0, epochs=2)
    for name in ("cosine", "none"):
        optimizer = make_optimizer(config, model, extra)
        make_schedule(TrainConfig(lr=1e-3, sched=name, epochs=2), optimizer, 4)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[id(extra.weight)] == pytest.approx(5e-3)
        assert rates[id(model.head.weight)] == pytest.approx(1e-3)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert (decays[id(model.head.bias)], decays[id(model.head.weight)]) == (0.0, 0.05)
        assert decays[id(model.pos_embed)] == 0.0


# ---- killed and resumed


class Stop(Exception):
    pass


def stop_at(update: int) -> Callable[[int], None]:
    def stop(done: int) -> None:
        if done == update:
            raise Stop

    return stop


RANDOM = {"reducer": "tome", "params": {"r": 2}, "drop_path": 0.2, "mixup": 0.8, "model_ema": True, "shuffle": 0.5}
RANDOM |= {"log_every": 1, "checkpoint_every": 2, "epochs": 2, "warmup_epochs": 1}


def killed(output: str) -> None:
    run(**RANDOM, output=output, on_update=lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == 7 else None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = run(**RANDOM, output=str(tmp_path / "whole"))
    out = tmp_path / "killed"
    child = multiprocessing.get_context("fork").Process(target=killed, args=(str(out),))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert checkpoint.load(out / checkpoint.CHECKPOINT)["updates"] == 6
    with open(out / checkpoint.LOG, "a") as log:
        log.write('{"kind": "tr')
    again = run(**RANDOM, output=str(out), resume=True)
    assert same(again.model, whole.model)
    assert same(again.ema, whole.ema)
    assert again.metrics == whole.metrics
    logs = [[json.loads(line) for line in (tmp_path / name / checkpoint.LOG).read_text().splitlines()]
            for name in ("whole", "killed")]  # fmt: skip
    for log in logs:
        assert [record["updates"] for record in log if record["kind"] == "train"] == list(range(1, 9))
        for record in log:
            record.pop("seconds", None), record.pop("images_per_s", None), record.pop("config", None)
    assert logs[0] == logs[1]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt", "log.jsonl", "model.safetensors", "model_ema.safetensors", "reduction", "reduction_ema",
    ]  # fmt: skip


def test_it_may_be_stopped_anywhere(tmp_path: Path) -> None:
    options = {**RANDOM, "data": (pictures(8), None)}
    whole = run(**options)
    for update in (2, 3):
        out = str(tmp_path / str(update))
        with pytest.raises(Stop):
            run(**options, output=out, on_update=stop_at(update))
        assert same(run(**options, output=out, resume=True).model, whole.model)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    first = run(output=str(tmp_path))
    again = run(output=str(tmp_path), resume=True, on_update=stop_at(1))
    assert same(first.model, again.model)
    assert again.metrics["top1"] == first.metrics["top1"]


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    run(output=str(tmp_path))
    with pytest.raises(ParameterError, match="holds a run already"):
        run(output=str(tmp_path))
    with pytest.raises(ParameterError, match=r"lr=0.002 \(was 0.001\), seed=7 \(was 42\)"):
        run(output=str(tmp_path), resume=True, lr=2e-3, seed=7)
    with pytest.raises(ParameterError, match="give --output"):
        run(resume=True)
    with pytest.raises(FormatError, match="does not exist"):
        run(output=str(tmp_path / "new"), resume=tmp_path / "gone.pt")


def test_checkpoints_are_tensors_only(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "owned"),))

    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(FormatError, match="cannot be read"):
        checkpoint.load(path)
    torch.save(Evil(), path, pickle_protocol=2)
    with pytest.raises(FormatError, match="cannot be read"):
        checkpoint.load(path)
    assert not (tmp_path / "owned").exists()
    torch.save({"model": {}}, path)
    with pytest.raises(FormatError, match="not a checkpoint"):
        checkpoint.load(path)
    run(output=str(tmp_path / "out"))
    good = (tmp_path / "out" / checkpoint.CHECKPOINT).read_bytes()
    for size in (0, 100, len(good) // 2, len(good) - 10):
        path.write_bytes(good[:size])
        with pytest.raises(FormatError, match="cannot be read"):
            checkpoint.load(path)


def test_a_failed_write_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(TrainingError, match="No space left"):
                checkpoint.save(path, {"updates": 1})
        assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
        assert path.read_bytes() == b"old"


def test_learned_parts_come_back_from_the_weights(tmp_path: Path) -> None:
    pytest.importorskip("visiontok.reducers.sit")
    from visiontok.bench import models

    trained = run(reducer="sit", params={"keep": {1: 0.5}}, output=str(tmp_path))
    model = vit()
    models.load_checkpoint(model, tmp_path / "model.safetensors")
    reduction = vt.patch(model, "sit", keep={1: 0.5})
    assert models.load_learned(reduction, tmp_path / "model.safetensors")
    assert same(model, trained.model)
    plain = vit()
    loaded = vt.from_pretrained(plain, tmp_path / "reduction")
    assert {n: v.sum() for n, v in loaded.model.state_dict().items() if "visiontok" in n} == {
        n: v.sum() for n, v in trained.model.state_dict().items() if "visiontok" in n
    }


# ---- what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    broken = pictures()
    broken.images[5] = math.nan
    with pytest.raises(TrainingError, match=r"the loss is not finite at epoch 0, update \d \(lr 0.001; loss nan"):
        run(data=(broken, None), output=str(tmp_path))
    assert issubclass(TrainingError, VisionTokError)


class Holes(ArrayDataset):
    """Every eighth image cannot be read."""

    def __getitem__(self, index: int) -> Any:
        return Failure(f"{index}.png", "empty file") if index % 8 == 0 else super().__getitem__(index)


def test_unreadable_images(tmp_path: Path) -> None:
    data = pictures()
    data.__class__ = Holes
    with pytest.raises(TrainingError, match=r"[12] unreadable image\(s\), max_failed is 0; the last is \d+.png: empty"):
        run(data=(data, None))
    result = run(data=(data, None), max_failed=2, mixup=0.5, output=str(tmp_path))
    assert result.metrics["loss"] > 0
    assert [record["failed"] for record in result.records if record["kind"] == "epoch"] == [2, 2]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 0}, "lr must be a number above 0, got 0"),
        ({"lr": math.nan}, "lr must be a number above 0, got nan"),
        ({"epochs": True}, "epochs must be a number above 0, got True"),
        ({"mixup": -1}, "mixup must be a number at least 0"),
        ({"shuffle": 1.5}, r"shuffle must be in \[0, 1\], got 1.5"),
        ({"drop_path": 1}, "must be below 1"),
        ({"clip_grad": 0}, "clip_grad must be above 0 or None"),
        ({"distill": "cnn"}, "distill must be one of none, logits, frd"),
        ({"amp_dtype": "int8"}, "amp_dtype must be one of"),
        ({"warmup_epochs": 10}, "warmup_epochs=10 must be below epochs=10"),
        ({"distill": "frd"}, "give a reducer"),
        ({"attentive_mask": 0.5}, "switch on model_ema"),
        ({"attentive_mask": 0.5, "model_ema": True, "distill": "frd", "reducer": "sit"}, "cannot be used together"),
        ({"mixup": 1, "batch_size": 3}, "even batch_size"),
        ({"params": {"r": 1}}, "belong to a reducer"),
    ],
)
def test_config_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ParameterError, match=text):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"opt": "adamm"}, "timm cannot build the optimizer 'adamm'"),
        ({"sched": "cosinus"}, "timm cannot build the schedule 'cosinus'"),
        ({"batch_size": 17}, "16 training image.* less than one batch of 17"),
        ({"grad_accum_steps": 5}, "less than one update of 20"),
        ({"device": "warp"}, "device 'warp'"),
        ({"teacher": "gone.pth", "distill": "logits"}, "checkpoint 'gone.pth' does not exist"),
    ],
)
def test_run_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ParameterError, match=text):
        run(**options)


def test_configs_are_strict() -> None:
    with pytest.raises(UnknownNameError, match="no setting 'epoch'. Did you mean 'epochs'"):
        TrainConfig.from_dict({"epoch": 3})
    config = TrainConfig(reducer="tome", params={"r": {3: 4}}, input_size=(3, 32, 32))
    assert config.differences(json.loads(json.dumps(config.to_dict()))) == []
    assert TrainConfig(device="cuda", output="x", workers=3).differences(TrainConfig().to_dict()) == []


# ---- recipes

RECIPE = """
schema: 1
method: tome
schedule: {r: 3}
model: tiny_vit
dataset: digits
expected: {source: here}
train: {epochs: 3, lr: 1.0e-4, amp: true, distill: logits}
"""


def test_a_recipe_trains() -> None:
    config = TrainConfig.from_recipe(parse_recipe(RECIPE), lr=0.5)
    assert (config.epochs, config.lr, config.amp, config.distill) == (3, 0.5, True, "logits")
    assert (config.model, config.reducer, config.params) == ("tiny_vit", "tome", {"r": 3})
    with pytest.raises(ParameterError, match="no 'train' section"):
        TrainConfig.from_recipe(parse_recipe(RECIPE.replace("train:", "# train:")))


def test_every_recipe_key_is_a_setting() -> None:
    assert set(TRAIN_KEYS) <= set(TrainConfig().to_dict())
    assert not set(TRAIN_KEYS) & {"output", "device", "data", "checkpoint", "workers", "seed"}


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("epochs: 3", "epoch: 3", "train has no key 'epoch'. Did you mean 'epochs'"),
        ("epochs: 3", "epochs: 3.5", "epochs must be int, got 3.5"),
        ("epochs: 3", "epochs: true", "epochs must be int, got True"),
        ("amp: true", "amp: 1", "amp must be bool, got 1"),
        ("amp: true", "amp: 'true'", "amp must be bool, got 'true'"),
        ("lr: 1.0e-4", "lr: 1e-4", "lr must be int or float, got '1e-4'"),
        ("lr: 1.0e-4", "lr: .inf", "train.lr holds inf"),
        ("lr: 1.0e-4", "output: /etc", "train has no key 'output'"),
        ("distill: logits", "distill: [logits]", "distill must be str"),
        ("train: {", "train: [{", "not valid YAML"),
        ("train: {epochs: 3, lr: 1.0e-4, amp: true, distill: logits}", "train: 3", "train must be dict, got 3"),
    ],
)
def test_broken_train_sections_are_explained(old: str, new: str, text: str) -> None:
    with pytest.raises(VisionTokError, match=text):
        parse_recipe(RECIPE.replace(old, new))


# ---- data


def test_batches_hang_on_seed_and_epoch_only() -> None:
    from torch.utils.data import Dataset

    class Wrapped(Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.rand(2) + float(np.random.rand()) + random.random(), index

    def epoch(number: int, start: int = 0, workers: int = 0, seed: int = 1) -> list[Tensor]:
        return [batch.images for batch in TrainData(Wrapped(), 3, seed, workers=workers).epoch(number, start)]

    whole = torch.stack(epoch(2))
    assert whole.shape == (5, 3, 2)
    assert torch.equal(torch.stack(epoch(2, start=2)), whole[2:])
    assert torch.equal(torch.stack(epoch(2, workers=2)), whole)
    assert not torch.equal(torch.stack(epoch(3)), whole)
    assert not torch.equal(torch.stack(epoch(2, seed=2)), whole)
