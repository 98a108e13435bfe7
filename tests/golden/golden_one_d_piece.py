"""Runs One-D-Piece's golden files; steps and names as in the method's golden README."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from golden_case import Case
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from visiontok.ops import vq
from visiontok.tokenizers.one_d_piece import OneDPiece
from visiontok.tokenizers.pixel_decoder import ResidualBlock, same_padding
from visiontok.tokenizers.titok import TiTok
from visiontok.tokenizers.titok_config import infer_config
from visiontok.tokenizers.titok_modules import Block

ATOL32 = 1e-4


def with_heads(state: dict[str, Tensor], heads: int) -> dict[str, Any]:
    config = infer_config(state)
    return {
        **config,
        "encoder": {**config["encoder"], "heads": heads},
        "decoder": {**config["decoder"], "heads": heads},
    }


def run_op(case: Case) -> None:
    w = case.weights()
    with torch.no_grad():
        if "embedding" in w:
            quantiser(case, w["embedding"])
        elif "attn.in_proj_weight" in w:
            x = case.need("x_LND")
            made = Block(x.shape[-1], case.params["heads"]).to(x.dtype)
            made.load_state_dict(w)
            case.check("y_LND", made(x.transpose(0, 1)).transpose(0, 1))
        elif "conv1.weight" in w:
            made = ResidualBlock(w["conv1.weight"].shape[1], w["conv1.weight"].shape[0])
            made.load_state_dict(w)
            case.check("y", made(case.need("x")))
        elif "weight" in w:
            stride = next(int(key[-1]) for key in case.tensors if key.startswith("out.y_stride"))
            x = same_padding(case.need("x"), w["weight"].shape[-1], stride)
            case.check(f"y_stride{stride}", F.conv2d(x, w["weight"], w["bias"], stride=stride))
        else:
            reshapes(case)


def quantiser(case: Case, codebook: Tensor) -> None:
    p = case.params
    model = quantising(codebook, p["use_l2_norm"], p["commitment_cost"])
    codes, losses, ids = model.quantize_latents(case.need("z"))
    case.check("indices", ids[:, None])
    case.check("z_quantized", codes)
    case.check("codebook_loss", losses["codebook"])
    case.check("commitment_loss", losses["commitment"])
    case.check("quantizer_loss", losses["total"])
    case.check("codebook_entry_hard", vq.lookup(ids.flatten(), codebook, p["use_l2_norm"]))
    case.check("codebook_entry_soft", vq.lengthless(case.need("soft") @ codebook, p["use_l2_norm"]))


def quantising(codebook: Tensor, l2_norm: bool, cost: float) -> TiTok:
    """The quantiser of a model, which needs the rest around it."""
    part = {"width": 8, "depth": 1, "heads": 1}
    entries, width = codebook.shape
    model = TiTok(
        {
            "image_size": 4, "patch_size": 2, "length": 2, "codebook_size": entries, "token_size": width,
            "use_l2_norm": l2_norm, "commitment_cost": cost, "encoder": part, "decoder": part, "pixel": None,
            "legacy": False, "quantize": "vq",
        }
    )  # fmt: skip
    model.codebook.copy_(codebook)
    return model


def reshapes(case: Case) -> None:
    """The legacy reshape beside the transpose, and the lengths that tail token drop keeps."""
    for name, x in [(k.removeprefix("in."), t) for k, t in case.tensors.items() if k.startswith("in.")]:
        if x.dim() == 3:
            rows, count, width = x.shape
            for out in [k.removeprefix("out.") for k in case.tensors if k.startswith("out.")]:
                legacy = "legacy" in out
                y = x.reshape(rows, width, 1, count) if legacy else x.transpose(1, 2)[:, :, None]
                case.check(out, y.reshape(case.tensors[f"out.{out}"].shape), exact=True)
        else:
            raise AssertionError(f"nothing runs {name}")


# ---- whole models


@functools.cache
def tiny(path: Path) -> OneDPiece:
    with safe_open(path, "pt") as file:
        params = json.loads(file.metadata()["params"])
    state = {name.removeprefix("weight."): tensor for name, tensor in load_file(path).items()}
    heads = params["size_table"]["small"]["heads"]
    return OneDPiece.from_checkpoint(state, config=with_heads(state, heads))


def run_model(case: Case) -> None:
    if "weights" not in case.params:
        # The weights of the other files: each of them must arrive.
        state = tiny(case.path).state_dict()
        case.compared |= {name for name, t in case.weights().items() if torch.equal(t, state[name])}
        return
    model = tiny(case.path.parent / case.params["weights"])
    wide = any(t.dtype == torch.float64 for t in case.tensors.values())
    if wide:
        double = OneDPiece(model.config).double().eval()
        double.load_state_dict(model.state_dict())
        model = double
    with torch.no_grad(), Watch(model) as watch:
        if case.given("target_codes") is not None:
            loss(case, model)
            return
        if case.given("images") is not None:
            encode(case, model, watch)
        if case.given("tokens") is not None:
            decode(case, model, watch)
        if case.given("z_quantized") is not None:
            logits = model.logits(case.need("z_quantized"))
            case.check("logits", logits)
            if case.has("images"):
                case.check("images", model.pixels(logits.double()))


class Watch:
    """Collects what the blocks return; the last of them without leaving rows out."""

    def __init__(self, model: TiTok) -> None:
        self.model = model
        self.seen: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}

    def __enter__(self) -> Watch:
        self.hooks = []
        for part in self.seen:
            for made in getattr(self.model, part).transformer:
                self.hooks.append(made.register_forward_pre_hook(self.note(part, made)))
        return self

    def note(self, part: str, made: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.seen[part].append(Block.forward(made, args[0], slice(None), args[2]))  # pyright: ignore

        return hook

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def check(self, case: Case, part: str) -> None:
        for number, state in enumerate(self.seen[part]):
            if case.has(f"hidden_after_block_{number}_BLD"):
                case.check(f"hidden_after_block_{number}_BLD", state)


def encode(case: Case, model: TiTok, watch: Watch) -> None:
    images = case.need("images")
    z = model.latents(images)
    if case.has("z"):
        case.check("z", z)
    codes, _, ids = model.quantize_latents(z)
    if case.has("z_quantized"):
        case.check("z_quantized", codes)
    if case.has("tokens"):
        case.check("tokens", ids[:, None])
        assert torch.equal(model.encode(images), ids)
    watch.check(case, "encoder")
    if case.has("images"):
        case.check("images", model.decode(ids[:, : case.params["length"]], clamp=False))


def decode(case: Case, model: TiTok, watch: Watch) -> None:
    ids = case.need("tokens")[:, 0]
    ids = ids[:, : case.params["length"] or ids.shape[1]]
    logits = model.logits(model.codes(ids))
    if case.has("logits"):
        case.check("logits", logits)
    watch.check(case, "decoder")
    if case.has("pixel_states"):
        weight = model.pixel_quantize.embedding.weight
        case.check("pixel_states", torch.einsum("bvhw,vz->bzhw", logits.softmax(1), weight))
    if case.has("images"):
        case.check("images", model.decode(ids, clamp=False))


def loss(case: Case, model: TiTok) -> None:
    codes, losses, _ = model.quantize_latents(model.latents(case.need("images")))
    logits = model.logits(codes[..., : case.params["length"]])
    entropy = F.cross_entropy(logits.flatten(2), case.need("target_codes"))
    case.check("logits", logits)
    case.check("ce", entropy)
    case.check("quantizer_loss", losses["total"])
    case.check("total", entropy + case.params["quantizer_weight"] * losses["total"])
