"""Prefill of a LLaVA with fewer visual tokens against the same language model given the prompt already compacted.

    python benchmarks/mllm_prefill.py --reducer vtc_cls visionzip divprune --keep 128 --store
    python benchmarks/mllm_prefill.py --reducer vtc_cls --keep 64 128 192 --batch 1 2 --threads 2 --store

Contestants take turns, all on weights that they share: the unpatched model (`full`), the patched one (`reduced`), the
unpatched one that encodes the image and is given the reduced features and the compact prompt for free (`oracle`), the
two halves of the oracle (`encode`, `language`), and encoding with the method's probes (`probed`). The compact prompt is
what the patched model hands to its own language part, so both sides do the same work but for probing, deciding and
compacting.

S = T(full) / T(reduced); E_method is the median over rounds of T(oracle) / T(reduced). E_language is T(language) over
the median of T(reduced) - T(encode), which charges the method's whole cost to the language part. Both should be at
least 0.95. One thread and its process time by default. The model has LLaVA-1.5's shape (576 visual tokens, class token,
two-layer projector) with a ViT-B/16 tower and a small Llama; weights are random, speed does not depend on them. Nothing
is timed before oracle and patched model give the same logits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import store
import torch
import transformers

import visiontok as vt
from visiontok.backbones import hf_pictures
from visiontok.bench.timing import Timing, interleave
from visiontok.core.compacting import compact, find_spans
from visiontok.core.flops import profile

FILE = store.RESULTS / "mllm_prefill.csv"
KEY = ("model", "reducer", "keep", "batch", "text", "threads", "device", "versions")
VOCABULARY, IMAGE = 32_000, 31_999


def llava(image: int, width: int, layers: int) -> Any:
    """A LLaVA-1.5 with random weights.

    Args:
        image: Pixels per side; patches are 16 x 16.
        width: Of the language model.
        layers: Of the language model.
    """
    vision = transformers.CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=image,
        patch_size=16, projection_dim=512,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def prompt(visual: int, text: int, batch: int, image: int) -> dict[str, Any]:
    """Inputs of a prefill: a third of the text, the image, the rest of the text."""
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(5, IMAGE - 1, (batch, text), generator=noise)
    before = text // 3
    ids = torch.cat((ids[:, :before], torch.full((batch, visual), IMAGE), ids[:, before:]), dim=1)
    pixels = torch.randn(batch, 3, image, image, generator=noise)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "logits_to_keep": 1}


def compacted(patched: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with which the patched model calls its language part.

    Raises:
        SystemExit: The method does not act before the language model.
    """
    seen: list[dict[str, Any]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(dict(kwargs))

    hook = patched.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        patched(**inputs)
    finally:
        hook.remove()
    given = {name: value for name, value in seen[-1].items() if value is not None}
    if "mm_encoder_outputs" not in given:
        raise SystemExit("the patched model encodes inside its language part; only sites POST and EMBED fit here")
    return given | {"logits_to_keep": inputs["logits_to_keep"]}


def contestants(
    plain: Any, patched: Any, inputs: dict[str, Any], short: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Callables by name; `short` is the compact prompt."""

    def language() -> Any:
        # A dictionary of its own for each call, because the model may put encoded inputs into it.
        return plain(**{**short, "mm_encoder_outputs": dict(short["mm_encoder_outputs"])})

    def encode() -> Any:
        return plain.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)

    def oracle() -> Any:
        encode()
        return language()

    reduction = patched._visiontok
    layout = reduction.backbone.layout(patched)

    def probed() -> Any:
        return hf_pictures.encode(patched, layout, inputs, reduction.taps, reduction.needs, reduction.tower_chain)

    return {
        "probed": probed,
        "full": lambda: plain(**inputs),
        "reduced": lambda: patched(**inputs),
        "oracle": oracle,
        "encode": encode,
        "language": language,
    }


def efficiencies(found: dict[str, Timing]) -> dict[str, float]:
    """Speed-ups and efficiencies; NaN for the language part where it drowns in the noise of encoding."""
    times = {name: np.asarray(timing.samples) for name, timing in found.items()}
    # Differences within one round cancel slow drifts of the machine.
    ours = float(np.median(times["reduced"] - times["encode"]))
    ours = ours if ours > 0 else np.nan
    return {
        "speedup": found["full"].p50 / found["reduced"].p50,
        "language_speedup": float(np.median(times["full"] - times["encode"])) / ours,
        "e_method": float(np.median(times["oracle"] / times["reduced"])),
        "e_language": found["language"].p50 / ours,
        "probe_share": float(np.median(times["probed"] / times["encode"])) - 1,
    }


def compaction(inputs: dict[str, Any], keep: int, rounds: int = 50) -> float:
    """Milliseconds per sample that finding placeholders and shortening the prompt take."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    counts = [int((row == IMAGE).sum()) for row in ids]
    kept = [torch.arange(keep)] * len(counts)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        compact(mask, find_spans(ids, IMAGE, counts, "image"), kept)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3 / len(ids)


def gmacs(plain: Any, inputs: dict[str, Any], short: dict[str, Any]) -> dict[str, float]:
    """Compute of a full and of a reduced prefill, whole and language part alone, without the method's own."""
    encode = profile(plain.get_image_features, {"pixel_values": inputs["pixel_values"]}).total / 1e9
    full, language = profile(plain, inputs).total / 1e9, profile(plain, short).total / 1e9
    return {
        "gmacs_full": full,
        "gmacs_reduced": encode + language,
        "gmac_ratio": full / (encode + language),
        "language_gmac_ratio": (full - encode) / language,
    }


def measure(args: argparse.Namespace, plain: Any, reducer: str, keep: int, batch: int) -> dict[str, Any]:
    """One row of the table.

    Raises:
        SystemExit: Patched model and oracle do not compute the same.
    """
    inputs = prompt((args.image // 16) ** 2, args.text, batch, args.image)
    patched = vt.detached(plain)
    vt.patch(patched, reducer, keep=keep)
    with torch.inference_mode():
        short = compacted(patched, inputs)
        calls = contestants(plain, patched, inputs, short)
        gap = float((calls["reduced"]().logits[:, -1] - calls["oracle"]().logits[:, -1]).abs().max())
        if gap > 1e-3:
            raise SystemExit(f"{reducer} keep={keep}: patched model and oracle differ by {gap:.2g}")
        counts = gmacs(plain, inputs, short)
        found = interleave(calls, warm=1, rounds=args.rounds)
    row = {"model": f"llava-{args.image}px-{args.width}x{args.layers}", "reducer": reducer, "keep": keep,
           "batch": batch, "text": args.text, "rounds": args.rounds, "gap": gap}  # fmt: skip
    times = {f"{name}_ms": timing.p50 * 1e3 for name, timing in found.items()}
    return row | times | efficiencies(found) | counts | {"compaction_ms": compaction(inputs, keep)}


def main() -> None:
    """Prints one line per method, budget and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reducer", nargs="+", default=["vtc_cls"])
    parser.add_argument("--keep", type=int, nargs="+", default=[128])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--text", type=int, default=64, help="text tokens of the prompt")
    parser.add_argument("--image", type=int, default=384, help="pixels per side, a multiple of 16")
    parser.add_argument("--width", type=int, default=1024, help="of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="of the language model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--store", action="store_true", help=f"keep the results in {FILE.name}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain = llava(args.image, args.width, args.layers)
    for reducer in args.reducer:
        for keep in args.keep:
            for batch in args.batch:
                row = measure(args, plain, reducer, keep, batch)
                print(f"{reducer} keep={keep} batch {batch}: {row['full_ms']:.0f} -> {row['reduced_ms']:.0f} ms "
                      f"({row['speedup']:.2f}x, GMACs {row['gmac_ratio']:.2f}x), language "
                      f"{row['language_speedup']:.2f}x (GMACs {row['language_gmac_ratio']:.2f}x), "
                      f"E_method {row['e_method']:.3f}, E_language {row['e_language']:.3f}, "
                      f"probe {row['probe_share']:.1%} of the tower, "
                      f"compaction {row['compaction_ms']:.2f} ms per sample", flush=True)  # fmt: skip
                if args.store:
                    where = store.machine("cpu")
                    where["versions"] += f" transformers={transformers.__version__}"
                    store.put(FILE, [row | where], KEY)


if __name__ == "__main__":
    main()
