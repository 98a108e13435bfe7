"""Reduced models in lmms-eval: `--model visiontok_llava_hf --model_args pretrained=...,reducer=vtc_cls,keep=64`.

lmms-eval (0.7) finds `manifests` through the entry point group `lmms_eval.models`; nothing here is imported otherwise.
The model is any image-text model of transformers, and every argument that is not named below is a parameter of the
reducer. Without a reducer the model runs as it is, which is what a reduction should be compared with.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from visiontok.errors import IncompatibleError, MissingDependencyError, ParameterError

MODEL_ID = "visiontok_llava_hf"
CLASSES = {"VisiontokLlavaHf": True, "VisiontokLlavaHfChat": False}
"""The classes that lmms-eval asks this module for, and their `is_simple`: two ways of writing a request."""

_IMAGE = "<image>"
_SCHEDULES = ("r", "keep")
_LONGEST = 1024
_ROLES = {"user": "USER: ", "assistant": "ASSISTANT: "}


class Request(NamedTuple):
    """One request: its place among all, messages as chat templates take them, images, and how to generate."""

    place: int
    messages: list[dict[str, Any]]
    images: list[Any]
    options: dict[str, Any]


def manifests() -> Any:
    """What lmms-eval registers: one model id with a simple and a chat class."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    simple, chat = (f"{__name__}.{name}" for name in CLASSES)
    return ModelManifest(model_id=MODEL_ID, simple_class_path=simple, chat_class_path=chat)


