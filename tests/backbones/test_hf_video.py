"""Video transformers: exactness, frames that stay apart, hand-written layers, means over tokens, refusals."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.timesformer import configuration_timesformer as timesformer_configs
from transformers.models.timesformer import modeling_timesformer as timesformer
from transformers.models.videomae import configuration_videomae as mae_configs
from transformers.models.videomae import modeling_videomae as mae
from transformers.models.vivit import configuration_vivit as vivit_configs
from transformers.models.vivit import modeling_vivit as vivit

import visiontok as vt
from visiontok.core.reducer import Reducer
from visiontok.core.tokens import TokenMap
from visiontok.errors import IncompatibleError, ParameterError

SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
SMALL |= {"image_size": 32, "num_frames": 4, "num_labels": 5, "initializer_range": 0.2}
TIMES = {"patch_size": 8, "attn_implementation": "eager"}


@functools.cache
def _made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind in ("joint_space_time", "divided_space_time", "space_only"):
        config = timesformer_configs.TimesformerConfig(**SMALL, **TIMES, attention_type=kind)
        model: nn.Module = timesformer.TimesformerForVideoClassification(config)
    elif kind == "vivit":
        model = vivit.VivitForVideoClassification(vivit_configs.VivitConfig(**SMALL, tubelet_size=[2, 8, 8]))
    else:
        extra: dict[str, Any] = {
            "decoder_hidden_size": 24,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 3,
        }
        config = mae_configs.VideoMAEConfig(
            **SMALL, **extra, decoder_intermediate_size=32, patch_size=8, use_mean_pooling=kind != "videomae_first"
        )
        pretraining = kind == "videomae_decoder"
        model = mae.VideoMAEForPreTraining(config) if pretraining else mae.VideoMAEForVideoClassification(config)
    for name, parameter in model.named_parameters():
        # Many start at zero or one, where mistakes do not show.
        nn.init.normal_(parameter, mean=float(name.endswith("weight") and "norm" in name), std=0.2)
    return model.double().eval()


KINDS = ("videomae", "videomae_first", "vivit", "joint_space_time", "divided_space_time", "space_only")


def build(kind: str, attention: str | None = None) -> Any:
    model: Any = copy.deepcopy(_made(kind))
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


@pytest.fixture
def video() -> Tensor:
    return torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def tensors(out: Any) -> list[Tensor]:
    return [out.logits, *out.hidden_states]


CASES = [(kind, "eager") for kind in KINDS] + [(kind, "sdpa") for kind in KINDS[:3]]


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_nothing_to_do_is_bit_equal(kind: str, attention: str, video: Tensor) -> None:
    model = build(kind, attention)
    names = list(model.state_dict())
    with torch.no_grad():
        before = tensors(model(video, output_hidden_states=True))
        with vt.patched(model, "tome", r=0):
            after = tensors(model(video, output_hidden_states=True))
            assert list(model.state_dict()) == names
        back = tensors(model(video, output_hidden_states=True))
    for a, b, c in zip(before, after, back, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not any("_visiontok" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_places_that_look_alike_merge_without_a_trace(kind: str, video: Tensor) -> None:
    # Every frame is of one colour, and positions say when only: any merge within a frame must change nothing.
    model = build(kind)
    divided = kind == "divided_space_time"
    inner = next(getattr(model, name) for name in ("videomae", "vivit", "timesformer") if hasattr(model, name))
    embeddings = inner.embeddings
    flat = video[..., :1, :1].expand_as(video) if divided else torch.ones_like(video)
    with torch.no_grad():
        if isinstance(embeddings.position_embeddings, nn.Parameter):
            embeddings.position_embeddings[:, 1:] = 0.3
        else:
            embeddings.position_embeddings.fill_(0.3)
        if kind == "joint_space_time":
            embeddings.time_embeddings.fill_(0.1)
        before = model(flat).logits
        with vt.patched(model, "tome", r=5) as red:
            after = model(flat).logits
            assert red.tokens == red.plan.tokens
            assert red.tokens[-1] == red.plan.length - 10
            # The token that a classifier reads.
            assert red.plan.prefix == (0 if kind == "videomae" else 1)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


# ---- by hand


def linear(module: nn.Module, x: Tensor) -> Tensor:
    weight, bias = module.weight, getattr(module, "bias", None)
    y = torch.einsum("oi,...i->...o", weight, x)
    return y if bias is None else y + bias


def norm(module: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (3, 8))


def attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """Of (B, N, C) with every key counted `size` (B, N) times."""
    weights = torch.einsum("bihd,bjhd->bhij", heads(q), heads(k)).div(8**0.5).exp() * size[:, None, None]
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(dim=-1, keepdim=True), heads(v)).flatten(2)


def members(assign: Tensor, count: int) -> Tensor:
    """(B, K, N) one where token n is in slot k."""
    return (assign[:, None, :] == torch.arange(count)[:, None]).double()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def tome_by_hand(metric: Tensor, prefix: int, r: int) -> list[list[frozenset[int]]]:
    """Groups per sample: even tokens go to their most similar odd ones, the r best pairs, the prefix stays."""
    found = []
    for rows in metric:
        rows = rows / rows.norm(dim=-1, keepdim=True)
        scores = rows[::2] @ rows[1::2].T
        scores[: (prefix + 1) // 2] = -torch.inf
        best, place = scores.max(dim=-1)
        into = {2 * int(i): 2 * int(place[i]) + 1 for i in best.argsort(descending=True)[:r]}
        found.append([frozenset({odd, *(a for a, b in into.items() if b == odd)}) for odd in range(1, len(rows), 2)])
        found[-1] += [frozenset({even}) for even in range(0, len(rows), 2) if even not in into]
    return found


def groups(assign: Tensor, count: int) -> list[set[frozenset[int]]]:
    return [{frozenset((row == k).nonzero().flatten().tolist()) for k in range(count)} for row in assign]


def test_a_joint_layer_by_hand(video: Tensor) -> None:
    model = build("videomae")
    seen: list[Tensor] = []
    layers = model.videomae.encoder.layer
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: seen.extend((args[0].detach().clone(), out.detach().clone())))
    with torch.no_grad(), vt.patched(model, "tome", r=3, trace=True) as red:
        logits = model(video).logits
        trace = red.trace
    x, size = seen[0], torch.ones(2, 32, dtype=torch.float64)
    for layer, step, got in zip(layers, trace, seen[1::2], strict=True):
        parts, y = layer.attention.attention, norm(layer.layernorm_before, x)
        q, k, v = (linear(part, y) for part in (parts.query, parts.key, parts.value))
        expected = tome_by_hand(heads(k).mean(dim=2), 0, 3)
        assert groups(step.map.assign, step.tokens) == [set(g) for g in expected]
        x = x + linear(layer.attention.output.dense, attention(q, k, v, size))
        joined = members(step.map.assign, step.tokens) * size[:, None]
        size = joined.sum(dim=2)
        x = joined @ x / size[..., None]
        y = gelu(linear(layer.intermediate.dense, norm(layer.layernorm_after, x)))
        x = x + linear(layer.output.dense, y)
        torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)
    mean = (x * size[..., None]).sum(dim=1) / 32
    torch.testing.assert_close(logits, linear(model.classifier, norm(model.fc_norm, mean)), rtol=1e-10, atol=1e-10)


def test_a_divided_layer_by_hand(video: Tensor) -> None:
    model = build("divided_space_time")
    seen: list[Tensor] = []
    layers = model.timesformer.encoder.layer
    for layer in layers:
        layer.register_forward_hook(
            lambda _, args, out: seen.extend((args[0].detach().clone(), out[0].detach().clone()))
        )
    with torch.no_grad(), vt.patched(model, "tome", r=3, trace=True) as red:
        model(video)
        trace = red.trace
        assert red.tokens == [14, 11]
    lead, x = seen[0][:, :1], seen[0][:, 1:].unflatten(1, (16, 4))
    size = torch.ones(2, 17, dtype=torch.float64)
    for layer, step, got in zip(layers, trace, seen[1::2], strict=True):
        y = norm(layer.temporal_layernorm, x).flatten(0, 1)
        q, k, v = linear(layer.temporal_attention.attention.qkv, y).chunk(3, dim=-1)
        y = linear(layer.temporal_attention.output.dense, attention(q, k, v, torch.ones(1, 4, dtype=torch.float64)))
        x = x + linear(layer.temporal_dense, y).unflatten(0, (2, -1))
        metric, leads, places = [], [], []
        for t in range(4):
            frame = torch.cat((lead, x[:, :, t]), dim=1)
            q, k, v = linear(layer.attention.attention.qkv, norm(layer.layernorm_before, frame)).chunk(3, dim=-1)
            y = frame + linear(layer.attention.output.dense, attention(q, k, v, size))
            metric.append(heads(k).mean(dim=2))
            leads.append(y[:, :1])
            places.append(y[:, 1:])
        expected = tome_by_hand(torch.stack(metric).mean(dim=0), 1, 3)
        assert groups(step.map.assign, step.tokens) == [set(g) for g in expected]
        joined = members(step.map.assign, step.tokens) * size[:, None]
        size = joined.sum(dim=2)
        lead = torch.stack(leads).mean(dim=0)
        merged = [joined @ torch.cat((lead, p), dim=1) / size[..., None] for p in places]
        x = torch.cat((lead, torch.stack(merged, dim=2)[:, 1:].flatten(1, 2)), dim=1)
        y = gelu(linear(layer.intermediate.dense, norm(layer.layernorm_after, x)))
        x = x + linear(layer.output.dense, y)
        torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)
        lead, x = x[:, :1], x[:, 1:].unflatten(1, (-1, 4))


# ---- what the model around the encoder sees


@pytest.mark.parametrize("kind", ["vivit", "divided_space_time"])
@pytest.mark.parametrize(("name", "options"), [("tome", {"r": 3}), ("topk", {"r": [3]})])
def test_hidden_states_are_ragged_or_full(kind: str, name: str, options: Any, video: Tensor) -> None:
    model = build(kind)
    with torch.no_grad():
        with vt.patched(model, name, **options) as red:
            ragged = model(video, output_hidden_states=True)
            counts = [red.plan.length, *red.tokens]
        with vt.patched(model, name, restore="gather", trace=True, **options) as red:
            full = model(video, output_hidden_states=True)
            origins = [step.origin.long() for step in red.trace]
        plain = model(video, output_hidden_states=True)
    torch.testing.assert_close(full.logits, ragged.logits, rtol=1e-12, atol=1e-12)
    frames = 4 if kind == "divided_space_time" else 1
    assert [h.shape[1] for h in ragged.hidden_states] == [1 + (n - 1) * frames for n in counts]
    assert [h.shape for h in full.hidden_states] == [h.shape for h in plain.hidden_states]
    assert not any(hasattr(h, "_visiontok_state") for h in (*full.hidden_states, *ragged.hidden_states))
    for origin, short, long in zip(origins[-1:], ragged.hidden_states[-1:], full.hidden_states[-1:]):
        known = origin >= 0
        rows, slots = (h[:, 1:].unflatten(1, (-1, frames)) for h in (long, short))
        for b in range(2):
            assert torch.equal(rows[b][known[b, 1:]], slots[b][origin[b, 1:][known[b, 1:]] - 1])


def test_a_decoder_gets_every_visible_token_back(video: Tensor) -> None:
    model = build("videomae_decoder")
    hidden = torch.zeros(2, 32, dtype=torch.bool)
    hidden[0, ::2], hidden[1, 5:21] = True, True
    with torch.no_grad():
        before = model(video, bool_masked_pos=hidden)
        with vt.patched(model, "tome", r=0):
            assert torch.equal(model(video, bool_masked_pos=hidden).logits, before.logits)
        with vt.patched(model, "tome", r=3) as red:
            after = model(video, bool_masked_pos=hidden)
            assert red.tokens == [13, 10]
    assert after.logits.shape == before.logits.shape
    assert torch.isfinite(after.loss)
    assert not torch.equal(after.logits, before.logits)


def test_frames_alone_are_reduced_alone(video: Tensor) -> None:
    model = build("space_only")
    with torch.no_grad(), vt.patched(model, "expedite", clusters=9, trace=True) as red:
        together = model(video).logits
        assert red.trace[0].origin.shape == (8, 17)
        alone = torch.cat([model(video[:, t : t + 1]).logits for t in range(4)], dim=1)
    torch.testing.assert_close(alone.view_as(together), together, rtol=1e-10, atol=1e-10)


# ---- training, hooks, kernels without masks


@pytest.mark.parametrize("kind", ["videomae", "divided_space_time"])
def test_checkpointing_gives_the_same_gradients(kind: str, video: Tensor) -> None:
    def gradients(model: Any) -> list[Tensor]:
        model.train()
        with vt.patched(model, "tome", r=3):
            model(video, labels=torch.tensor([1, 3])).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, saving = build(kind), build(kind)
    for model in (plain, saving):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    saving.activation_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(plain), gradients(saving), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_copy_between_layers_does_not_lose_the_sizes(video: Tensor) -> None:
    model = build("divided_space_time")
    with torch.no_grad(), vt.patched(model, "tome", r=3):
        before = model(video).logits
        layer = model.timesformer.encoder.layer[0]
        layer.register_forward_hook(lambda _, args, out: (out[0].clone(), *out[1:]))
        kept: list[Any] = []
        # As offloading does: the tensor that the layer made lives on.
        layer.register_forward_hook(lambda _, args, out: kept.append(out), prepend=True)
        assert torch.equal(model(video).logits, before)


def test_kernels_without_masks_get_sizes_in_their_channels(video: Tensor) -> None:
    from transformers import AttentionInterface

    def maskless(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
        assert mask is None
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        return y.transpose(1, 2), None

    AttentionInterface.register("maskless_flash", maskless)
    model, video = build("videomae").float(), video.float()
    with torch.no_grad(), vt.patched(model, "tome", r=3):
        before = model(video).logits
        model.config._attn_implementation = "maskless_flash"
        torch.testing.assert_close(model(video).logits, before, rtol=1e-4, atol=1e-5)


# ---- refusals


def test_what_cannot_be_run_is_refused_by_name(video: Tensor) -> None:
    class OwnLayer(timesformer.TimesformerLayer):
        def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> Any:
            return (hidden_states,)

    class OwnAttention(mae.VideoMAESelfAttention):
        def forward(self, hidden_states: Tensor | None = None) -> Any:
            return hidden_states, None

    model = build("divided_space_time")
    model.timesformer.encoder.layer[1].__class__ = OwnLayer
    with pytest.raises(IncompatibleError, match=r"timesformer\.encoder\.layer\.1 is a OwnLayer"):
        vt.patch(model, "tome", r=2)
    model = build("videomae")
    model.videomae.encoder.layer[0].attention.attention.__class__ = OwnAttention
    with pytest.raises(IncompatibleError, match=r"layer\.0\.attention\.attention is a OwnAttention"):
        vt.patch(model, "tome", r=2)


def test_grids_are_of_a_frame_only(video: Tensor) -> None:
    for kind in ("videomae", "vivit", "joint_space_time"):
        assert vt.supports("expedite", build(kind)).missing == ("GRID",)
    assert vt.supports("expedite", build("divided_space_time"))
    model = build("divided_space_time")
    with torch.no_grad(), vt.patched(model, "tome", r=2, trace=True) as red:
        model(torch.cat((video, video[..., :8]), dim=-1))
        assert red.trace[0].grid == (4, 5)


@dataclass(frozen=True)
class Second(Reducer):
    """Merges the two tokens after the first, whatever they are."""

    def decide(self, signals: Any, state: Any, budget: int | None = None) -> TokenMap:
        slots = (torch.arange(state.n) - 1).clamp_min(1)
        slots[0] = 0
        return TokenMap(slots.expand(state.batch, -1), state.n - 1)


def test_masked_tokens_are_never_seen(video: Tensor) -> None:
    model = build("vivit")
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[:, 17:] = False
    other = torch.cat((video[:, :2], -video[:, 2:]), dim=1)
    with torch.no_grad():
        before = model(video, attention_mask=mask).logits
        with vt.patched(model, "tome", r=0):
            assert torch.equal(model(video, attention_mask=mask).logits, before)
        with vt.patched(model, Second(r=1)) as red:
            after = model(video, attention_mask=mask).logits
            torch.testing.assert_close(model(other, attention_mask=mask).logits, after, rtol=1e-10, atol=1e-10)
            assert not torch.allclose(model(other).logits, model(video).logits)
            assert red.tokens == [32, 31]


def test_odd_numbers_of_frames_are_refused(video: Tensor) -> None:
    model = build("divided_space_time")
    with torch.no_grad(), vt.patched(model, "tome", r=2), pytest.raises(ParameterError, match="config.num_frames=4"):
        model(video[:, :1, :, :8, :24])


def test_v3_signatures_are_known() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)[1:]

    assert names(mae.VideoMAELayer.forward) == ["hidden_states", "kwargs"]
    assert names(mae.VideoMAEAttention.forward) == ["hidden_states", "kwargs"]
    assert names(mae.VideoMAESelfAttention.forward) == ["hidden_states"]
    assert names(mae.VideoMAEOutput.forward) == ["hidden_states", "input_tensor"]
    assert names(vivit.VivitLayer.forward) == ["hidden_states", "attention_mask", "kwargs"]
    assert names(vivit.VivitAttention.forward) == ["hidden_states", "attention_mask", "kwargs"]
    for part in (timesformer.TimesformerLayer, timesformer.TimeSformerAttention, timesformer.TimesformerSelfAttention):
        assert names(part.forward) == ["hidden_states", "output_attentions"]
