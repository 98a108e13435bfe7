"""Prompts for the tiny families, and what a patched model should compute: the plain model with columns masked."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel

import visiontok as vt
from visiontok.backbones.hf_decoder import stack_of
from visiontok.backbones.hf_mllm_examples import IMAGE, examples, prompt
from visiontok.core import patching
from visiontok.core.signals import Site
from visiontok.ops.anyres import valid_area

FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl")
# transformers 5.24 gave the argument another name.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
P = None  # A picture among the ids of a row.
MIXED: list[list[int | None]] = [[1, 5, P, 6, 7, P, 8], [1, 9, 10], [1, P, 11, 12, 13]]
PAIR: list[list[int | None]] = [[1, 5, P, 6, 7, 8], [1, 9, P, 10]]
ONE: list[list[int | None]] = [[1, 5, P, 6, 7, 8]]
# Ends of text, and ids that would read as pictures: no model here may say them.
SILENT = [2, 95, 96, 97, IMAGE]


@functools.cache
def _made() -> dict[str, tuple[Any, Any]]:
    return examples()


def model_of(name: str) -> Any:
    """The family's model; tests give it back unpatched, also if they fail."""
    model = _made()[name][0]
    if any(patching.ATTRIBUTE in vars(module) for module in model.modules()):
        vt.unpatch(model)
    return model


def copy_of(name: str) -> Any:
    """One of the test's own."""
    return copy.deepcopy(model_of(name))


def fresh_copy_of(name: str) -> Any:
    """One that never ran."""
    model = model_of(name)
    made = type(model)(copy.deepcopy(model.config)).eval()
    made.load_state_dict(model.state_dict())
    return made


def planar(name: str) -> bool:
    return name.startswith("qwen")


def ask(name: str, rows: Sequence[Sequence[int | None]] = PAIR, seed: int = 1) -> dict[str, Any]:
    """Arguments of a forward: rows of ids, with pictures of several sizes where the family has such."""
    count = sum(row.count(P) for row in rows)
    lengths, pictures = _pictures(name, count, seed)
    left = iter(lengths)
    frame = ([95], [96]) if planar(name) else ([], [])
    full = []
    for row in rows:
        ids: list[int] = []
        for item in row:
            ids += [item] if item is not None else [*frame[0], *[IMAGE] * next(left), *frame[1]]
        full.append(ids)
    given: dict[str, Any] = prompt(full, **pictures)
    if planar(name):
        given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return given


