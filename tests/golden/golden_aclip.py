"""Runs A-CLIP's golden files: attentive masks and the mapping of attention between crops."""

from __future__ import annotations

import torch
from golden_case import Case

from visiontok.training.masking import attentive_mask, crop_attention

GRID = (14, 14)


def run_op(case: Case) -> None:
    """op_attmask_* or op_crop_map."""
    attention = case.need("attention")
    if "ratio" not in case.params:
        case.check("attention", crop_attention(attention, GRID, case.need("crop_ema"), case.need("crop_online")))
        return
    mask = attentive_mask(attention, GRID, case.params["ratio"])
    case.check("mask", mask.to(torch.uint8))
    case.check("kept_per_image", (~mask).sum(dim=1))
    # One row alone must not depend on its batch mates; the official code cannot do it.
    assert torch.equal(torch.cat([attentive_mask(row[None], GRID, case.params["ratio"]) for row in attention]), mask)


def run_model(case: Case) -> None:
    """A-CLIP has no model-level files."""
    raise AssertionError(f"{case.id}: unknown level {case.level}")
