"""Zero-shot classification: class embeddings as open_clip makes them, templates, class names, clip models by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

open_clip = pytest.importorskip("open_clip")

from visiontok.bench import clip_models, zeroshot  # noqa: E402
from visiontok.bench.accuracy import predict  # noqa: E402
from visiontok.bench.data import Batch  # noqa: E402
from visiontok.errors import FormatError, ParameterError, UnknownNameError  # noqa: E402


@pytest.fixture(scope="module")
def tiny() -> clip_models.ClipModel:
    return clip_models.load("tiny_clip")


@pytest.mark.parametrize("source", ["openai", "simple"])
def test_class_embeddings_are_open_clips(source: str, tiny: clip_models.ClipModel) -> None:
    names = ["red three", "big blue one", "seven"]
    templates = zeroshot.load_templates(source)
    assert len(templates) == {"openai": 80, "simple": 7}[source]
    theirs = open_clip.build_zero_shot_classifier(tiny.model, tiny.tokenizer, names, templates)  # pyright: ignore
    mine = zeroshot.class_embeddings(lambda texts: tiny.encode_tokens(tiny.tokens(texts)), names, templates, 50)
    torch.testing.assert_close(mine, theirs.T, rtol=0, atol=1e-6)


def test_class_embeddings_average_normalized_prompts() -> None:
    vectors = {"a x": [3.0, 0.0], "b x": [0.0, 0.5], "a y": [1.0, 1.0], "b y": [1.0, 1.0]}
    templates = [zeroshot.from_text("a {}"), zeroshot.from_text("b {c}")]
    found = zeroshot.class_embeddings(lambda texts: torch.tensor([vectors[t] for t in texts]), ["x", "y"], templates, 3)
    torch.testing.assert_close(found, torch.full((2, 2), 0.5).sqrt())


def test_scores_are_cosines_in_float32() -> None:
    classes = torch.eye(3)
    images = torch.tensor([[0.0, 0.0, 1e-3], [5.0, 1.0, 0.0]], dtype=torch.bfloat16)
    found = predict(zeroshot.scores(lambda x: x, classes), [Batch(images, torch.tensor([2, 1]))], lambda x: x)
    assert found.ranked[:, 0].tolist() == [2, 0]
    assert zeroshot.scores(lambda x: x, classes)(images).dtype == torch.float32
    with pytest.raises(ParameterError, match="not finite"):
        zeroshot.scores(lambda x: x * float("nan"), classes)(images)


def test_templates_of_a_file_are_text_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a {} at {0} %s.\n\n  the {c}\n")
    assert [template("d{c}g") for template in zeroshot.load_templates(str(path))] == ["a d{c}g at {0} %s.", "the d{c}g"]
    for text, message in (
        ("a dog\n", r"template 1: 'a dog' needs the class name once"),
        ("{} {}", "once"),
        ("", "empty"),
    ):
        path.write_text(text)
        with pytest.raises(FormatError, match=message):
            zeroshot.load_templates(str(path))
    with pytest.raises(ParameterError, match="--templates 'opena' is no file; built in: openai, simple"):
        zeroshot.load_templates("opena")


def test_class_names(tmp_path: Path) -> None:
    assert zeroshot.class_names(["golden_retriever", "tabby"]) == ["golden retriever", "tabby"]
    synsets = [f"n{number:08d}" for number in range(1000)]
    assert zeroshot.class_names(synsets) == list(open_clip.IMAGENET_CLASSNAMES)
    with pytest.raises(ParameterError, match="named by synset.*--class-names"):
        zeroshot.class_names(synsets[:10])
    path = tmp_path / "names"
    for text in ("dog\ncat\n", json.dumps(["dog", "cat"]), "[\n 'dog'\n]"):
        path.write_text(text)
        if "'" in text:
            with pytest.raises(FormatError, match="no JSON list"):
                zeroshot.class_names(["a", "b"], str(path))
        else:
            assert zeroshot.class_names(["a", "b"], str(path)) == ["dog", "cat"]
    for text, message in (
        ('["dog"]', "1 class names for 2"),
        ('["dog", 3]', "lines of text"),
        ('{"a": "dog"}', "lines"),
    ):
        path.write_text(text)
        with pytest.raises(FormatError, match=message):
            zeroshot.class_names(["a", "b"], str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not UTF-8"):
        zeroshot.class_names(["a", "b"], str(path))


# ---- models by name


def test_a_directory_of_open_clip_loads_its_config_tokenizer_and_size(tmp_path: Path) -> None:
    config = {"model_cfg": small_config(), "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.model.CLIP(**small_config())
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    found = clip_models.load(f"local-dir:{tmp_path}")
    assert found.input_size == (3, 32, 32)
    assert not found.random
    images, tokens = torch.randn(2, 3, 32, 32), found.tokens(["a dog"])
    model.eval()
    torch.testing.assert_close(found.encode_images(images), model.encode_image(images))
    torch.testing.assert_close(found.encode_tokens(tokens), model.encode_text(tokens["text"]))
    # The same weights as a checkpoint of a training run, into the same architecture with others.
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "c.pt")
    with torch.no_grad():
        model.logit_scale.add_(1)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    again = clip_models.load(f"local-dir:{tmp_path}", checkpoint=tmp_path / "c.pt")
    torch.testing.assert_close(again.encode_images(images), found.encode_images(images))
    torch.testing.assert_close(again.model.logit_scale, found.model.logit_scale)
    with pytest.raises(FormatError, match="does not fit CLIP"):
        clip_models.load("tiny_clip", checkpoint=tmp_path / "c.pt")


def small_config() -> dict:
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}


def test_a_hugging_face_directory_loads_offline_and_encodes_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {word: number for number, word in enumerate(["<pad>", "dog</w>", "cat</w>", "<start>", "<end>"])}
    text = {
        **shape,
        "vocab_size": 5,
        "max_position_embeddings": 8,
        "bos_token_id": 3,
        "eos_token_id": 4,
        "pad_token_id": 0,
    }
    vision = {**shape, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_level({"<pad>": 0, "dog": 1, "cat": 2, "<start>": 3, "<end>": 4}), pad_token="<pad>"
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path)

    found = clip_models.load(f"hf:{tmp_path}")
    assert (found.input_size, found.random) == ((3, 32, 32), False)
    tokens = found.tokens(["dog cat", "dog"])
    assert tokens["input_ids"].shape == (2, 8)
    images = torch.randn(2, 3, 32, 32)
    out = model(pixel_values=images, **tokens)
    torch.testing.assert_close(zeroshot.unit(found.encode_images(images)), out.image_embeds)
    torch.testing.assert_close(zeroshot.unit(found.encode_tokens(tokens)), out.text_embeds)
    from PIL import Image

    assert found.transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    with pytest.raises(ParameterError, match="leave out --img-size"):
        clip_models.load(f"hf:{tmp_path}", input_size=(3, 64, 64))


def word_level(words: dict[str, int]) -> object:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="cat"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = tokenizers.processors.TemplateProcessing
    tokenizer.post_processor = template(single="<start> $A <end>", special_tokens=[("<start>", 3), ("<end>", 4)])
    return tokenizer


def test_models_that_are_not_there() -> None:
    for name, kind, message in (
        ("ViT-B-33", UnknownNameError, "unknown model 'ViT-B-33'.*hf:PATH"),
        ("hf:/nowhere", ParameterError, "'/nowhere' is no directory.*nothing is downloaded"),
    ):
        with pytest.raises(kind, match=message):
            clip_models.load(name)
    for pretrained, message in ((True, "--pretrained needs a tag; open_clip has: openai"), ("x", "no weights 'x'")):
        with pytest.raises(UnknownNameError, match=message):
            clip_models.load("ViT-B-32", pretrained=pretrained)
    with pytest.raises(ParameterError, match=r"takes \(3, 64, 64\) images only"):
        clip_models.load("tiny_clip", input_size=(3, 32, 32))