def _pictures(name: str, count: int, seed: int) -> tuple[list[int], dict[str, Tensor]]:
    noise = torch.Generator().manual_seed(seed)
    if count == 0:
        return [], {}
    if name in ("llava", "internvl"):
        each = 64 if name == "llava" else 16
        return [each] * count, {"pixel_values": torch.randn(count, 3, 32, 32, generator=noise)}
    if planar(name):
        grids = [((8, 8), (8, 12), (4, 8))[i % 3] for i in range(count)]
        pixels = torch.randn(sum(h * w for h, w in grids), 96, generator=noise)
        return [h * w // 4 for h, w in grids], {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, h, w] for h, w in grids]),
        }
    sizes = [((50, 60), (32, 60))[i % 2] for i in range(count)]
    lengths = []
    for size in sizes:
        top, bottom, left, right = valid_area(size, (16, 16) if size[0] > 32 else (8, 16))
        lengths.append(64 + (bottom - top) * (right - left + 1))
    pixels = torch.randn(count, 5, 3, 32, 32, generator=noise)
    for i, size in enumerate(sizes):
        pixels[i, 5 if size[0] > 32 else 3 :] = 0
    return lengths, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def alone(name: str, rows: Sequence[Sequence[int | None]], given: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a batch as prompts of their own, without padding."""
    out, first = [], 0
    for b, row in enumerate(rows):
        live = given["attention_mask"][b].bool()
        one = {n: given[n][b : b + 1, live] for n in ("input_ids", "attention_mask", "mm_token_type_ids") if n in given}
        count = row.count(P)
        for key in ("image_sizes", "image_grid_thw", "pixel_values"):
            if count and key in given:
                one[key] = given[key][first : first + count]
        if count and planar(name):
            ends = given["image_grid_thw"].prod(1).cumsum(0).tolist()
            one["pixel_values"] = given["pixel_values"][([0, *ends])[first] : ends[first + count - 1]]
        first += count
        out.append(one)
    return out


def grown(given: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A prompt with (B, t) further tokens."""
    ones = torch.ones_like(tokens)
    more = {"input_ids": tokens, "attention_mask": ones, "mm_token_type_ids": ones * 0, "labels": tokens}
    return {**given, **{n: torch.cat((given[n], more[n].to(given[n])), dim=1) for n in more if n in given}}


def greedy(step: Any, given: dict[str, Any], count: int) -> Tensor:
    """(B, L + count) ids: `step` gives the (B, V) logits of the next token of a prompt."""
    for _ in range(count):
        logits = step(given).clone()
        logits[:, SILENT] = -torch.inf
        given = grown(given, logits.argmax(dim=1, keepdim=True))
    return given["input_ids"]


def generated(model: Any, given: dict[str, Any], count: int = 5, **more: Any) -> Any:
    """What the model says after a prompt, of a fixed length."""
    more = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "suppress_tokens": SILENT, **more}
    return model.generate(**given, **more)


# ---- the plain model with columns masked


class Seen:
    """Which columns of the full prompt every decoder layer of a patched model sees, read from its trace.

    Attributes:
        live: Per layer (B, L) bool.
        heads: Per layer (B, Hkv, L) bool, what of the prompt the tokens after it see; only where a cache was evicted.
        counted: Per layer (B, L) bool whose running count makes the positions; None keeps the host's.
        later: Per layer (B,) entries that tokens after the prompt count from.
    """

    def __init__(self, red: Any, given: dict[str, Any], planes: bool) -> None:
        mask = given["attention_mask"].bool()
        self.length, depth = mask.shape[1], red.plan.decoder
        self.live, self.heads = [mask] * depth, {}
        self.counted: list[Any] = [None if planes else mask] * depth
        self.later: dict[int, Tensor] = {}
        spans = runs(given["input_ids"])
        whole = torch.arange(self.length).expand(mask.shape)
        tokens = [whole] * depth
        live = mask
        for seen in red.trace:
            if seen.site in (Site.POST, Site.EMBED):
                spans = [(b, columns[kept]) for (b, columns), kept in zip(spans, seen.kept)]
                start, stop = 0, red.prompt
            elif seen.site is Site.LLM:
                spans = [(b, tokens[seen.layer][b][kept]) for (b, _), kept in zip(spans, seen.kept)]
                start, stop = seen.layer, red.stages[seen.layer]
            else:
                self._evicted(seen, red.evictions[seen.layer], tokens[seen.layer], given["input_ids"], planes)
                continue
            live = mask & (given["input_ids"] != IMAGE)
            for b, columns in spans:
                live[b, columns] = True
            self.live[start:] = [live] * (depth - start)
            tokens[start:] = [_packed(live)] * (depth - start)
            if stop.reducer.positions == "compact" and not planes:
                self.counted[start:] = [live] * (depth - start)

    def _evicted(self, seen: Any, stop: Any, tokens: Tensor, ids: Tensor, planes: bool) -> None:
        live = self.live[seen.layer]
        others = live & (ids != IMAGE) if stop.reducer.over == "visual" else torch.zeros_like(live)
        rows = others[:, None].repeat(1, seen.kept[0].shape[0], 1)
        for b in range(rows.shape[0]):
            for h in range(rows.shape[1]):
                rows[b, h, tokens[b][seen.kept[b][h]]] = True
        self.heads[seen.layer] = rows
        if stop.reducer.positions == "compact" and not planes:
            self.later[seen.layer] = rows[:, 0].sum(dim=1)

    def mask(self, layer: int, total: int, groups: int) -> Tensor:
        """(B, H, L, L) bool: what each column sees."""
        live = _tail(self.live[layer], total)
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        sees = (causal & live[:, None]).unsqueeze(1)
        if layer in self.heads:
            later = _tail(self.heads[layer].repeat_interleave(groups, 1), total)
            new = (torch.arange(total) >= self.length).view(-1, 1)
            sees = torch.where(new, causal & later.unsqueeze(2), sees)
        return sees | torch.eye(total, dtype=torch.bool)

    def places(self, layer: int, total: int) -> Tensor | None:
        """(B, L) positions, None for the host's own."""
        if self.counted[layer] is None:
            return None
        places = (_tail(self.counted[layer], total).long().cumsum(1) - 1).clamp_min(0)
        if layer in self.later:
            new = torch.arange(total - self.length)
            places[:, self.length :] = self.later[layer][:, None] + new
        return places


