"""Draws the pictures of the README and of clip.md: `python docs/pictures.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import visiontok as vt
from visiontok.models.tiny import digits_split, tiny_transform, tiny_vit
from visiontok.viz import token_strip

HERE = Path(__file__).parent / "images"


def digit_strip() -> Image.Image:
    """The trained embedded model on a scan it never saw."""
    model, picture = tiny_vit(), digits_split().image(3)
    with vt.patched(model, "tome", r=6, trace=True) as reduction, torch.inference_mode():
        model(tiny_transform()(picture).unsqueeze(0))
        return token_strip(picture, [step for step in reduction.trace if step.layer in (1, 3, 5, 7)])


def photo_strip() -> Image.Image:
    """DeiT-S on one of scikit-learn's photographs; no weights can be had offline, so it is untrained."""
    import timm
    from sklearn.datasets import load_sample_image
    from timm.data import create_transform, resolve_data_config

    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224").eval()
    photo = Image.fromarray(load_sample_image("flower.jpg")).crop((150, 20, 550, 420)).resize((224, 224))
    transform = create_transform(**{**resolve_data_config(model=model), "crop_pct": 1.0})
    with vt.patched(model, "tome", r=13, trace=True) as reduction, torch.inference_mode():
        model(transform(photo).unsqueeze(0))
        return token_strip(photo, [step for step in reduction.trace if step.layer in (2, 5, 8, 11)])


def scene_strips() -> list[Image.Image]:
    """The embedded CLIP's visual tower on scenes that it never saw."""
    from visiontok.bench.scenes import fixed_scenes
    from visiontok.models.tiny_clip import normalize, tiny_clip

    model, pixels = tiny_clip(), fixed_scenes().images[:3]
    strips = []
    with vt.patched(model, "tome", r=9, trace=True) as reduction, torch.inference_mode():
        for image in pixels:
            model.encode_image(normalize(image).unsqueeze(0))  # pyright: ignore[reportCallIssue]
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            strips.append(token_strip(picture, [step for step in reduction.trace if step.layer in (0, 2, 4, 5)]))
    return strips


def main() -> None:
    torch.set_num_threads(1)
    save([photo_strip(), digit_strip()], "token_map.png")
    save(scene_strips(), "clip_scenes.png")


def save(strips: list[Image.Image], name: str) -> None:
    """Writes strips of one width below one another."""
    width = min(strip.width for strip in strips)
    heights = [round(strip.height * width / strip.width) for strip in strips]
    strips = [s.resize((width, height), Image.Resampling.LANCZOS) for s, height in zip(strips, heights)]
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    HERE.mkdir(exist_ok=True)
    sheet.save(HERE / name, optimize=True)


if __name__ == "__main__":
    main()
