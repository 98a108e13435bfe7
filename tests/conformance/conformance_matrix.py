"""What the conformance tests run on: every reducer of the registry times every backbone variant that fits it.

Encoders and multimodal language models are matrices apart: see `cases` and `multimodal_cases`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import visiontok as vt
from visiontok import backbones, reducers
from visiontok.core.multimodal import MultimodalBackbone
from visiontok.core.reducer import Build, Reducer
from visiontok.core.reduction import Reduction
from visiontok.core.signals import Site
from visiontok.core.visual import Crops, PromptReducer, Text
from visiontok.ops.attention import Votes
from visiontok.ops.receiving import Received

BUDGETS: tuple[dict[str, Any], ...] = ({"r": 2}, {"keep": 0.7})
# Where reducers of multimodal language models act.
VISUAL = frozenset({Site.POST, Site.EMBED, Site.LLM, Site.KV})


class Variant(NamedTuple):
    """One example model of one backbone."""

    backbone: str
    name: str

    def __str__(self) -> str:
        return f"{self.backbone}.{self.name}"


class Case(NamedTuple):
    """One reducer on one example model."""

    reducer: str
    variant: Variant

    def __str__(self) -> str:
        return f"{self.reducer}-{self.variant}"

    @property
    def model(self) -> nn.Module:
        """The shared example: patch it only inside `with vt.patched`."""
        return example(self.variant)[0]

    @property
    def inputs(self) -> Any:
        return example(self.variant)[1]

    def budgets(self) -> list[dict[str, Any]]:
        """The default budgets that this reducer takes; `{}` if its own parameters are its budget."""
        return budgets(self.reducer)

    @contextmanager
    def patched(self, double: bool = False, **options: Any) -> Iterator[Reduction]:
        """The model, patched with the first default budget and a trace unless `options` say otherwise."""
        model = copy.deepcopy(self.model).double() if double else self.model
        given = {
            "trace": True,
            **({} if set(options) & set(budget_names(self.reducer)) else self.budgets()[0]),
            **options,
        }
        with vt.patched(model, self.reducer, **given) as red:
            yield red


def budget_names(name: str) -> tuple[str, ...]:
    """Names of the budgets that a reducer takes."""
    return reducers.registry.get(name).budget_names


def settings_of(name: str) -> list[dict[str, Any]]:
    """The default parameters, and each switch of the method turned over."""
    cls = reducers.registry.get(name)
    flips: list[dict[str, Any]] = []
    for field in dataclasses.fields(cls):
        kinds = str(field.type)
        if field.default in (True, False) and isinstance(field.default, bool):
            flips.append({field.name: not field.default})
        elif kinds.startswith("bool | None"):
            flips += [{field.name: True}, {field.name: False}]
    return [{}, {"compat": "official"}, *flips]


def budgets(name: str) -> list[dict[str, Any]]:
    """See `Case.budgets`."""
    known = budget_names(name)
    return [budget for budget in BUDGETS if set(budget) <= set(known)] or [{}]


def encoder_reducers() -> list[str]:
    """Names of the reducers that have a place in an encoder."""
    return [name for name in vt.list_reducers() if reducers.create(name).site not in VISUAL]


def encoder_backbones() -> list[str]:
    """Names of the backbones that are no multimodal language models."""
    return [name for name in vt.list_backbones() if not issubclass(backbones.registry.get(name), MultimodalBackbone)]


@functools.cache
def _examples(backbone: str) -> dict[str, tuple[nn.Module, Any]]:
    return backbones.registry.get(backbone)().examples()


def example(variant: Variant) -> tuple[nn.Module, Any]:
    """Model and inputs of a variant; made once per process."""
    return _examples(variant.backbone)[variant.name]


@functools.cache
def cases() -> tuple[tuple[Case, str], ...]:
    """Every case of an encoder that `supports` says fits, and what the default run takes.

    `all` of each reducer on one backbone, and of each backbone with one reducer; what is `quick` of each reducer on two
    backbones, and of each backbone with three reducers; in `brief`, each variant that is not among these with one
    reducer; `none` of the rest.
    """
    names = encoder_reducers()
    fits = {
        backbone: {
            variant: [name for name in names if vt.supports(name, example(variant)[0])]
            for variant in (Variant(backbone, key) for key in _examples(backbone))
        }
        for backbone in encoder_backbones()
    }
    chosen: set[tuple[str, Variant]] = set()
    homed: set[tuple[str, Variant]] = set()
    brief: set[tuple[str, Variant]] = set()
    for place, name in enumerate(names):
        homes = [(backbone, [v for v, fitting in table.items() if name in fitting]) for backbone, table in fits.items()]
        homes = [(backbone, variants) for backbone, variants in homes if variants]
        # The start rotates, so that the default run meets many variants and all backbones.
        for turn in range(min(2, len(homes))):
            variants = homes[(place + turn) % len(homes)][1]
            chosen.add((name, variants[place % len(variants)]))
            homed |= set() if turn else {(name, variants[place % len(variants)])}
    for table in fits.values():
        first = next(iter(table))
        have = {name for name, at in chosen if at in table}
        chosen |= {(name, first) for name in [n for n in table[first] if n not in have][: max(0, 3 - len(have))]}
        if not any(at in table for _, at in homed):
            homed.add(min(pair for pair in chosen if pair[1] in table))
        for row, (variant, fitting) in enumerate(table.items()):
            missing = not any(at == variant for _, at in chosen)
            brief |= {(fitting[row % len(fitting)], variant)} if missing and fitting else set()
    every = [(name, variant) for table in fits.values() for variant, fitting in table.items() for name in fitting]
    level = {**dict.fromkeys(brief, "brief"), **dict.fromkeys(chosen, "quick"), **dict.fromkeys(homed, "all")}
    return tuple((Case(*pair), level.get(pair, "none")) for pair in every)


@functools.cache
def multimodal_cases() -> tuple[tuple[Case, str], ...]:
    """Every case of a multimodal language model that `supports` says fits, and what the default run takes; see `cases`.

    It takes all of three reducers on each variant, one for each stage of the model, and in brief all reducers on the
    first variant of each backbone.
    """
    found: list[tuple[Case, str]] = []
    for backbone in sorted(set(vt.list_backbones()) - set(encoder_backbones())):
        for row, key in enumerate(_examples(backbone)):
            variant = Variant(backbone, key)
            fitting = [name for name in vt.list_reducers() if vt.supports(name, example(variant)[0])]
            groups = [[n for n in fitting if reducers.create(n).site in sites] for sites in _STAGES]
            chosen = {group[row % len(group)] for group in groups if group}
            other = "none" if row else "brief"
            found += [(Case(name, variant), "all" if name in chosen else other) for name in fitting]
    return tuple(found)


_STAGES = ((Site.POST, Site.EMBED), (Site.LLM,), (Site.KV,))


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Tensors of one forward without gradients."""
    with torch.no_grad():
        return outputs(model, inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Tensors of one forward."""
    out = (
        model(*inputs) if isinstance(inputs, tuple) else model(**inputs) if isinstance(inputs, dict) else model(inputs)
    )
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def rows(tree: Any, index: list[int]) -> Any:
    """The samples of a batch given by index."""
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tree)


def widened(tree: Any) -> Any:
    """Floating tensors in double precision."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def batch(case: Case, size: int) -> Any:
    """A batch of `size` different samples in double precision."""
    noise = torch.Generator().manual_seed(11)

    def vary(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        picked = leaf[[i % leaf.shape[0] for i in range(size)]]
        if not leaf.is_floating_point():
            return picked
        return picked.double() + torch.randn(picked.shape, generator=noise, dtype=torch.float64)

    return tree_map(vary, case.inputs)


def poisoned(tree: Any) -> Any:
    """The same batch with NaN in every floating entry of sample 0."""

    def poison(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        leaf = leaf.clone()
        leaf[0] = float("nan")
        return leaf

    return tree_map(poison, tree)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit-equal, NaN included."""
    return len(a) == len(b) and all(torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)) for x, y in zip(a, b))


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def make_module(reducer: Reducer, layer: int, patches: int, prefix: int, removed: int, dtype: torch.dtype) -> Any:
    """The learned part of a point over the tokens that `make_signal` makes, or None."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        build = Build(
            reducer.site, layer, 4, 8, 2, patches, patches - removed, prefix, class_token=torch.zeros(1, 1, 8)
        )
        module = reducer.modules(build)
    return None if module is None else module.to(dtype).eval().requires_grad_(False)


def make_signal(name: str, batch: int, tokens: int, prefix: int, grid: tuple[int, int], dtype: torch.dtype) -> Any:
    """A random signal of the shape that ARCHITECTURE §3 gives it."""
    noise = torch.Generator().manual_seed(tokens * 131 + prefix * 17 + len(name))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64).to(dtype)

    makers: dict[str, Any] = {
        "HIDDEN": lambda: draw(batch, tokens, 8),
        "QUERY": lambda: draw(batch, 2, tokens, 4),
        "KEY": lambda: draw(batch, 2, tokens, 4),
        "VALUE": lambda: draw(batch, 2, tokens, 4),
        "QUERY_PREFIX": lambda: draw(batch, 2, prefix, 4),
        "ATTN_PREFIX": lambda: draw(batch, 2, prefix, tokens).softmax(dim=-1),
        "ATTN_LAST": lambda: draw(batch, 2, 1, tokens).softmax(dim=-1),
        "ATTN": lambda: draw(batch, 2, tokens, tokens).softmax(dim=-1),
        "ATTN_VOTE": lambda: Votes(draw(batch, 2, tokens, 4), draw(batch, 2, tokens, 4), 0.5),
        "GRID": lambda: grid,
    }
    if name not in makers:
        pytest.fail(f"conformance cannot make the signal {name} yet; add it to make_signal in {__file__}.")
    return makers[name]()


class VisualAsk(NamedTuple):
    """One question to a reducer of a multimodal model: its signals, state and the tokens that its map is applied to."""

    signals: dict[str, Any]
    state: vt.TokenState
    x: Tensor

    def rows(self, index: list[int]) -> VisualAsk:
        """The same question about some of the rows."""
        taken = {name: _rows_of(value, index) for name, value in self.signals.items()}
        return VisualAsk(taken, self.state.changed(batch=len(index)), self.x[index])

    def poisoned(self) -> VisualAsk:
        """NaN in every number of row 0."""
        return VisualAsk({name: _poisoned(value) for name, value in self.signals.items()}, self.state, self.x)


class Sums:
    """ATTN_SUM of the first tokens of a short prompt, one row per sample and key-value head."""

    def __init__(self, query: Tensor, key: Tensor, items: int) -> None:
        self.query, self.key, self.items = query, key, items

    def sum(self, perturb: Any = None, last: int | None = None) -> Tensor:
        return Received(self.query, self.key, 0.5).sum(perturb, last)[:, 0, : self.items]


def visual_parts(name: str, **params: Any) -> list[Reducer]:
    """What a reducer does in a multimodal model behind its vision tower."""
    return [part for part in reducers.create(name, **params).placed(VISUAL).parts() if part.site in VISUAL]


def visual_question(
    part: Reducer,
    items: int,
    prefix: int = 0,
    rows: int = 2,
    frames: int = 1,
    crops: Crops | None = None,
    depth: int = 4,
    constant: float | None = None,
) -> VisualAsk:
    """Random signals, or constant ones, of the shapes that the part's site has.

    Args:
        part: One of `visual_parts`.
        items: Tokens of a row.
        prefix: Class tokens before them.
        rows: Ignored where one image is all there is: then its thumbnail and crops.
        frames: Frames that the tokens are.
        crops: For parts that see one image.
        depth: Layers of the tower or the decoder.
        constant: Every number, attention aside.
    """
    rows = 1 + crops.number if crops is not None else rows
    noise = torch.Generator().manual_seed(items * 131 + prefix * 17 + rows)
    n, taps = items + prefix, len(part.taps(depth)) if isinstance(part, PromptReducer) else 1

    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=noise, dtype=torch.float64)
        return made if constant is None else torch.full_like(made, constant)

    prompt, tower = part.site in (Site.POST, Site.EMBED), max(taps, 1)
    live = torch.arange(5).expand(rows, -1) < torch.tensor([[5 - row % 2] for row in range(rows)])
    attention = draw(rows, 2, 5, n).softmax(dim=-1) * 0.5 * live[:, None, :, None]
    height = crops.side if crops is not None else shape_of(items // frames)
    makers: dict[str, Any] = {
        "HIDDEN": lambda: draw(rows, n, 8),
        "KEY": lambda: draw(rows, tower, 2, n, 4) if prompt else draw(rows, 1 if part.site is Site.KV else 2, n, 4),
        "VALUE": lambda: draw(rows, 1 if part.site is Site.KV else 2, n, 4),
        "QUERY_PREFIX": lambda: draw(rows, tower, 2, 1, 4),
        "ATTN_PREFIX": lambda: draw(rows, tower, 2, 1, n).softmax(dim=-1),
        "ATTN_LAST": lambda: draw(rows, 2, n).softmax(dim=-1) * 0.5,
        "ATTN_TEXT": lambda: attention,
        "ATTN_SUM": lambda: Sums(draw(rows, 2, n + 4, 4), draw(rows, 1, n + 4, 4), n),
        "TEXT": lambda: Text(draw(rows, 5, 8) * live.unsqueeze(2), live),
        "GRID": lambda: height,
        "FRAMES": lambda: frames,
        "CROPS": lambda: crops,
    }
    missing = [str(signal) for signal in part.needs if str(signal) not in makers]
    if missing:
        pytest.fail(f"conformance cannot make {', '.join(missing)} of {part.name} yet; add it in {__file__}.")
    signals = {str(signal): makers[str(signal)]() for signal in part.needs}
    x = signals["HIDDEN"] if "HIDDEN" in signals else makers["HIDDEN"]()
    layer = depth if prompt else next(iter(part.layers(depth)))
    return VisualAsk(signals, vt.TokenState.initial(x, prefix).changed(layer=layer, depth=depth), x)


def shape_of(items: int) -> tuple[int, int]:
    """(h, w) of the squarest grid."""
    height = max(h for h in range(1, int(items**0.5) + 1) if items % h == 0)
    return height, items // height


def _rows_of(value: Any, index: list[int]) -> Any:
    if isinstance(value, Text):
        return Text(value.tokens[index], value.live[index])
    if isinstance(value, Sums):
        return Sums(value.query[index], value.key[index], value.items)
    return value[index] if isinstance(value, Tensor) else value


def _poisoned(value: Any) -> Any:
    if isinstance(value, Text):
        return Text(poisoned(value.tokens), value.live)
    if isinstance(value, Sums):
        return Sums(poisoned(value.query), poisoned(value.key), value.items)
    return poisoned(value)