def __getattr__(name: str) -> Any:
    # The classes extend one of lmms-eval's, which is not installed where this package is only imported.
    if name in CLASSES:
        return _build(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _build(name: str) -> type:
    try:
        from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(f"{name} needs lmms-eval: pip install 'visiontok[eval]'") from error
    fields = {"__module__": __name__, "__doc__": ReducedModel.__doc__, "is_simple": CLASSES[name]}
    return type(name, (ReducedModel, lmms), fields)


class ReducedModel:
    """An image-text model of transformers with fewer visual tokens, as lmms-eval calls it.

    Args:
        pretrained: Hub id or directory.
        reducer: Registry name; None leaves the model as it is.
        revision: Of the Hub.
        device: None for the one of accelerate's process.
        dtype: Of the weights, `auto` or a name such as `bfloat16`.
        batch_size: Requests per batch, padded on the left.
        max_batch_size: Passed by lmms-eval, unused.
        device_map, attn_implementation, trust_remote_code: As `from_pretrained` takes them.
        **params: Fields of the reducer, its budget included.

    Raises:
        ParameterError: Parameters without a reducer, or one that the reducer does not have.
    """

    is_simple: bool
    task_dict: Any
    cache_hook: Any

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        reducer: str | None = None,
        revision: str = "main",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 1,
        max_batch_size: int | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        **params: Any,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator
        from transformers import AutoModelForImageTextToText, AutoProcessor

        import visiontok as vt
        from visiontok.bench.mllm_models import Mllm

        if reducer is None and params:
            raise ParameterError(f"model_args {', '.join(params)} need a reducer: reducer=NAME")
        self.accelerator = Accelerator()
        several = self.accelerator.num_processes > 1
        self.device = self.accelerator.device if several or device is None else torch.device(device)
        self._rank, self._world_size = self.accelerator.local_process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        placed = {} if device_map is None else {"device_map": device_map}
        model: Any = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            **placed,
            **options,
        )
        model.eval()
        if device_map is None:
            model = model.to(self.device)
        self.reduction = None if reducer is None else vt.patch(model, reducer, **_arguments(params))
        processor: Any = AutoProcessor.from_pretrained(pretrained, **options)
        self.mllm: Any = Mllm(model, processor)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """The answers, in the order of the requests, as lmms-eval's `GenerationResult`."""
        from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]

        read = self._simple if self.is_simple else self._chat
        found: list[Any] = [None] * len(requests)
        for batch in _batches([read(place, one.args) for place, one in enumerate(requests)], self.batch_size):
            inputs = self._inputs(batch)
            options = batch[0].options
            ids = self.mllm.generate(inputs, **_generation(options))
            lengths = inputs["attention_mask"].sum(1).tolist()
            for request, row, length, text in zip(batch, ids, lengths, self.mllm.texts(ids)):
                text = _cut(text, options.get("until"))
                tokens = TokenCounts(
                    input_tokens=length,
                    output_tokens=int((row != self.mllm.processor.tokenizer.pad_token_id).sum()),
                )
                found[request.place] = GenerationResult(text=text, token_counts=tokens)
                self.cache_hook.add_partial("generate_until", (str(request.messages), options), text)
        return found

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The mean negative log-likelihood of each continuation, and whether it is the greedy one.

        The loss and not the likelihood, as all models of lmms-eval 0.7 return it: its tasks take the smallest.
        """
        found = []
        for context, target, doc_to_visual, doc_id, task, split in (one.args for one in requests):
            document = self.task_dict[task][split][doc_id]
            continuation = target if isinstance(target, str) else target(document)
            images = doc_to_visual(document) or []
            prompt = self._text(_content(context, images))
            inputs = self._encode([prompt + continuation], [images])
            before = self._encode([prompt], [images])["input_ids"].shape[1]
            wanted = inputs["input_ids"][:, before:]
            count = wanted.shape[1]
            if not count:
                raise ParameterError(f"task {task}, document {doc_id}: the continuation {continuation!r} is empty")
            # Counted from the end: fewer tokens stand before it in a reduced prompt.
            logits = self.mllm.model(**inputs).logits[:, -count - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits[0], wanted[0])
            found.append((loss.item(), bool((logits.argmax(-1) == wanted).all())))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not supported.

        Raises:
            IncompatibleError: Always.
        """
        raise IncompatibleError(f"{MODEL_ID} does not run tasks of several rounds.")

    def clean(self) -> None:
        """Frees the model, after a run."""
        del self.mllm
        self.reduction = None
        super().clean()  # pyright: ignore[reportAttributeAccessIssue]

    # ---- parts

    def _simple(self, place: int, args: tuple[Any, ...]) -> Request:
        context, options, doc_to_visual, doc_id, task, split = args
        images = list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])
        return Request(place, _content(context, images), images, dict(options))

    def _chat(self, place: int, args: tuple[Any, ...]) -> Request:
        _, doc_to_messages, options, doc_id, task, split = args
        images: list[Any] = []
        messages = []
        for message in doc_to_messages(self.task_dict[task][split][doc_id]):
            content = []
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(part["url"])
                content.append({"type": "image"} if part["type"] == "image" else dict(part))
            messages.append({"role": message["role"], "content": content})
        return Request(place, messages, images, dict(options))

    def _inputs(self, batch: Sequence[Request]) -> dict[str, Any]:
        return self._encode([self._text(one.messages) for one in batch], [one.images for one in batch])

    def _encode(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        for image in (image for mine in images for image in mine):
            if not hasattr(image, "convert"):
                raise IncompatibleError(f"{MODEL_ID} reads PIL images only, got {type(image).__name__}.")
        pictures = [[image.convert("RGB") for image in mine] for mine in images] if images[0] else None
        encoded = self.mllm.processor(
            images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt"
        )
        return self.mllm.move(encoded)

    def _text(self, messages: list[dict[str, Any]]) -> str:
        processor = self.mllm.processor
        if getattr(processor, "chat_template", None):
            return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The form of LLaVA-1.5: every image on a line of its own, before what follows it.
        lines = []
        for message in messages:
            parts = (
                f"{processor.image_token}\n" if p["type"] == "image" else p.get("text", "") for p in message["content"]
            )
            role = {"user": "USER: ", "assistant": "ASSISTANT: "}.get(message["role"], "")
            lines.append(role + "".join(parts))
        return " ".join([*lines, "ASSISTANT:"])


def _arguments(params: dict[str, Any]) -> dict[str, Any]:
    from visiontok.core.schedule import parse_budget

    return {
        name: parse_budget(value) if name in _SCHEDULES and isinstance(value, str) else value
        for name, value in params.items()
    }


def _content(context: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    texts = context.split(_IMAGE)
    if len(texts) - 1 != len(images):
        # Tasks that do not say where the images stand: all of them first.
        texts = [""] * len(images) + [context.replace(_IMAGE, "")]
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        parts += [{"type": "image"}] * (number > 0)
        text = text.lstrip("\n") if number else text
        parts += [{"type": "text", "text": text}] * bool(text)
    return [{"role": "user", "content": parts}]


def _batches(requests: Iterable[Request], size: int) -> Iterable[list[Request]]:
    """Requests of equal options; those with and without images apart, as processors take all or none."""
    groups: dict[tuple[str, bool], list[Request]] = {}
    for request in requests:
        key = json.dumps(request.options, sort_keys=True, default=str), bool(request.images)
        groups.setdefault(key, []).append(request)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    known = {name: options[name] for name in ("num_beams", "top_p", "top_k") if options.get(name) is not None}
    temperature = options.get("temperature") or 0
    if temperature > 0:
        known |= {"do_sample": True, "temperature": temperature}
    return {"max_new_tokens": options.get("max_new_tokens") or _LONGEST} | known


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    stops = [until] if isinstance(until, str) else until or ()
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text
