"""Models that answer questions about images: the embedded one, and Hugging Face directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from visiontok.errors import FormatError, MissingDependencyError, ParameterError, UnknownNameError
from visiontok.models.tiny_llava import NAME as DEFAULT_MLLM

HF_PREFIX = "hf:"
PLAIN_PROMPT = "USER: {image}\n{question} ASSISTANT:"
"""What LLaVA-1.5 reads; for processors without a chat template, such as the embedded one."""

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Mllm:
    """A multimodal language model of transformers, and how its inputs are made.

    Attributes:
        model: The whole model, in eval mode; what `visiontok.patch` is given.
        processor: Its processor, which pads on the left.
    """

    model: nn.Module
    processor: Any

    def around(self, model: nn.Module) -> Mllm:
        """The same with another model of this kind, such as a patched copy."""
        return replace(self, model=model)

    def prompt(self, question: str) -> str:
        """The text of a question about one image, up to where the answer begins.

        Raises:
            ParameterError: The processor has neither a chat template nor an image token.
        """
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        token = getattr(self.processor, "image_token", None)
        if token is None:
            raise ParameterError(
                f"{type(self.processor).__name__} has neither a chat template nor an image token; "
                "save a processor with a chat template beside the model"
            )
        return PLAIN_PROMPT.format(image=token, question=question)

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Inputs:
        """Inputs of `generate` for as many images as questions, shorter prompts padded on the left."""
        texts = [self.prompt(question) for question in questions]
        return self.processor(
            images=[[image] for image in images], text=texts, padding=True, padding_side="left", return_tensors="pt"
        )

    def move(self, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs on the device of the model; those with a fraction in its dtype."""
        parameter = next(self.model.parameters())
        return {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    @torch.inference_mode()
    def generate(self, inputs: Inputs, **options: Any) -> Tensor:
        """`(B, new)` ids of greedily generated tokens, without the prompt.

        Args:
            inputs: On the model's device.
            **options: For transformers' `generate`.
        """
        model: Any = self.model
        quiet = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        if getattr(model.generation_config, "pad_token_id", None) is None:
            quiet["pad_token_id"] = self.processor.tokenizer.pad_token_id
        ids = model.generate(**inputs, **(quiet | options))
        return ids[:, inputs["input_ids"].shape[1] :]

    def texts(self, ids: Tensor) -> list[str]:
        """Generated ids as text, special tokens left out."""
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


def canonical(name: str) -> str:
    """`tiny-llava` under its own name; other names as they are."""
    return name.replace("-", "_") if name.replace("-", "_") == DEFAULT_MLLM else name


def is_mllm(name: str) -> bool:
    """Whether `load` is for this name: the embedded model's, or one with `hf:`."""
    return canonical(name) == DEFAULT_MLLM or name.startswith(HF_PREFIX)


def load(name: str, *, dtype: torch.dtype = torch.float32) -> Mllm:
    """Builds a model in eval mode.

    Args:
        name: `tiny_llava` (embedded and trained), or `hf:PATH`, a directory that transformers saved.
        dtype: Of the weights.

    Raises:
        UnknownNameError: No such model.
        ParameterError: There is no such directory.
        FormatError: The directory does not hold a model that answers questions about images.
        MissingDependencyError: transformers is not installed.
    """
    name = canonical(name)
    if name == DEFAULT_MLLM:
        from visiontok.models.tiny_llava import tiny_llava, tiny_processor

        return Mllm(tiny_llava().to(dtype), tiny_processor())
    if not name.startswith(HF_PREFIX):
        raise UnknownNameError(
            f"unknown multimodal model '{name}'. Known: {DEFAULT_MLLM}, and {HF_PREFIX}PATH, a directory that "
            "transformers saved"
        )
    path = Path(name.removeprefix(HF_PREFIX)).expanduser()
    if not path.is_dir():
        raise ParameterError(
            f"'{path}' is no directory; {HF_PREFIX}PATH names one that transformers saved, nothing is downloaded "
            "(fetch it with `hf download`)"
        )
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise MissingDependencyError(f"model '{name}' needs transformers: pip install 'visiontok[mllm]'") from error
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(path, local_files_only=True, dtype=dtype)
        processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise FormatError(f"transformers cannot load '{path}': {' '.join(str(error).split())[:400]}") from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise FormatError(f"'{path}' has no processor of images and text: {type(processor).__name__}")
    return Mllm(model.eval(), processor)
