"""open_clip's text towers: order, causal masks among groups, padding, pooled tokens, refusals."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

pytest.importorskip("open_clip")

from open_clip import transformer as oc  # noqa: E402
from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.model import CLIP  # noqa: E402

import visiontok as vt  # noqa: E402
from visiontok.core.reducer import Reducer  # noqa: E402
from visiontok.core.runtime import state_of  # noqa: E402
from visiontok.core.signals import Signal  # noqa: E402
from visiontok.errors import IncompatibleError  # noqa: E402

VISION: Any = {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT: Any = {"context_length": 16, "vocab_size": 64, "width": 48, "heads": 3, "layers": 3}
START, END = 62, 63


@dataclass(frozen=True)
class Listens(Reducer):
    """Reads attention and then leaves every token alone: what runs is ours, in the new order and with our masks."""

    needs = (Signal.KEY, Signal.ATTN_PREFIX, Signal.ATTN)
    always = True

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> None:
        assert signals.KEY.shape[2] == state.n
        torch.testing.assert_close(signals.ATTN_PREFIX, signals.ATTN[:, :, : state.prefix])


@dataclass(frozen=True)
class DropsPadding(Reducer):
    """Drops the last four tokens."""

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> Any:
        kept = torch.arange(state.prefix, state.n - 4).expand(state.batch, -1)
        return vt.TokenMap.keep(kept, state.n, state.prefix)


@dataclass(frozen=True)
class MergesFarApart(Reducer):
    """Merges the last token, often padding, into one of the first."""

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> Any:
        place = torch.arange(state.n).expand(state.batch, -1)
        kept = place[:, state.prefix : -1]
        return vt.TokenMap.merge(place[:, -1:], place[:, state.prefix : state.prefix + 1], kept, state.prefix)


def enlivened(model: Any) -> Any:
    # open_clip starts embeddings so small, and biases at zero, that much could be left out unseen.
    for name, p in model.named_parameters():
        if "embedding" in name or "cls_emb" in name or name.endswith("bias"):
            nn.init.normal_(p, std=0.5 if "token" in name else 0.2)
    return model.double().eval()


def tower(**options: Any) -> Any:
    torch.manual_seed(0)
    return enlivened(oc.TextTransformer(**{"output_dim": 24, **TEXT, **options}))


def clip() -> Any:
    torch.manual_seed(0)
    return enlivened(CLIP(24, VISION, TEXT))


@pytest.fixture
def text() -> Tensor:
    ids = torch.zeros(4, 16, dtype=torch.int64)
    draw = torch.Generator().manual_seed(1)
    for row, end in enumerate((9, 15, 4, 11)):
        ids[row, :end] = torch.randint(1, 60, (end,), generator=draw)
        ids[row, 0], ids[row, end] = START, END
    return ids


TOWERS: dict[str, dict[str, Any]] = {
    "argmax": {},
    "eos": {"pool_type": "eos", "eos_id": END, "qk_norm": True, "ls_init_value": 0.3},
    "first": {"pool_type": "first", "no_causal_mask": True, "use_pad_mask": True},
    "siglip": {"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
    "coca": {"embed_cls": True, "output_tokens": True},
    "coca_correct": {"embed_cls": True, "correct_cls_mask": True},
    "none": {"pool_type": "none"},
}


@pytest.mark.parametrize("name", TOWERS)
def test_r0_is_bit_equal_and_what_is_pooled_survives_our_order_and_masks(name: str, text: Tensor) -> None:
    model = tower(**TOWERS[name])
    with torch.no_grad():
        before, features = tree_leaves(model(text)), tree_leaves(model.forward_intermediates(text, output_fmt="NLC"))
        names = list(model.state_dict())
        red = vt.patch(model, "tome", r=0)
        assert all(map(torch.equal, tree_leaves(model(text)), before))
        again = tree_leaves(model.forward_intermediates(text, output_fmt="NLC"))
        assert all(map(torch.equal, again, features))
        assert all(state_of(y) is None for y in again)
        assert list(model.state_dict()) == names
        red.unpatch()
        with vt.patched(model, Listens()):
            ours = tree_leaves(model(text))
    assert [y.shape for y in ours] == [y.shape for y in before]
    pooled, expected = (ours[0][:, -1], before[0][:, -1]) if name == "none" else (ours[0], before[0])
    torch.testing.assert_close(pooled, expected, rtol=1e-11, atol=1e-11)
    if name == "coca":
        # The caption's tokens, without the padding, which nobody reads.
        for row in range(4):
            stop = int((text[row] != 0).sum())
            torch.testing.assert_close(ours[1][row, :stop], before[1][row, :stop], rtol=1e-11, atol=1e-11)


def test_padding_may_go_without_a_trace(text: Tensor) -> None:
    model, short = tower(), text[[0, 2, 3]]
    with torch.no_grad():
        before = model(short)
        with vt.patched(model, DropsPadding(r={0: 4})) as red:
            torch.testing.assert_close(model(short), before, rtol=1e-11, atol=1e-11)
            assert red.tokens == red.plan.tokens == [12, 12, 12]


def by_hand(model: Any, ids: list[int], maps: list[list[int]], proportional: bool) -> Tensor:
    """The pooled output of one text: lists of original places, groups as lists, everything explicit."""
    end = ids.index(END)
    order = [end, *(place for place in range(len(ids)) if place != end)]
    rows = [model.token_embedding.weight[ids[place]] + model.positional_embedding[place] for place in order]
    # What comes after the end weighs nothing and is seen by nobody that matters.
    groups = [[place] if place <= end else [] for place in order]
    for block, assign in zip(model.transformer.resblocks, maps):
        normed = [block.ln_1(row) for row in rows]
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        qkv = [(weight @ row + bias).view(3, 3, 16) for row in normed]
        after = []
        for query, group in enumerate(groups):
            if not group:
                after.append(rows[query])
                continue
            seen = [key for key, other in enumerate(groups) if other and min(other) <= max(group)]
            heads = []
            for head in range(3):
                logits = [float(qkv[query][0, head] @ qkv[key][1, head]) / 4 for key in seen]
                logits = [z + proportional * math.log(len(groups[key])) for z, key in zip(logits, seen)]
                total = sum(math.exp(z) for z in logits)
                heads.append(sum(math.exp(z) / total * qkv[key][2, head] for z, key in zip(logits, seen)))
            y = block.attn.out_proj.weight @ torch.cat(heads) + block.attn.out_proj.bias  # type: ignore[arg-type]
            after.append(rows[query] + y)
        slots = max(assign) + 1
        merged = [[place for place, slot in enumerate(assign) if slot == k] for k in range(slots)]
        shares = [[max(len(groups[m]), 1e-30) for m in members] for members in merged]
        rows = [sum(s * after[m] for s, m in zip(share, members)) / sum(share)
                for share, members in zip(shares, merged)]  # fmt: skip
        groups = [[place for m in members for place in groups[m]] for members in merged]
        rows = [row + block.mlp(block.ln_2(row)) for row in rows]
    assert groups[0] == [end]
    return model.ln_final(rows[0]) @ model.text_projection


@pytest.mark.parametrize(
    ("name", "options"),
    [("tome", {"r": 3}), ("pitome", {"kind": "text", "keep": 0.8}), (MergesFarApart(r=1), {})],
    ids=["tome", "pitome", "far apart"],
)
def test_the_pooled_token_by_hand(name: Any, options: dict[str, Any], text: Tensor) -> None:
    model = tower()
    with torch.no_grad(), vt.patched(model, name, trace=True, **options) as red:
        found = model(text)
        maps = [step.map.assign for step in red.trace]
        assert [step.tokens for step in red.trace] == red.plan.tokens == red.tokens
        assert red.tokens[-1] < 16
        for row in range(4):
            each = [assign[row].tolist() for assign in maps]
            expected = by_hand(model, text[row].tolist(), each, red.reducers[0].proportional)
            torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tome", "topk", "ats"])
def test_the_batch_does_not_matter(name: str, text: Tensor) -> None:
    model = tower()
    with torch.no_grad(), vt.patched(model, name, r=3):
        together = model(text)
        for row in range(4):
            torch.testing.assert_close(model(text[row : row + 1])[0], together[row], rtol=1e-10, atol=1e-10)


def test_the_text_half_of_clip_beside_its_visual_half(text: Tensor) -> None:
    model, image = clip(), torch.randn(4, 3, 32, 32).double()
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(image, text)
        red = vt.patch(model, "pitome", kind="text", keep=0.8, tower="text")
        reduced = model(image, text)
        assert red.tokens == red.plan.tokens == [14, 12, 10]
        assert torch.equal(reduced[0], before[0])
        assert not torch.allclose(reduced[1], before[1])
        # The same tower as a module of its own.
        own = tower()
        own.load_state_dict({k: v for k, v in model.state_dict().items() if k in own.state_dict()})
        with vt.patched(own, "pitome", kind="text", keep=0.8):
            torch.testing.assert_close(nn.functional.normalize(own(text), dim=-1), reduced[1], rtol=1e-11, atol=1e-11)
        eye = vt.patch(model, "tome", r=3)
        assert (eye.model, red.model) == (model.visual, model)
        both = model(image, text)
        assert torch.equal(both[1], reduced[1])
        assert not torch.allclose(both[0], before[0])
        assert list(model.state_dict()) == names
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(map(torch.equal, copied(image, text), both))
        red.unpatch()
        assert torch.equal(model(image, text)[1], before[1])
        assert torch.equal(model(image, text)[0], both[0])
        vt.unpatch(model)
        assert all(map(torch.equal, model(image, text), before))
    assert type(model) is CLIP
    assert type(model.transformer) is oc.Transformer


def test_intermediates_of_clip_are_refused_where_the_pooled_token_is_unknown(text: Tensor) -> None:
    model = clip()
    with torch.no_grad():
        before = model.forward_intermediates(text=text)
        with vt.patched(model, "tome", r=2, tower="text") as red:
            with pytest.raises(IncompatibleError, match="which token of the text is pooled"):
                model.forward_intermediates(text=text)
            red.set(r=0)
            same = model.forward_intermediates(text=text)
    assert all(map(torch.equal, tree_leaves(before), tree_leaves(same)))


def test_intermediates_have_the_length_and_order_of_the_text(text: Tensor) -> None:
    model, seen = tower(), []
    model.transformer.resblocks[1].register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad(), vt.patched(model, "tome", r=3, trace=True) as red:
        out = model.forward_intermediates(text, [1], output_fmt="NLC")
        origin = red.trace[1].origin.long()
    (whole,) = out["text_intermediates"]
    assert whole.shape == (4, 16, 48)
    for row, end in enumerate((9, 15, 4, 11)):
        order = [end, *(place for place in range(16) if place != end)]
        for now, place in enumerate(order):
            assert torch.equal(whole[row, place], seen[0][row, origin[row, now]])


def test_coca_runs_whole_with_both_towers(text: Tensor) -> None:
    torch.manual_seed(0)
    options: Any = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True}
    decoder: Any = {"context_length": 16, "vocab_size": 64, "width": 24, "heads": 3, "layers": 2}
    words: Any = {**TEXT, "width": 24, "embed_cls": True, "output_tokens": True}
    model: Any = CoCa(24, decoder, words, VISION | options)
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)
    enlivened(model)
    image = torch.randn(4, 3, 32, 32).double()
    with torch.no_grad():
        before = model(image, text)
        both = vt.patch(model, "tome", r=3, tower="both")
        after = model(image, text)
        assert both["text"].tokens == [14, 11, 8]
        assert both["visual"].tokens == [14, 11]
        assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
        assert all(v.isfinite().all() for v in after.values())
        assert not torch.allclose(after["text_features"], before["text_features"])
        vt.unpatch(model)
        assert all(torch.equal(v, before[k]) for k, v in model(image, text).items())


@pytest.mark.parametrize("tokens_first", [False, True])
def test_checkpointing_and_tokens_first_give_the_same_gradients(tokens_first: bool, text: Tensor) -> None:
    model = tower().train()
    grads: list[list[Tensor]] = []
    for turned in (False, tokens_first):
        if turned:
            stack = oc.Transformer(48, 3, 3, batch_first=False)
            stack.load_state_dict(model.transformer.state_dict())
            model.transformer = stack.double()
        for enable in (False, True):
            model.zero_grad()
            model.set_grad_checkpointing(enable)
            with vt.patched(model, "tome", r=3):
                model(text).square().sum().backward()
            named = sorted((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
            grads.append([grad.clone() for _, grad in named])
    for other in grads[1:]:
        for one, two in zip(grads[0], other):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.full
@pytest.mark.parametrize("name", ["argmax", "siglip", "coca"])
def test_it_compiles_in_one_graph(name: str, text: Tensor) -> None:
    model = tower(**{**TOWERS[name], "layers": 2})
    with torch.no_grad(), vt.patched(model, "tome", r=3):
        expected = model(text)
        torch._dynamo.reset()
        compiled = torch.compile(lambda ids: model(ids), backend="aot_eager", fullgraph=True)
        for found, value in zip(tree_leaves(compiled(text)), tree_leaves(expected)):
            torch.testing.assert_close(found, value)


def test_what_needs_a_grid_or_is_not_open_clips_own_is_refused() -> None:
    class Tower(oc.TextTransformer):
        def _embeds(self, text: Tensor) -> Any:
            return super()._embeds(text)

    class Encoder(CLIP):
        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            return super().encode_text(text, normalize)

    with pytest.raises(IncompatibleError, match="GRID"):
        vt.patch(tower(), "algm")
    for model in (Tower(**TEXT), Encoder(24, VISION, TEXT)):
        with pytest.raises(IncompatibleError, match=f"{type(model).__name__} embeds or pools its text"):
            vt.patch(model, "tome", r=2, tower="text")


def test_v3_signatures_are_known() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(CLIP.encode_text) == ["self", "text", "normalize"]
    assert names(oc.TextTransformer._embeds) == ["self", "text"]
    assert names(oc.text_global_pool) == ["x", "text", "pool_type", "eos_token_id"]
