"""Runs CLCA's op_dpcknn_* golden files; no runner of its own, the method's runner calls it."""

from __future__ import annotations

from typing import Any

import torch
from golden_case import Case
from torch import Tensor, nn

import visiontok as vt
from visiontok.ops import density


class _Given(nn.Module):
    """Token weights from the file in place of learned ones."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.squeeze(-1).to(x.dtype)


def run_dpcknn(case: Case) -> None:
    """Clusters, centres, merged tokens and the share of each token in its cluster, through op and reducer."""
    params, x = case.params, case.need("x")
    count, weight = params["cluster_num"], case.given("token_weight")
    found = density.peaks(x, count, params["k"])
    case.check("centers", found.centers)
    case.check("idx_cluster", found.assign)
    reducer = vt.reducers.create("dpc_knn", k_neighbors=params["k"], compat="official", equal_weight=weight is None)
    state = vt.TokenState.initial(x, prefix=0)
    signals: dict[str, Any] = {"HIDDEN": x}
    if weight is not None:
        signals["MODULE"] = _Given(weight)
    tm = reducer.decide(vt.Signals.of(**signals), state, budget=x.shape[1] - count)
    if tm is None:
        # All kept: nothing to remove, which the golden still writes as clusters of one.
        assert count == x.shape[1]
        ones = x.new_ones(x.shape[:2])
        share = ones / (ones + 1e-6)
        tm = vt.TokenMap(found.assign, count, weight=share, mode="sum", anchor=found.centers)
    assert torch.equal(tm.assign, found.assign)
    assert torch.equal(tm.kept, found.centers)
    case.check("merged", vt.apply(tm, x, state)[0])
    assert tm.weight is not None
    case.check("agg_weight", tm.weight.unsqueeze(-1))
