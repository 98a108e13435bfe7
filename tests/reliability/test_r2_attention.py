"""R2: fused and manual attention agree; without proportional attention there is no mask at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reliability_support import every_reducer, images, patch_or_skip, tiny
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import visiontok as vt


def _with_fused(fused: bool, **options: Any) -> Any:
    model = tiny(**options)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


@every_reducer
@pytest.mark.parametrize(
    "options",
    [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}, {"qk_norm": True}],
    ids=["cls", "avg", "registers", "qk_norm"],
)
def test_fused_and_manual_attention_agree(name: str, options: dict[str, Any]) -> None:
    outs, sizes = [], []
    for fused in (True, False):
        model = _with_fused(fused, **options).double()
        red = patch_or_skip(model, name, trace=True)
        with torch.no_grad():
            outs.append(model(images(dtype=torch.float64)))
        sizes.append([None if step.size is None else step.size for step in red.trace])
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-12)
    assert len(sizes[0]) == len(sizes[1])
    for left, right in zip(*sizes):
        # Exact where sizes count tokens; some methods scale them by a similarity.
        assert (left is None and right is None) or torch.allclose(left, right, rtol=1e-12, atol=0)


def _masks(monkeypatch: pytest.MonkeyPatch, **params: Any) -> list[Tensor | None]:
    seen: list[Tensor | None] = []
    real = F.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        seen.append(attn_mask)
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = tiny()
    with vt.patched(model, "tome", r=3, **params), torch.no_grad():
        model(images())
    return seen


def test_without_proportional_attention_no_mask_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _masks(monkeypatch, prop_attn=False) == [None] * 4


def test_proportional_attention_passes_one_row_of_log_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *later = _masks(monkeypatch)
    assert first is None
    # One row that broadcasts: an expanded (B, H, N, N) mask costs 42 % on a CPU.
    assert [tuple(mask.shape) for mask in later] == [(3, 1, 1, 14), (3, 1, 1, 11), (3, 1, 1, 8)]
    assert all(torch.equal(mask.exp().round().sum(-1), torch.full((3, 1, 1), 17.0)) for mask in later)


def test_the_maskless_path_runs_on_the_flash_kernel_alone() -> None:
    model = tiny()
    with vt.patched(model, "tome", r=3, prop_attn=False) as red, torch.no_grad():
        free = model(images())
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            flash = model(images())
    assert red.plan.tokens == [14, 11, 8, 5]
    torch.testing.assert_close(flash, free, rtol=0, atol=1e-6)


def test_proportional_attention_changes_the_result() -> None:
    outs = []
    for proportional in (True, False):
        model = tiny()
        with vt.patched(model, "tome", r=3, prop_attn=proportional), torch.no_grad():
            outs.append(model(images()))
    assert (outs[0] - outs[1]).abs().max() > 1e-4
