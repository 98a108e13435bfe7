"""Runs TiTok's golden files; steps and names as in the method's golden README."""

from __future__ import annotations

import torch
from golden_case import Case
from golden_one_d_piece import with_heads

from visiontok.tokenizers.titok import TiTok

ATOL32 = 1e-4


def run_model(case: Case) -> None:
    state = case.weights()
    model = TiTok.from_checkpoint(state, config=with_heads(state, case.params["heads"]))
    images = case.need("images")
    with torch.no_grad():
        z = model.latents(images)
        case.check("z", z)
        ids = model.encode(images)
        if model.discrete:
            case.check("tokens", ids[:, None])
            case.check("images", model.decode(ids, clamp=False))
            return
        mean, spread = z.chunk(2, 1)
        spread = spread.clamp(-30, 20)
        case.check("mean", mean)
        case.check("logvar", spread)
        case.check("images_from_mean", model.decode(ids, clamp=False))
        if case.has("kl"):
            kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1)[:, 0]
            case.check("kl", kl)
