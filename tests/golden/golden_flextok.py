"""Runs FlexTok's golden files; steps and names as in the method's golden README."""

from __future__ import annotations

import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from golden_case import Case
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from visiontok.ops import fsq
from visiontok.tokenizers import flextok_modules as modules
from visiontok.tokenizers import flow
from visiontok.tokenizers.flextok import FlexTok
from visiontok.tokenizers.flextok_config import from_official
from visiontok.training.tokenizer_noise import keep_lengths, noise_levels, noised

ATOL32 = 1e-4


def run_op(case: Case) -> None:
    kinds = {
        "levels": quantiser, "max_sizes": positions, "frequency_embedding_size": times, "keep_k": dropout,
        "max_seq_len": masks, "guidance_scale_apg": guidance, "mode": levels,
    }  # fmt: skip
    for key, run in kinds.items():
        if key in case.params:
            return run(case)
    if "weight.attn.wq.weight" in case.tensors:
        return block(case)
    return patches(case)


def quantiser(case: Case) -> None:
    sizes = case.params["levels"]
    bounded, codes = fsq.bound(case.need("z"), sizes), fsq.quantize(case.need("z"), sizes)
    case.check("bounded", bounded)
    case.check("quant", codes)
    case.check("tokens", fsq.to_ids(codes, sizes))
    embedded = fsq.to_codes(case.need("indices"), sizes)
    case.check("embedding", embedded)
    case.check("indices_roundtrip", fsq.to_ids(embedded, sizes))
    if case.has("basis"):
        units = torch.eye(len(sizes)) - torch.tensor([float(size // 2) for size in sizes])
        zero = fsq.to_ids(torch.full((len(sizes),), -1.0), sizes)
        case.check("basis", fsq.to_ids(units / torch.tensor([size // 2 for size in sizes]), sizes) - zero)


def positions(case: Case) -> None:
    weights, dim = case.weights(), case.params["dim"]
    for name in [key.removeprefix("out.") for key in case.tensors if key.startswith("out.")]:
        sizes = [int(n) for n in re.findall(r"\d+", name.partition("_")[2])]
        if name.startswith("sincos_crop"):
            got = modules.position_table(modules.sincos(dim, *case.params["max_sizes"]), sizes)
        elif name.startswith("sincos_h"):
            got = modules.sincos(sizes[2], sizes[0], sizes[1])
        elif name.startswith("sincos"):
            got = modules.sincos(dim, *sizes)
        elif name.startswith("learn1d"):
            got = modules.position_table(weights["learn1d"], sizes, "learnable_sum")
        else:
            got = modules.position_table(weights["learn2d"], sizes, f"learnable_{'sum' if 'sum' in name else 'prod'}")
        case.check(name, got)


def times(case: Case) -> None:
    w, t = case.weights(), case.need("t")
    period = case.params["max_period"]
    for name in [key.removeprefix("out.") for key in case.tensors if key.startswith("out.")]:
        most = float(name.rpartition("max")[2])
        odd = re.search(r"odd(\d+)", name)
        width = int(odd[1]) if odd else case.params["frequency_embedding_size"]
        waves = modules.frequencies(t, width, most, period)
        if name.startswith("emb"):
            hidden = F.silu(F.linear(waves, w["mlp.0.weight"], w["mlp.0.bias"]))
            waves = F.linear(hidden, w["mlp.2.weight"], w["mlp.2.bias"])
        case.check(name, waves)


def dropout(case: Case) -> None:
    x, w = case.need("x"), case.weights()
    keep, drop = torch.tensor(case.params["keep_k"]), torch.tensor(case.params["drop"])
    kept = torch.where((torch.arange(x.shape[1]) >= keep[:, None])[..., None], w["mask_token"], x)
    case.check("kept", kept, exact=True)
    case.check("nulled", torch.where(drop[:, None, None], w["nullcond"], x), exact=True)
    case.check("nulled_single_0", w["nullcond"][None, None], exact=True)
    drawn = keep_lengths("uniform_pow2", 2000, 256, np.random.RandomState(0))
    case.check("uniform_pow2_hist", torch.stack(torch.unique(drawn, return_counts=True), 1))


def masks(case: Case) -> None:
    """The masks of the official packing, from who sees whom in an image."""
    total = case.params["max_seq_len"]
    ids = torch.full((total,), case.params["padding_id"], dtype=case.tensors["out.seq_ids"].dtype)
    made = {name: torch.zeros(total, total, dtype=torch.bool) for name in ("full", "causal", "causal_last")}
    start = 0
    for number, (count, prefix) in enumerate(zip(case.need("seq_lens").tolist(), case.need("prefix_lens").tolist())):
        here = slice(start, start + count)
        ids[here] = number
        made["full"][here, here] = True
        made["causal"][here, here] = torch.ones(count, count, dtype=torch.bool).tril()
        last = torch.zeros(count, count, dtype=torch.bool)
        last[:, :prefix] = True
        last[prefix:] = torch.ones(count - prefix, count, dtype=torch.bool).tril(prefix)
        made["causal_last"][here, here] = last
        start += count
    case.check("seq_ids", ids)
    for name, mask in made.items():
        case.check(f"mask_{name}", mask)


def block(case: Case) -> None:
    x, w = case.need("x"), case.weights()
    timed = case.given("temb")
    made = modules.Block(x.shape[-1], case.params["head_dim"], groups=0 if timed is None else 2)
    made.load_state_dict(w)
    made.to(x.dtype)
    with torch.no_grad():
        if timed is None:
            rows = next(v for k, v in case.params.items() if "patch" in k and isinstance(v, int))
            case.check("y", torch.cat(encoder_block(made, x[:, :rows], x[:, rows:]), 1))
            return
        m = made.adaLN_modulation(timed).unflatten(-1, (2, 6, -1))
        start, outputs, packed = 0, [], []
        for row, (first, second) in zip(m, case.need("lens").tolist()):
            here = x[:, start : start + first + second]
            outputs.append(made.modulated(here, row[None], first, None))
            packed += [row[0].flatten().expand(first, -1), row[1].flatten().expand(second, -1)]
            start += first + second
    case.check("y", torch.cat(outputs, 1))
    case.check("modulation_packed", torch.cat(packed)[None])


def encoder_block(made: Any, patches: Tensor, registers: Tensor) -> tuple[Tensor, Tensor]:
    """Both kinds of tokens after an encoder block."""
    keys, own = made.attn.keys(modules.norm(patches)), made.attn.keys(modules.norm(registers))
    both = tuple(torch.cat(pair, 2) for pair in zip(keys, own))
    count, before = registers.shape[1], patches.shape[1]
    mask = torch.ones(count, before + count, dtype=torch.bool).tril(before)
    return made.advance(patches, keys), made.advance(registers, both, mask)


def patches(case: Case) -> None:
    """Patch embeddings and heads: the order of a patch's values, on grids that need not be square."""
    size = int(np.ravel(case.params.get("patch_sizes", case.params.get("patch_size", 2)))[0])
    w = case.weights()
    for name, x in [(k.removeprefix("in."), t) for k, t in case.tensors.items() if k.startswith("in.")]:
        tail = name.removeprefix("x")
        if "patch_proj.weight" in w and x.dim() == 4:
            y = F.linear(modules.patchify(x, size), w["patch_proj.weight"], w["patch_proj.bias"])
            case.check(f"y{tail}", y.reshape(case.tensors[f"out.y{tail}"].shape))
        elif x.dim() == 4:
            shift, scale = F.linear(
                F.silu(case.need("temb")), w["adaLN_modulation.1.weight"], w["adaLN_modulation.1.bias"]
            ).chunk(2, -1)
            y = modules.norm(x.flatten(1, 2)) * (1 + scale[:, None]) + shift[:, None]
            y = F.linear(y, w["proj.weight"], w["proj.bias"])
            case.check(f"y{tail}", modules.unpatchify(y, size, (x.shape[1], x.shape[2])))


def guidance(case: Case) -> None:
    p = case.params
    x, buffer = case.need("x_start"), None
    for step in range(p["steps"], 0, -1):
        v, u = case.need(f"cond_{step}"), case.need(f"uncond_{step}")
        case.check(f"cfg_{step}", flow.cfg(v, u, p["guidance_scale_cfg"]))
        plain, _ = flow.apg(v, u, p["guidance_scale_apg"], momentum=0.0, eta=1.0, threshold=None)
        case.check(f"apg_nomom_eta1_{step}", plain)
        guided, buffer = flow.apg(
            v, u, p["guidance_scale_apg"], buffer, momentum=p["momentum"], eta=p["eta"], threshold=p["norm_threshold"]
        )
        case.check(f"apg_{step}", guided)
        x = x - guided / p["steps"]
        case.check(f"x_after_{step}", x)


def levels(case: Case) -> None:
    kinds = {
        "ln": ("logit_normal", 0.0), "ln_strat": ("logit_normal_stratified", 0.0), "uniform": ("uniform", 0.0),
        "mode025": ("mode", 0.25), "mode129": ("mode", 1.29),
    }  # fmt: skip
    for name, (kind, scale) in kinds.items():
        sigma = noise_levels(kind, case.need(f"raw_{name}"), scale)
        case.check(f"sigma_{name}", sigma)
        case.check(f"noised_{name}", noised(case.need("clean"), case.need("noise"), sigma))


# ---- whole models


@functools.cache
def tiny(path: Path) -> FlexTok:
    with safe_open(path, "pt") as file:
        params = json.loads(file.metadata()["params"])
    config = from_official(params["config"], params["vae_config"])
    state = {name.removeprefix("weight."): tensor for name, tensor in load_file(path).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The licence of released weights.
        return FlexTok.from_checkpoint(state, config=config)


def run_model(case: Case) -> None:
    if "weights" not in case.params:
        # The weights of the other files: each of them must arrive.
        state = tiny(case.path).state_dict()
        case.compared |= {name for name, t in case.weights().items() if torch.equal(t, state[name])}
        return
    model = tiny(case.path.parent / case.params["weights"])
    with torch.no_grad():
        if case.given("images") is not None:
            encode(case, model)
        elif case.given("t") is not None:
            velocity(case)
        else:
            decode(case, model)


def encode(case: Case, model: FlexTok) -> None:
    images = (case.need("images") + 1) / 2
    posterior = "sample" if case.params["sample_posterior"] else "mode"
    latents = model.to_latents(images, posterior, case.given("posterior_noise"))
    found: Any = model.vae
    posteriors = found.vae.encode(case.need("images")).latent_dist
    case.check("posterior_mean", posteriors.mean)
    case.check("posterior_logvar", posteriors.logvar)
    case.check("vae_latents", latents)
    z = model.registers(latents)
    codes, ids = model.quantize(z)
    case.check("register_latents", z)
    case.check("quant", codes)
    case.check("tokens", ids)
    assert torch.equal(model.encode(images.clamp(0, 1), 5), ids[:, :5]) or posterior == "sample"
    for number, packed in enumerate(packed_states(case, model, latents)):
        case.check(f"packed_after_block_{number}", packed)


def packed_states(case: Case, model: FlexTok, latents: Tensor) -> list[Tensor]:
    if not case.has("packed_after_block_0"):
        return []
    parts: Any = model.encoder.module_dict
    patches = model.encoder.embed(latents)
    registers = parts["enc_register_module"].registers.expand(len(latents), -1, -1)
    found = []
    for made in model.encoder.blocks:
        patches, registers = encoder_block(made, patches, registers)
        found.append(pack(torch.cat([patches, registers], 1), case.tensors["out.packed_after_block_0"]))
    return found


def pack(tokens: Tensor, like: Tensor) -> Tensor:
    """The official layout: all images in one row, zeros behind."""
    row = tokens.flatten(0, 1)
    return F.pad(row, (0, 0, 0, like.shape[1] - len(row)))[None]


def ids_of(case: Case) -> list[Tensor]:
    names = sorted((n for n in case.tensors if n.startswith("in.tokens")), key=lambda n: int(n.rpartition("_")[2]))
    return [case.tensors[name][0] for name in names]


def padded_codes(model: FlexTok, rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([F.pad(fsq.to_codes(r, model.levels, dtype), (0, 0, 0, model.length - len(r))) for r in rows])


def velocity(case: Case) -> None:
    # Double weights, but norms and sinusoids stay in fp32 in the official code.
    model = tiny(case.path.parent / case.params["weights"])
    state = {key: value.double() for key, value in model.state_dict().items()}
    double = FlexTok(model.config).double()
    double.load_state_dict(state)
    rows = ids_of(case)
    keep = torch.tensor([len(row) for row in rows])
    v = double.velocity(case.need("x"), case.need("t"), padded_codes(model, rows, torch.float64), keep=keep)
    case.tensors["out.v"] = case.tensors["out.v"].float()
    case.check("v", v.float())


def decode(case: Case, model: FlexTok) -> None:
    p, rows = case.params, ids_of(case)
    scale = p["guidance_scale"]
    weight: Any = (lambda t: 1 + 4 * t) if scale == "callable" else scale
    latents: list[Tensor] = []
    calls: list[tuple[Tensor, Tensor]] = []
    watch = model.decoder.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    spy = functools.partial(_spied, model, latents)
    try:
        model.__dict__["from_latents"] = spy
        images = model.decode(
            rows, clamp=False, noise=case.need("noise"), steps=p["timesteps"], guidance=weight,
            norm_guidance=p["perform_norm_guidance"],
        )  # fmt: skip
    finally:
        del model.__dict__["from_latents"]
        watch.remove()
    case.check("images", images * 2 - 1)
    case.check("latents", latents[-1])
    case.check("cond_register_input", register_input(model, rows))
    for number, (x, v) in enumerate(calls):
        kind = "uncond" if number % 2 and scale != 1.0 else "cond"
        for name, got in ((f"call{number:02}_x_in", x), (f"call{number:02}_v_{kind}", v)):
            if case.has(name):
                case.check(name, got)
    first = [n for n in case.tensors if n.startswith("out.first_call_packed")]
    if first:
        states = first_call(model, rows, case.need("noise"))
        for number, tokens in enumerate(states):
            name = f"first_call_packed_after_block_{number}"
            case.check(name, pack(tokens, case.tensors[f"out.{name}"]))


def _spied(model: FlexTok, kept: list[Tensor], latents: Tensor) -> Tensor:
    kept.append(latents)
    return FlexTok.from_latents(model, latents)


def register_input(model: FlexTok, rows: list[Tensor]) -> Tensor:
    r = model.decoder.registers(padded_codes(model, rows, torch.float32))
    keep = torch.tensor([len(row) for row in rows])
    return torch.where((torch.arange(r.shape[1]) >= keep[:, None])[..., None], model.decoder.mask_token, r)


def first_call(model: FlexTok, rows: list[Tensor], noise: Tensor) -> list[Tensor]:
    """All tokens after each block of the decoder's first call, none of them merged."""
    parts: Any = model.decoder.module_dict
    grid = (noise.shape[2] // 2, noise.shape[3] // 2)
    table = modules.position_table(parts["dec_patches_posemb_module"].posembs, grid)
    x = parts["dec_noise_patch_emb"].patch_proj(modules.patchify(noise, 2)) + table.flatten(2).transpose(1, 2)
    count = x.shape[1]
    y, states = torch.cat([x, register_input(model, rows)], 1), []
    m, _ = model.decoder.modulation(torch.ones(1))
    for number, made in enumerate(model.decoder.blocks):
        y = made.modulated(y, m[:, number], count, None)
        states.append(y)
    return states