def _tail(live: Tensor, total: int) -> Tensor:
    return torch.nn.functional.pad(live, (0, total - live.shape[-1]), value=True)


def _packed(live: Tensor) -> Tensor:
    """(B, L') columns, padded on the left."""
    rows = [row.nonzero().squeeze(1) for row in live]
    longest = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])


def runs(ids: Tensor) -> list[tuple[int, Tensor]]:
    """Row and columns of every picture."""
    found = []
    for b, row in enumerate((ids == IMAGE).tolist()):
        start = None
        for i, hit in enumerate([*row, False]):
            if hit and start is None:
                start = i
            elif not hit and start is not None:
                found.append((b, torch.arange(start, i)))
                start = None
    return found


def watch(red: Any, given: dict[str, Any], name: str) -> Seen:
    """What the model that was just run with `trace=True` left visible."""
    return Seen(red, given, planar(name))


@contextlib.contextmanager
def masking(model: Any, seen: Seen, total: int) -> Iterator[None]:
    """Runs the decoder of a plain model under the masks and positions of `seen`."""
    stack = stack_of(model)
    groups = stack.config.num_attention_heads // stack.config.num_key_value_heads

    def hook(layer: int) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            places = seen.places(layer, total)
            kwargs = {**kwargs, "attention_mask": seen.mask(layer, total, groups)}
            if places is not None:
                kwargs["position_embeddings"] = stack.rotary_emb(x, position_ids=places)
            return args, kwargs

        return before

    handles = [m.register_forward_pre_hook(hook(i), with_kwargs=True) for i, m in enumerate(stack.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked(model: Any, seen: Seen, given: dict[str, Any]) -> Tensor:
    """(B, L, V) logits of a plain model that does not see what `seen` does not; garbage at dropped columns."""
    with torch.no_grad(), masking(model, seen, given["input_ids"].shape[1]):
        return model(**given, use_cache=False).logits


def assert_same_rows(short: Tensor, full: Tensor, live: Tensor, atol: float = 1e-4) -> None:
    """Live rows of logits padded on the left equal those of the full prompt at live columns."""
    for b in range(len(full)):
        own = full[b][live[b]]
        torch.testing.assert_close(short[b, short.shape[1] - len(own) :], own, atol=atol, rtol=1e-4)


# ---- who acts

# Of each place one method, with a real budget.
ACTS: dict[str, tuple[str, dict[str, Any]]] = {
    "post": ("vtc_cls", {"keep": 0.3}),
    "embed": ("divprune", {"keep": 0.4}),
    "llm": ("fastv", {"k": 2, "ratio": 0.6}),
    "kv": ("h2o", {"keep": 0.5}),
}


def act(place: str, **more: Any) -> vt.Reducer:
    """The method of a place."""
    name, params = ACTS[place]
    return vt.reducers.create(name, **{**params, **more})
