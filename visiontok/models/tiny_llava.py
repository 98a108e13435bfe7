"""A small trained LLaVA, so that multimodal reduction runs offline with real answers.

`tiny_llava` is transformers' own `LlavaForConditionalGeneration`: a CLIP tower of 6 layers on 64 patches and a class
token, and a Llama of 4 layers with grouped-query attention. `tiny_processor` is its `LlavaProcessor` with words as
tokens. `benchmarks/train_tiny_llava.py` trained it on `visiontok.bench.questions`; nothing in the training knows of
token reduction. The file holds the weights (fp16) and, as metadata, vocabulary, a checksum of the weights and how it
was made: `tiny_llava_info`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visiontok.errors import FormatError, MissingDependencyError
from visiontok.models.tiny import METADATA_KEY, WEIGHTS_DIR, MissingWeightsError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

NAME = "tiny_llava"
INPUT_SIZE = (3, 64, 64)
MEAN = STD = (0.5, 0.5, 0.5)
PATCH = 8
PROMPT = "USER: <image>\n{} ASSISTANT:"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
"""The first ids, in this order."""

_FRAME = ("user", "assistant", ":")


def tiny_llava(pretrained: bool = True) -> nn.Module:
    """The shipped model: `LlavaForConditionalGeneration` of 6 visual layers (65 tokens) and 4 Llama layers, 96 wide.

    Args:
        pretrained: Load the shipped weights; otherwise transformers' random initialization.

    Returns:
        The model in eval mode and fp32. It answers prompts of the form `PROMPT`, greedily.

    Raises:
        MissingDependencyError: transformers is not installed.
        FormatError, MissingWeightsError: The shipped file is broken or not there.
    """
    try:
        from transformers import LlavaConfig, LlavaForConditionalGeneration
    except ImportError as error:
        raise _missing() from error

    model: Any = LlavaForConditionalGeneration(LlavaConfig(**configuration(vocabulary(pretrained))))
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 4
    if pretrained:
        _load(model)
    return model.eval()


def tiny_processor(pretrained: bool = True) -> Any:
    """The `LlavaProcessor` of `tiny_llava`: images of any size and mode, words as tokens, padding on the left.

    Args:
        pretrained: Take the vocabulary of the shipped file; otherwise today's words of the questions.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        from transformers import LlavaProcessor, PreTrainedTokenizerFast
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError as error:
        raise _missing() from error

    words: Any = {word: number for number, word in enumerate(vocabulary(pretrained))}
    split: Any = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    pad, start, end, unknown, image = SPECIAL
    core: Any = Tokenizer(models.WordLevel(words, unk_token=unknown))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(split)
    core.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, words[start])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
        padding_side="left",
        extra_special_tokens={"image_token": image},
    )
    pictures = CLIPImageProcessorPil(
        size={"height": INPUT_SIZE[1], "width": INPUT_SIZE[2]}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def vocabulary(pretrained: bool = True) -> tuple[str, ...]:
    """Tokens in the order of their ids: those of the shipped file, or of today's questions."""
    if pretrained:
        return tuple(tiny_llava_info()["vocabulary"])
    from visiontok.bench.questions import vocabulary as words

    return (*SPECIAL, *_FRAME, *words())


def configuration(tokens: Sequence[str]) -> dict[str, Any]:
    """Arguments of transformers' `LlavaConfig`, in plain values."""
    return {
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": INPUT_SIZE[1],
            "patch_size": PATCH,
            "projection_dim": 96,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": len(tokens),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "pad_token_id": SPECIAL.index("<pad>"),
            "bos_token_id": SPECIAL.index("<s>"),
            "eos_token_id": SPECIAL.index("</s>"),
        },
        "image_token_index": SPECIAL.index("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def tiny_llava_path() -> Path:
    """Where the weights are shipped."""
    return WEIGHTS_DIR / f"{NAME}_questions.safetensors"


def tiny_llava_info() -> dict[str, Any]:
    """Configuration, vocabulary, checksum, training command, seed, measured accuracy, versions, data source."""
    from safetensors import SafetensorError, safe_open

    path = tiny_llava_path()
    if not path.is_file():
        raise MissingWeightsError(
            f"the weights of {NAME} are not at {path}, where the package ships them. Reinstall visiontok or train "
            f"them with `python benchmarks/train_tiny_llava.py --out {path}`."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[METADATA_KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        raise _broken(str(error)) from error


def checksum(state: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and bytes of tensors, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _load(model: nn.Module) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(tiny_llava_path())
        if checksum(state) != tiny_llava_info()["sha256"]:
            raise _broken("the checksum of the weights differs")
        model.load_state_dict(state, strict=True)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise _broken(str(error)) from error


def _broken(reason: str) -> FormatError:
    return FormatError(f"{tiny_llava_path()} does not hold the weights of {NAME}; reinstall visiontok. {reason}")


def _missing() -> MissingDependencyError:
    return MissingDependencyError(
        "tiny_llava is built by transformers, which is not installed: pip install 'visiontok[mllm]'"
    )
