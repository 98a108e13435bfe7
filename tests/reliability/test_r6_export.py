"""R6: torch.export with a dynamic batch, save and load, ONNX, jit.trace."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from reliability_support import every_reducer_at_length, every_reducer_slowly, fitting, images, patched_tiny

DYNAMIC = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}


def _export(model: Any, strict: bool) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (images(2),), dynamic_shapes=DYNAMIC, strict=strict)


# Strict export traces by the same Dynamo that test_r5 runs for every reducer.
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.full)])
@every_reducer_at_length
def test_export_with_a_dynamic_batch(name: str, strict: bool) -> None:
    model, _ = patched_tiny(name, depth=4)
    program = _export(model, strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        for batch in (1, 2, 5):
            torch.testing.assert_close(loaded(images(batch)), model(images(batch)), rtol=0, atol=1e-6)


def test_an_exported_program_holds_the_models_own_parameter_names() -> None:
    model, _ = patched_tiny(depth=2)
    keys = set(_export(model, False).state_dict)
    assert keys == set(model.state_dict())


@pytest.mark.parametrize("name", [n if n == "tome" else pytest.param(n, marks=pytest.mark.full) for n in fitting()])
def test_onnx_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the ONNX exporter needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, _ = patched_tiny(name, depth=2)
    path = str(tmp_path / "model.onnx")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images(2),), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        (ours,) = session.run(None, {session.get_inputs()[0].name: images(batch).numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(ours), model(images(batch)), rtol=0, atol=5e-5)


@every_reducer_slowly
def test_jit_trace(name: str, tmp_path: Path) -> None:
    model, _ = patched_tiny(name, depth=2)
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of every shape that it turns into a constant.
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, images(2)), tmp_path / "model.pt")
        traced = torch.jit.load(tmp_path / "model.pt")
        for batch in (2, 4):
            torch.testing.assert_close(traced(images(batch)), model(images(batch)), rtol=0, atol=1e-6)


def test_jit_script_is_refused_loudly() -> None:
    model, _ = patched_tiny(depth=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError)):
            torch.jit.script(model)


def test_stable_order_in_onnx_breaks_ties_like_ours(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the ONNX exporter needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from visiontok.ops.ordering import stable_order

    class Order(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return stable_order(x), stable_order(x, descending=True)

    x = torch.randint(0, 4, (3, 40), generator=torch.Generator().manual_seed(0)).float()
    path = str(tmp_path / "order.onnx")
    torch.onnx.export(Order().eval(), (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    up, down = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.equal(torch.from_numpy(up), x.argsort(dim=-1, stable=True))
    assert torch.equal(torch.from_numpy(down), x.argsort(dim=-1, descending=True, stable=True))
