"""The free-slice oracle: exact where nothing is removed, the asked token counts elsewhere, parameters shared."""

from __future__ import annotations

import pytest
import torch

from visiontok.bench.oracle import oracle
from visiontok.errors import IncompatibleError, ParameterError

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer  # noqa: E402


def vit(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**sizes, **options}).eval()


def lengths(model: torch.nn.Module, where: str) -> list[int]:
    seen: list[int] = []
    hooks = [
        block.get_submodule(where).register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
        for block in model.get_submodule("blocks").children()
    ]
    model(torch.randn(2, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("options", [{}, {"block_fn": ResPostBlock}, {"init_values": 0.1, "qk_norm": True}])
@pytest.mark.parametrize("site", ["MID", "PRE"])
def test_full_schedule_changes_nothing(options: dict, site: str) -> None:
    model, images = vit(**options), torch.randn(2, 3, 16, 16)
    assert torch.equal(oracle(model, [17, 17, 17], site)(images), model(images))


def test_tokens_follow_the_schedule() -> None:
    model = vit()
    twin = oracle(model, [12, 9, 5])
    assert lengths(twin, "attn") == [17, 12, 9]
    assert lengths(twin, "mlp") == [12, 9, 5]
    assert lengths(oracle(model, [12, 9, 5], "PRE"), "mlp") == [17, 12, 9]
    assert lengths(model, "mlp") == [17, 17, 17]


def test_parameters_are_shared_and_the_model_left_alone() -> None:
    model = vit()
    twin = oracle(model, [12, 9, 5])
    assert [id(value) for value in twin.parameters()] == [id(value) for value in model.parameters()]
    assert {type(block).__name__ for block in model.get_submodule("blocks")} == {"Block"}


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="blocks.0 is .*ParallelScalingBlock; the oracle knows"):
        oracle(vit(block_fn=ParallelScalingBlock), [17] * 3)
    with pytest.raises(IncompatibleError, match="has no `blocks`"):
        oracle(torch.nn.Linear(1, 1), [1])
    with pytest.raises(ParameterError, match="2 token counts were given for 3 blocks"):
        oracle(vit(), [17, 17])
    with pytest.raises(ParameterError, match="not at 'KV'"):
        oracle(vit(), [17] * 3, "KV")
