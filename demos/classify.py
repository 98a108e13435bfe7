"""Classify a picture with and without token reduction: the maps, the answers, the compute and the measured speed."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import visiontok as vt
from visiontok.bench import examples, models, timing
from visiontok.bench.data import UnreadableImageError, open_image
from visiontok.errors import VisionTokError
from visiontok.models.tiny import TINY_MODELS, digits_split
from visiontok.viz import layer_maps
from visiontok.viz.tokens import as_picture, enlarge

TITLE = "Classify"
PHOTO_MODEL = "deit_small_patch16_224"
MODELS = (*models.EMBEDDED, "deit_tiny_patch16_224", PHOTO_MODEL, "deit3_small_patch16_224", "vit_base_patch16_224")
STYLES = {"mean color": "mean", "colored groups": "label", "kept share": "heat"}
MAX_PIXELS = 40_000_000
TIMING_SECONDS = 4.0
BATCHES = (1, 8, 32)
BATCH_SECONDS = 0.6

_INTRO = """# Fewer tokens, the same answer?
A vision transformer cuts a picture into patches, and each patch is a token. A *reducer* merges or drops tokens that \
say little new. Choose one and see which patches went together, whether the answer survived, and what it saved."""
_RANDOM_WEIGHTS = (
    "Random weights: maps, compute and speed are those of the architecture, but the **classes mean nothing**. "
    "Tick *pretrained weights* to download trained ones."
)
_OVERHEAD = (
    "Choosing and merging tokens has a price of its own; at this size and batch it is higher than what it saves. "
    "Try a larger model, or more pictures per batch (*More*)."
)
_UNTRAINED = (
    "This method has learned parts that must be trained. Here they are **random**: tokens, compute and speed are "
    "right, the answer after the reduction means nothing."
)
_ADAPTIVE = (
    "This method lets each picture keep its own number of tokens: the maps show it, the table has the most that any "
    "picture can need."
)
_DIGITS_ONLY = "This small model was trained on handwritten digits, bright on dark; it calls everything a digit."


def reduce(
    image: str | None,
    model: str,
    reducer: str,
    keep: float,
    pretrained: bool = False,
    style: str = "mean color",
    batch_size: int = 0,
    progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio finds the progress bar by this default)
) -> tuple[Any, ...]:
    """Runs one picture through a model and its reduced copy.

    Args:
        image: path of the picture.
        model: an embedded model or any timm vision transformer.
        reducer: registry name.
        keep: share of the tokens kept wherever the reducer acts, in (0, 1].
        pretrained: download trained weights for a timm model.
        style: a key of `STYLES`.
        batch_size: pictures per timed batch, 0 picks what takes about `BATCH_SECONDS`.

    Returns:
        `((picture, map), gallery, before, after, summary, details)` for the components of `build`.

    Raises:
        gr.Error: whatever the user can mend: no picture, a damaged one, an unknown model, a reducer that does not fit.
    """
    if not image:
        raise gr.Error("Choose a picture first: upload one, paste one, or click an example.", print_exception=False)
    try:
        picture = open_image(image, max_pixels=MAX_PIXELS)
    except UnreadableImageError as error:
        reason = str(error).removeprefix(f"{image}: ")
        raise gr.Error(f"The picture cannot be read ({reason}). Try another file.", print_exception=False) from error
    name = model.strip()
    progress(0.05, "loading the model")
    reference = _load(name, pretrained)
    traced, timed = vt.detached(reference), vt.detached(reference)
    try:
        reduction = vt.patch(traced, reducer, keep=keep, trace=True)
        vt.patch(timed, reducer, keep=keep)
        progress(0.15, "classifying")
        pixels = models.transform(reference, name)(picture)[None]  # (1, C, H, W)
        with torch.inference_mode():
            logits = reference(pixels)[0], traced(pixels)[0]
        report = reduction.report(input_size=tuple(pixels.shape[1:]))
        panels = _panels(examples.picture(pixels[0], reference), reduction, STYLES[style], report.tokens_in)
        progress(0.3, "timing both models in turns")
        times, batch_size = _time(reference, timed, pixels, batch_size)
    except VisionTokError as error:
        raise gr.Error(str(error), print_exception=False) from error
    ratio = timing.speedup(times["before"], times["after"])
    details = {
        "model": name,
        "random_weights": name not in models.EMBEDDED and not pretrained,
        "reducer": reducer,
        "keep": keep,
        "adaptive": any(part.ragged for part in reduction.reducers[0].parts()),
        "tokens_in": report.tokens_in,
        "tokens": report.tokens,
        "gmacs_before": report.gmacs_before,
        "gmacs_after": report.gmacs_after,
        "ideal_speedup": report.ideal_speedup,
        "speedup": ratio.value if ratio.clear else None,
        "speedup_interval": [ratio.low, ratio.high],
        "latency_ms": {key: {p: 1e3 * getattr(t, p) for p in ("p20", "p50", "p80")} for key, t in times.items()},
        "batch_size": batch_size,
        "rounds": len(times["before"].samples),
        "top1_before": int(logits[0].argmax()),
        "top1_after": int(logits[1].argmax()),
    }
    gallery = [(panel, caption) for caption, panel in panels]
    before, after = (_top5(values, _class_names(reference)) for values in logits)
    return (panels[0][1], panels[-1][1]), gallery, before, after, summarize(details), details


def build() -> gr.Blocks:
    """Lays out the page; launches nothing."""
    reducers = fitting_reducers()
    first = "tome" if "tome" in reducers else reducers[0]
    with gr.Blocks(title="visiontok: classify with fewer tokens", analytics_enabled=False) as blocks:
        gr.Markdown(_INTRO)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260
                )
                # Gradio would open a damaged file itself and answer with an internal message; `reduce` has words.
                image.preprocess = _uploaded_path
                shown_examples = gr.Column()
                model = gr.Dropdown(
                    list(MODELS),
                    value=MODELS[0],
                    label="Model",
                    info="or type the name of any timm vision transformer",
                    allow_custom_value=True,
                )
                pretrained = gr.Checkbox(label="Pretrained weights", info="downloads them, timm models only")
                reducer = gr.Dropdown(_choices(reducers), value=first, label="Reducer")
                card = gr.Markdown(describe(first))
                keep = gr.Slider(
                    0.3, 1.0, 0.9, step=0.01, label="Keep", info="share of tokens kept wherever the method acts"
                )
                with gr.Accordion("More", open=False):
                    style = gr.Radio(list(STYLES), value=next(iter(STYLES)), label="Draw groups by")
                    batch_size = gr.Radio([("automatic", 0), *BATCHES], value=0, label="Pictures per timed batch")
                button = gr.Button("Reduce", variant="primary")
            with gr.Column(scale=3, min_width=340):
                slider = gr.ImageSlider(label="Picture | tokens of the last layer", type="pil", max_height=460)
                with gr.Row():
                    before = gr.Label(label="Before", num_top_classes=5)
                    after = gr.Label(label="After", num_top_classes=5)
                summary = gr.Markdown(elem_classes="numbers")
        gallery = gr.Gallery(
            label="Layer by layer", columns=6, object_fit="contain", format="png", elem_classes="layers"
        )
        with gr.Accordion("Details", open=False):
            details = gr.JSON(label="Numbers")
        with shown_examples:
            gr.Examples(_example_files(), [image, model], cache_examples=False, visible_columns=[0])
        button.click(
            reduce,
            [image, model, reducer, keep, pretrained, style, batch_size],
            [slider, gallery, before, after, summary, details],
            api_name="reduce",
            concurrency_limit=1,
        )
        reducer.change(describe, reducer, card, api_visibility="private", show_progress="hidden")
    return blocks


def describe(reducer: str) -> str:
    """One line about a reducer, from its card."""
    card = vt.describe(reducer)
    source = f" [{card.paper}]({card.url})" if card.url else ""
    return f"{card.summary}{source}" + ("" if card.training_free else f"\n\n{_UNTRAINED}")


def _choices(reducers: list[str]) -> list[tuple[str, str]]:
    """Labels and names of reducers; those that need training last, and labelled."""
    trained = {name: vt.describe(name).training_free for name in reducers}
    label = {name: name if free else f"{name} (needs training)" for name, free in trained.items()}
    return [(label[name], name) for name in sorted(reducers, key=lambda name: not trained[name])]


@functools.cache
def fitting_reducers() -> list[str]:
    """The registered reducers that fit a vision transformer and take the budget that the slider sets."""
    probe = TINY_MODELS[models.DEFAULT_MODEL](False)
    fitting = []
    for name in vt.list_reducers():
        with contextlib.suppress(VisionTokError), vt.patched(probe, name, keep=0.9):
            fitting.append(name)
    return fitting


def summarize(details: dict[str, Any]) -> str:
    """The numbers of a run as a small table, with what must be said about them."""
    tokens, latency = details["tokens"], details["latency_ms"]
    low, high = details["speedup_interval"]
    compute = 100 * (1 - details["gmacs_after"] / details["gmacs_before"])
    saved = f"{abs(compute):.0f} % {'less' if compute >= 0 else 'more'}"
    if details["speedup"] is None:
        speed = "not distinguishable"
    else:
        verdict = "" if details["speedup"] > 1 else " slower"
        speed = f"**{details['speedup']:.2f}×**{verdict} [{low:.2f}, {high:.2f}]"
    agree = "same answer" if details["top1_before"] == details["top1_after"] else "**another answer**"
    notes = [
        f"Speed: {details['rounds']} rounds in turns on this machine, batch {details['batch_size']}, interval at 95 %. "
        f"The arithmetic alone would allow {details['ideal_speedup']:.2f}×.",
        _OVERHEAD if details["speedup"] is not None and details["speedup"] < 1 else "",
        _RANDOM_WEIGHTS if details["random_weights"] else "",
        "" if vt.describe(details["reducer"]).training_free else _UNTRAINED,
        _ADAPTIVE if details["adaptive"] else "",
        _DIGITS_ONLY if details["model"] in models.EMBEDDED else "",
    ]
    return (
        "| | before | after | |\n|---|---|---|---|\n"
        f"| tokens after the last layer | {details['tokens_in']} | {tokens[-1]} | {agree} |\n"
        f"| GMACs per picture | {details['gmacs_before']:.3g} | {details['gmacs_after']:.3g} | {saved} |\n"
        f"| ms per batch | {latency['before']['p50']:.3g} | {latency['after']['p50']:.3g} | {speed} |\n\n"
        + "\n\n".join(note for note in notes if note)
    )


@functools.lru_cache(maxsize=2)
def _load(name: str, pretrained: bool) -> nn.Module:
    try:
        model = models.load(name, pretrained=pretrained)
    except VisionTokError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        # Downloads fail in as many ways as there are network libraries below timm.
        if not pretrained:
            raise
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise gr.Error(f"The weights of {name} cannot be downloaded ({reason}).", print_exception=False) from error
    if not getattr(model, "num_classes", 0):
        raise gr.Error(f"{name} has no classifier, so there is no answer to compare.", print_exception=False)
    return model


def _panels(seen: np.ndarray, reduction: Any, style: str, tokens_in: int) -> list[tuple[str, Image.Image]]:
    if reduction.trace:
        return layer_maps(seen, reduction.trace, style=style)
    return [(f"input: {tokens_in} tokens, none removed", enlarge(as_picture(seen), None))]


def _time(before: nn.Module, after: nn.Module, pixels: Tensor, batch_size: int) -> tuple[dict[str, timing.Timing], int]:
    """Times both models in turns within about `TIMING_SECONDS`, and returns the batch size too."""
    with torch.inference_mode():
        for model in (before, after):  # the first call of a fresh model is slow
            model(pixels)
        start = time.perf_counter()
        for model in (before, after):
            model(pixels)
        seconds = time.perf_counter() - start
        batch_size = batch_size or max((n for n in BATCHES if n * seconds < BATCH_SECONDS), default=1)
        batch = pixels.expand(batch_size, -1, -1, -1).contiguous()
        calls = {"before": functools.partial(before, batch), "after": functools.partial(after, batch)}
        rounds = min(max(int(TIMING_SECONDS / (seconds * batch_size)), 5), 40)
        return timing.interleave(calls, warm=1, rounds=rounds), batch_size


def _top5(logits: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    share, index = logits.float().softmax(-1).topk(min(5, logits.numel()))
    return {names[i]: p for i, p in zip(index.tolist(), share.tolist())}


def _class_names(model: nn.Module) -> tuple[str, ...]:
    count: Any = model.num_classes
    config: Any = model.pretrained_cfg
    if config.get("label_names"):
        return tuple(config["label_names"])
    if count != 1000:
        return tuple(f"class {index}" for index in range(count))
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    # Two kinds of crane and of maillot share a description; the number keeps them apart.
    return tuple(f"{info.index_to_description(index).split(',')[0]} ({index})" for index in range(count))


def _uploaded_path(payload: Any) -> str | None:
    return None if payload is None else payload.path


@functools.cache
def _example_files() -> list[list[str]]:
    """Writes a few of scikit-learn's digits and its two photographs where Gradio may serve them."""
    from sklearn.datasets import load_sample_images

    folder = Path(tempfile.mkdtemp(prefix="visiontok-examples-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    digits = digits_split()
    pictures: list[tuple[str, Image.Image, str]] = []
    for index in (16, 18, 1, 26):
        # The model's own enlargement to 32 pixels, drawn large: shrinking it back changes nothing.
        scan = digits.image(index).resize((32, 32), Image.Resampling.BILINEAR)
        pictures.append((f"digit-{index}.png", scan.resize((256, 256), Image.Resampling.NEAREST), models.DEFAULT_MODEL))
    photos = load_sample_images()
    for path, pixels in zip(photos.filenames, photos.images):
        pictures.append((f"{Path(path).stem}.png", Image.fromarray(pixels), PHOTO_MODEL))
    for name, picture, _ in pictures:
        picture.save(folder / name)
    return [[str(folder / name), model] for name, _, model in pictures]
