"""What each of the two processes of test_r4_distributed runs: every case, imports paid once."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reliability_support import gradients, images, tiny
from torch import Tensor, nn

import visiontok as vt

BATCH = 4
# Every case that is written to the result; the test is parametrised over the same list.
CASES = [
    *(f"ddp{suffix}" for suffix in ("", "_checkpoint")),
    *(f"fsdp_{order}{suffix}" for order in ("patch_first", "patch_last") for suffix in ("", "_checkpoint")),
    "unpatch_after_wrap",
    "unpatch_patch_last",
    "refuses_ddp",
]


def loss(logits: Tensor, rank: int | None = None) -> Tensor:
    """Mean cross-entropy of the whole batch or of one rank's share."""
    target = torch.arange(BATCH) if rank is None else torch.arange(BATCH)[rank::2]
    return nn.functional.cross_entropy(logits, target)


def reference() -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and logits of one process over the whole batch."""
    model = tiny()
    vt.patch(model, "tome", r=3)
    logits = model(images(BATCH))
    loss(logits).backward()
    return gradients(model), logits.detach()


def _shard(model: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _full(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in named.items()}


def _ddp(rank: int, checkpoint: bool) -> dict[str, Any]:
    model = tiny().train()
    vt.patch(model, "tome", r=3)
    model.set_grad_checkpointing(checkpoint)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        wrapped.zero_grad()
        loss(wrapped(images(BATCH)[rank::2]), rank).backward()
    red = vars(model)["_visiontok"]
    return {"grads": gradients(model), "tokens": red.tokens}


def _fsdp(rank: int, patch_first: bool, checkpoint: bool) -> dict[str, Any]:
    model = tiny().train()
    if patch_first:
        vt.patch(model, "tome", r=3)
    _shard(model)
    if not patch_first:
        vt.patch(model, "tome", r=3)
    model.set_grad_checkpointing(checkpoint)
    for _ in range(2):
        model.zero_grad()
        loss(model(images(BATCH)[rank::2]), rank).backward()
    red = vars(model)["_visiontok"]
    return {
        "grads": _full(gradients(model)),
        "tokens": red.tokens,
    }


def _unpatch_after_wrap(rank: int) -> dict[str, Any]:
    model = tiny()
    red = vt.patch(model, "tome", r=3)
    _shard(model)
    before = [type(m) for m in model.modules()]
    try:
        red.unpatch()
    except vt.errors.NotPatchedError as error:
        message = str(error)
    same = before == [type(m) for m in model.modules()]
    with torch.no_grad():
        return {"message": message, "same": same, "logits": model(images(BATCH))}


def _unpatch_patch_last(rank: int) -> dict[str, Any]:
    model = tiny()
    _shard(model)
    before = [type(m) for m in model.modules()]
    with torch.no_grad():
        dense = model(images(BATCH))
        red = vt.patch(model, "tome", r=3)
        logits = model(images(BATCH))
        red.unpatch()
        same = before == [type(m) for m in model.modules()]
        return {"same": same, "exact": torch.equal(model(images(BATCH)), dense), "logits": logits}


def _refuses_ddp(rank: int) -> dict[str, Any]:
    try:
        vt.patch(nn.parallel.DistributedDataParallel(tiny()), "tome", r=3)
    except vt.errors.IncompatibleError as error:
        return {"message": str(error)}
    return {"message": "patched"}


def _work(case: str) -> Callable[[int], dict[str, Any]]:
    checkpoint = case.endswith("_checkpoint")
    if case.startswith("ddp"):
        return lambda rank: _ddp(rank, checkpoint)
    if case.startswith("fsdp"):
        return lambda rank: _fsdp(rank, "patch_first" in case, checkpoint)
    return {
        "unpatch_after_wrap": _unpatch_after_wrap,
        "unpatch_patch_last": _unpatch_patch_last,
        "refuses_ddp": _refuses_ddp,
    }[case]


def run(rank: int, folder: str) -> None:
    """Runs all cases and writes `rank<r>.pt`; a case that raises is recorded and the rest go on."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=90)
    )
    results: dict[str, Any] = {}
    for case in CASES:
        try:
            results[case] = _work(case)(rank)
        except Exception:
            results[case] = {"error": traceback.format_exc()}
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
