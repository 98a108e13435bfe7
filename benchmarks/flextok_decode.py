"""FlexTok's decoder against its official packing: time and memory of one pair of velocities, without the VAE.

The official way is written anew here: all images of a batch in one sequence under a block-diagonal mask, every dropped
or null register a token of its own, mask and modulations made in every call, all rows through the last block.

    python benchmarks/flextok_decode.py [--batch 1 8] [--tokens 32] [--repeats 5] [--store]

Weights are random: the size is official, and time does not depend on their values. Both sides run in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import store
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from visiontok.tokenizers.flextok import FlexTok
from visiontok.tokenizers.flextok_config import variant_config
from visiontok.tokenizers.flextok_modules import frequencies, norm, patchify, position_table, unpatchify
from visiontok.tokenizers.flow import Guidance, sample, time_grid

FILE = store.RESULTS / "flextok_decode.csv"
KEY = ("variant", "batch", "tokens", "device")


def build(variant: str) -> FlexTok:
    """A FlexTok of official size; modulations that start as zero become random, so that every part counts."""
    torch.manual_seed(0)
    model = FlexTok({**variant_config(variant), "vae": None})
    for parameter in model.decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


class Packed:
    """The official way for rows `(B, k)` of ids.

    All images are one sequence, patches and registers of each side by side. Every call makes the mask anew and repeats
    the modulations for every token, as the official code does when it falls back to plain attention.
    """

    def __init__(self, model: FlexTok, ids: Tensor, conditional: bool) -> None:
        decoder, batch = model.decoder, len(ids)
        self.decoder, self.batch = decoder, batch
        rest = decoder.mask_token.expand(batch, model.length - ids.shape[1], -1)
        registers = torch.cat([decoder.registers(model.code_vectors(ids)), rest], 1)
        self.registers = registers if conditional else decoder.null.expand_as(registers)
        self.side = model.config["latent_size"] // decoder.size
        self.counts = torch.tensor([self.side**2, model.length])
        table = decoder.module_dict["dec_patches_posemb_module"].posembs
        places = position_table(table, (self.side, self.side), scaling=decoder.positions)
        self.places = places.flatten(2).transpose(1, 2)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        decoder, batch = self.decoder, self.batch
        parts: Any = decoder.module_dict
        patches = parts["dec_noise_patch_emb"].patch_proj(patchify(x, decoder.size)) + self.places
        y = torch.cat([patches, self.registers], 1).flatten(0, 1)[None]
        owner = torch.arange(batch).repeat_interleave(int(self.counts.sum()))
        total = len(owner)
        mask = create_mask(lambda b, h, q, k: owner[q] == owner[k], None, None, total, total, device="cpu")
        mlp = parts["dec_time_embedder"].mlp
        waves = frequencies(torch.full((batch,), t), decoder.frequency_size, **decoder.time)
        time = mlp(waves.to(mlp[0].weight.dtype))
        for block in decoder.blocks:
            y = self._block(block, y, self._spread(block.adaLN_modulation(time)), mask)
        shift, scale = self._spread(parts["dec_to_patches"].adaLN_modulation(time).repeat(1, 2)).chunk(2, -1)
        y = norm(y) * (1 + scale) + shift
        out = parts["dec_to_patches"].proj(y.view(batch, -1, y.shape[-1])[:, : self.side**2])
        return unpatchify(out, decoder.size, (self.side, self.side))

    def _spread(self, modulation: Tensor) -> Tensor:
        """One row for each token of `(B, 2 n D)`."""
        each = modulation.view(2 * self.batch, -1)
        return each.repeat_interleave(self.counts.repeat(self.batch), 0)[None]

    def _block(self, block: Any, x: Tensor, modulation: Tensor, mask: Tensor) -> Tensor:
        gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = modulation.chunk(6, -1)
        z = norm(x) * (1 + scale_a) + shift_a
        x = x + gate_a * block.attn(z, block.attn.keys(z), mask)
        return x + gate_m * block.mlp(norm(x) * (1 + scale_m) + shift_m)


def peak(run: Callable[[], object]) -> float:
    """MiB that a run holds more than before, sampled every 2 ms from the process."""
    gc.collect()
    # What earlier runs freed and the allocator kept would hide this run's need.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    highest, done = resident(), threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.002)

    before, thread = highest, threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return highest - before


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@torch.inference_mode()
def compare(model: FlexTok, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.codebook_size, (batch, tokens), generator=generator)
    noise = torch.randn(batch, model.config["latent_channels"], 32, 32, generator=generator)
    official = {flag: Packed(model, ids, flag) for flag in (True, False)}
    times = time_grid(25)
    ours = model._network(ids, [tokens] * batch, times, noise, False)

    def run_official() -> None:
        for flag in (True, False):
            official[flag](noise, times[1])

    def run_ours() -> None:
        for flag in (True, False):
            ours(noise, times[1], flag)

    differences = [
        float((official[flag](noise, times[1]) - ours(noise, times[1], flag)).abs().max()) for flag in (True, False)
    ]
    seconds: dict[str, list[float]] = {"official": [], "ours": []}
    for _ in range(repeats):
        for name, run in (("official", run_official), ("ours", run_ours)):
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    grid = time_grid(2)
    whole = [
        sample(lambda x, t, c: official[c](x, t), noise, grid, Guidance()),
        sample(model._network(ids, [tokens] * batch, grid, noise, False), noise, grid, Guidance()),
    ]
    ratios = [a / b for a, b in zip(seconds["official"], seconds["ours"])]
    return {
        "batch": batch, "tokens": tokens, "official_s": round(statistics.median(seconds["official"]), 3),
        "ours_s": round(statistics.median(seconds["ours"]), 3), "ratio": round(statistics.median(ratios), 2),
        "ratio_least": round(min(ratios), 2), "peak_official_mib": round(peak(run_official)),
        "peak_ours_mib": round(peak(run_ours)), "velocity_difference": f"{max(differences):.1e}",
        "two_steps_difference": f"{float((whole[0] - whole[1]).abs().max()):.1e}",
        "two_steps_largest": round(float(whole[0].abs().max()), 2), "repeats": repeats,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="d12_d12")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--store", action="store_true", help=f"write {FILE.name}")
    args = parser.parse_args()
    model = build(args.variant)
    rows = []
    for batch in args.batch:
        rows.append({"variant": args.variant, **compare(model, batch, args.tokens, args.repeats)})
        print(rows[-1], flush=True)
    if args.store:
        where = store.machine("cpu")
        store.put(FILE, [row | where for row in rows], KEY)


if __name__ == "__main__":
    main()
