"""R4: DDP and FSDP2 over gloo with two processes: gradients are those of the whole batch in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_child import CASES, reference, run
from reliability_support import assert_same

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def test_every_case(tmp_path: Path) -> None:
    # One test, because all cases share the same two processes, whose imports cost more than the cases.
    mp.spawn(run, args=(str(tmp_path),), nprocs=2, join=True)
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for case in CASES:
        check(case, [result[case] for result in results])


def check(case: str, both: list[dict[str, Any]]) -> None:
    for rank, outcome in enumerate(both):
        assert "error" not in outcome, f"{case}, rank {rank}: {outcome['error']}"
    grads, logits = reference()
    for outcome in both:
        if "grads" in outcome:
            assert_same(outcome["grads"], grads, atol=1e-6)
            assert outcome["tokens"] == [14, 11, 8, 5]
        if "logits" in outcome:
            torch.testing.assert_close(outcome["logits"], logits, rtol=0, atol=1e-6)
    if case == "unpatch_after_wrap":
        # FSDP's class sits on top of ours; taking ours away would take FSDP's with it.
        assert all("unwrap it first" in outcome["message"] and outcome["same"] for outcome in both)
    if case == "unpatch_patch_last":
        assert all(outcome["same"] and outcome["exact"] for outcome in both)
    if case == "refuses_ddp":
        assert all("patch before wrapping" in outcome["message"] for outcome in both)
