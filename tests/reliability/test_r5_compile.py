"""R5: torch.compile without graph breaks for every reducer with static counts; few graphs, changes take effect."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reliability_support import every_reducer_at_length, images, patched_tiny, tiny
from torch import Tensor, fx

import visiontok as vt


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A compiler backend that runs eagerly and counts the graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@every_reducer_at_length
def test_fullgraph_for_any_batch_in_two_graphs(name: str) -> None:
    model, _ = patched_tiny(name, depth=2)
    count = Counting()
    fast = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        for batch in (2, 3, 4, 7):
            torch.testing.assert_close(fast(images(batch)), model(images(batch)), rtol=0, atol=1e-6)
    assert count.graphs <= 2


@pytest.mark.parametrize("name", ["tome", "pitome"])
def test_no_graph_breaks(name: str) -> None:
    model, _ = patched_tiny(name, depth=1)
    found = torch._dynamo.explain(model)(images())
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


@pytest.mark.parametrize(
    "options",
    [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2, "global_pool": "map"}, {"dynamic_img_size": True}],
    ids=["avg", "map", "dynamic"],
)
def test_variants_compile_whole(options: dict[str, Any]) -> None:
    model, _ = patched_tiny("tome", depth=2, **options)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(images()), model(images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["tome"])
def test_training_step_compiles_whole(name: str) -> None:
    plain, _ = patched_tiny(name, depth=2)
    plain(images()).square().sum().backward()
    model, _ = patched_tiny(name, depth=2)
    torch.compile(model, fullgraph=True, backend="aot_eager")(images()).square().sum().backward()
    for (key, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=key)


def test_autocast_inside_a_compiled_forward() -> None:
    model, _ = patched_tiny(depth=2)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    with torch.no_grad():
        fast = torch.compile(run, fullgraph=True, backend="eager")(images())
        torch.testing.assert_close(fast, run(images()), rtol=0, atol=1e-2)


@pytest.mark.full
def test_inductor() -> None:
    model, _ = patched_tiny(depth=2, embed_dim=12)
    with torch.no_grad():
        want = model(images())
        try:
            out = torch.compile(model, fullgraph=True)(images())
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if "compiler" not in str(error).lower():
                raise
            pytest.skip(f"inductor has no C++ compiler here: {error}"[:300])
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_set_recompiles_once_and_takes_effect() -> None:
    model, red = patched_tiny(depth=2)
    count = Counting()
    fast = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        before_set = fast(images())
        before = count.graphs
        for _ in range(2):
            fast(images())
        assert count.graphs == before == 1
        red.set(r=5)
        for _ in range(3):
            out = fast(images())
        assert count.graphs == before + 1
        with vt.patched(tiny(depth=2), "tome", r=5) as other:
            torch.testing.assert_close(out, other.model(images()), rtol=0, atol=1e-6)
        assert (out - before_set).abs().max() > 1e-3
        assert red.plan.tokens == [12, 7]


def test_patch_and_unpatch_after_compile_take_effect() -> None:
    model = tiny(depth=2)
    fast = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = fast(images())
        red = vt.patch(model, "tome", r=3)
        want = model(images())
        torch.testing.assert_close(fast(images()), want, rtol=0, atol=1e-6)
        red.unpatch()
        torch.testing.assert_close(fast(images()), dense, rtol=0, atol=1e-6)
    assert (want - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["tome", "random"])
def test_regional_compile_of_the_blocks(name: str) -> None:
    model, red = patched_tiny(name, depth=2)
    with torch.no_grad():
        want = model(images())
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(images()), want, rtol=0, atol=1e-6)
    assert red.plan.tokens == [14, 11]


def test_a_compiled_model_cannot_be_patched() -> None:
    with pytest.raises(vt.errors.IncompatibleError, match=r"patch the model that you compiled"):
        vt.patch(torch.compile(tiny(depth=2)), "tome", r=3)


def test_compiling_warns_of_nothing() -> None:
    model, _ = patched_tiny(depth=2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(model, fullgraph=True, backend="eager")(images())
