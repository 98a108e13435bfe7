"""Random problems for the property tests: small, deterministic, with the odd cases well represented."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative errors of one rounding in the output dtype, and of the fp32 or fp64 arithmetic before it.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def examples(count: int) -> settings:
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@dataclass(frozen=True)
class Problem:
    """Tokens and a random assignment of them."""

    x: Tensor
    assign: Tensor
    slots: int
    weight: Tensor
    complete: bool

    @property
    def samples(self) -> list[tuple[np.ndarray, list[int], list[float]]]:
        return list(zip(plain(self.x), self.assign.tolist(), self.weight.double().tolist()))


def plain(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Problem:
    batch, length, channels = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 5))
    slots = draw(st.integers(1, length))
    complete = draw(st.booleans())
    cells = st.integers(0 if complete else -1, slots - 1)
    assign = draw(st.lists(cells, min_size=batch * length, max_size=batch * length))
    weight = draw(
        st.lists(st.sampled_from([1.0, 2.0, 0.5, 7.0, 0.0]), min_size=batch * length, max_size=batch * length)
    )
    x = normal(draw(st.integers(0, 999)), batch, length, channels)
    # Repeated and zero tokens, and large ones.
    x = x * draw(st.sampled_from([1.0, 0.0, 100.0]))
    if draw(st.booleans()):
        x[:, -1] = x[:, 0]
    dtype = draw(st.sampled_from(dtypes))
    return Problem(
        x.to(dtype), torch.tensor(assign).view(batch, length), slots, torch.tensor(weight).view(batch, length), complete
    )


# Unit vectors whose products are exact in every float format: only 0, ±1/2 and ±1 occur, so ties are everywhere.
LATTICE = torch.tensor(
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0], [1, 1, 1, 1], [1, -1, 1, -1], [-1, -1, 1, 1], [0, 0, 0, 0]]
)  # fmt: skip


@st.composite
def lattices(draw: st.DrawFn) -> Tensor:
    """(B, N, 4) metrics full of exact ties and zero rows, scaled by powers of two, in any dtype."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    picks = draw(st.lists(st.integers(0, len(LATTICE) - 1), min_size=batch * length, max_size=batch * length))
    scale = draw(st.lists(st.sampled_from([1.0, 4.0, 0.25]), min_size=batch * length, max_size=batch * length))
    metric = LATTICE[torch.tensor(picks)] * torch.tensor(scale).unsqueeze(1)
    return metric.view(batch, length, 4).to(draw(st.sampled_from(DTYPES)))


prefixes = st.sampled_from([0, 1, 2, 5])
budgets = st.one_of(st.integers(0, 12), st.just(10**6))
