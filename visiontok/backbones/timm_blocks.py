"""Blocks and attentions of timm's ViTs with a reduction point, and what the consumers of their tokens need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontok.core.blocks import Ran, Tap, bias_dtype, offers_ahead, run_block, sized_mean
from visiontok.core.joints import Joint
from visiontok.core.runtime import Stage, attach_state, carry_state, state_of
from visiontok.core.signals import ATTENTION, Offers, Signal, attention_offers
from visiontok.core.state import TokenState
from visiontok.ops.attending import attend
from visiontok.ops.attention import Votes

__all__ = ["mix"]

# What an attention with two maps per head offers: its heads have no rows that sum to one.
_DIFFERENTIAL = frozenset({Signal.QUERY, Signal.KEY, Signal.VALUE})


def mix(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(scale q kᵀ + bias) v as an attention of timm computes it, fused or not, with its dropout.

    Args:
        attn: Has `scale`, `fused_attn` and `attn_drop`.
        q: (B, H, N, d).
        k: (B, H, N, d).
        v: (B, H, N, e).
        bias: Broadcastable to (B, H, N, N), or None.
    """
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        return attend(q, k, v, bias, scale=q.shape[-1] ** -0.5, dropout_p=dropout)
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    return attn.attn_drop(logits.softmax(dim=-1)) @ v


class PatchedAttention:
    """Attention that, when given a tap, leaves its q, k, v there."""

    _visiontok_offers: ClassVar[frozenset[Signal]] = ATTENTION

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, *args: Any, tap: Tap | None = None, **kwargs: Any
    ) -> Tensor:
        if tap is None:
            return super().forward(x, attn_mask, *args, **kwargs)  # type: ignore[misc]
        q, k, v = self._visiontok_qkv(x)
        y = mix(self, q, k, v, attn_mask)
        y = self.norm(y.transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)
        if gate is not None:
            y = y * gate(x).sigmoid()
        tap.q, tap.k, tap.v = q, k, v
        return self.proj_drop(self.proj(y))

    def _visiontok_qkv(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x)
        # A view costs a third of unflatten, which is Python.
        width = qkv.shape[-1] // (3 * self.num_heads)
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v


class PatchedDiffAttention:
    """Differential attention that, when given a tap, leaves its q and k, both halves of a head side by side, and v."""

    _visiontok_offers: ClassVar[frozenset[Signal]] = _DIFFERENTIAL

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, *args: Any, tap: Tap | None = None, **kwargs: Any
    ) -> Tensor:
        if tap is None:
            return super().forward(x, attn_mask, *args, **kwargs)  # type: ignore[misc]
        tap.q, tap.k, tap.v = q, k, v = self._visiontok_qkv(x)
        return self.proj_drop(self.proj(self.norm(_differ(self, q, k, v, attn_mask))))

    def _visiontok_qkv(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _paired(self, *self.qkv(x).chunk(3, dim=-1))


def _paired(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The norms are over half a head.
    halves = lambda t, norm: norm(t.unflatten(-1, (attn.num_heads, 2, -1))).flatten(3).transpose(1, 2)  # noqa: E731
    return halves(q, attn.q_norm), halves(k, attn.k_norm), v.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _differ(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    first, second = (mix(attn, *pair, v, bias) for pair in zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1)))
    y = first - attn._compute_lambda().type_as(q) * second
    return (attn.sub_norm(y) * (1 - attn.lambda_init)).transpose(1, 2).flatten(2)


def _attend(attn: Any, x: Tensor, state: TokenState) -> tuple[Tensor, Offers]:
    bias = state.key_bias(bias_dtype(x, attn.fused_attn, attends=True))
    if not hasattr(attn, "_visiontok_offers"):
        return attn(x, attn_mask=bias), {}
    tap = Tap()
    y = attn(x, attn_mask=bias, tap=tap)
    return y, _offered(tap.offers(attn.scale, bias, state.prefix), attn._visiontok_offers)


def _ahead(attn: Any, normed: Callable[[], Tensor], state: TokenState) -> Offers:
    if not hasattr(attn, "_visiontok_offers"):
        return {}
    project = lambda: attn._visiontok_qkv(normed())  # noqa: E731
    ahead = offers_ahead(project, attn.scale, state.key_bias(torch.float32), state.prefix)
    return _offered(ahead, attn._visiontok_offers)


def _offered(offers: Offers, signals: frozenset[Signal]) -> Offers:
    return {name: offer for name, offer in offers.items() if name in signals}


class PatchedBlock:
    """A block with a reduction point between attention and MLP."""

    _visiontok: Stage

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        host = super().forward  # type: ignore[misc]
        given = "attn_mask" if attn_mask is not None else "is_causal" if kwargs.get("is_causal") else None
        return run_block(
            self._visiontok,
            x,
            lambda x, _: host(x, attn_mask, **kwargs),
            self._visiontok_ahead,
            self._visiontok_run,
            given,
        )


class _PreNormBlock(PatchedBlock):
    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        return _ahead(self.attn, lambda: self.norm1(x), state)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        y, offered = _attend(self.attn, self.norm1(x), state)
        joint = Joint(lambda y: self.drop_path1(self.ls1(y)), self.norm2, self.ls1, not self.training)
        x, normed, after = self._visiontok.between(x, y, joint, state, offered)
        x = x + self.drop_path2(self.ls2(self.mlp(normed)))
        return x, after, offered


class _ResPostBlock(PatchedBlock):
    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        return _ahead(self.attn, lambda: x, state)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        y, offered = _attend(self.attn, x, state)
        x = x + self.drop_path1(self.norm1(y))
        x, after = self._visiontok.mid(x, state, offered)
        x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return x, after, offered


class _ParallelThingsBlock(PatchedBlock):
    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        return _joined([_ahead(branch.attn, lambda b=branch: b.norm(x), state) for branch in self.attns])

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        ran = [(branch, *_attend(branch.attn, branch.norm(x), state)) for branch in self.attns]
        x = x + torch.stack([branch.drop_path(branch.ls(y)) for branch, y, _ in ran]).sum(dim=0)
        offered = _joined([signals for _, _, signals in ran])
        x, after = self._visiontok.mid(x, state, offered)
        x = x + torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)
        return x, after, offered


def _joined(branches: list[Offers]) -> Offers:
    # Parallel attentions count as one with all their heads.
    def join(name: str) -> Callable[[], Any]:
        if name == "ATTN_VOTE":
            return lambda: Votes.joined([branch[name]() for branch in branches])
        return lambda: torch.cat([branch[name]() for branch in branches], dim=1)

    return {name: join(name) for name in branches[0]}


class _ParallelScalingBlock(PatchedBlock):
    """Attention and MLP in parallel: nothing lies between them, so the point is after their sum, before the next block.

    The reduction has the keys of this block and the hidden tokens that it returns.
    """

    _visiontok_offers: ClassVar[frozenset[Signal]] = ATTENTION

    def _visiontok_parts(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, lead = self.in_proj(self.in_norm(x)), getattr(self, "qkv_bias", None)
        # Older timm adds one bias to all parts together, in this order.
        y, q, k, v = (y if lead is None else y + torch.cat((lead, self.mlp_bias))).split(self.in_split, dim=-1)
        y = y if self.mlp_bias is None or lead is not None else y + self.mlp_bias
        return y, *self._visiontok_heads(q, k, v)

    def _visiontok_heads(self: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def _visiontok_mix(self: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return mix(self, q, k, v, bias).transpose(1, 2).flatten(2)

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        project = lambda: self._visiontok_parts(x)[1:]  # noqa: E731
        ahead = offers_ahead(project, self.scale, state.key_bias(torch.float32), state.prefix)
        return _offered(ahead, self._visiontok_offers)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        bias = state.key_bias(bias_dtype(x, self.fused_attn, attends=True))
        y, *qkv = self._visiontok_parts(x)
        mixed, y = self._visiontok_mix(*qkv, bias), self.mlp_drop(self.mlp_act(y))
        if getattr(self, "out_proj", None) is not None:
            y = self.out_proj(torch.cat((mixed, y), dim=-1))
        else:
            y = self.attn_out_proj(mixed) + self.mlp_out_proj(y)
        offers = attention_offers(lambda: tuple(qkv), self.scale, bias, state.prefix)
        offered = _offered(offers, self._visiontok_offers)
        x, after = self._visiontok.mid(x + self.drop_path(self.ls(y)), state, offered)
        return x, after, offered


class _DiffParallelScalingBlock(_ParallelScalingBlock):
    _visiontok_offers = _DIFFERENTIAL

    def _visiontok_heads(self: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _paired(self, q, k, v)

    def _visiontok_mix(self: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return _differ(self, q, k, v, bias)


class PatchedNorm:
    """A norm that lets the token state pass to the head."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return carry_state(x, super().forward(x))  # type: ignore[misc]


class PatchedFeatures:
    """What a consumer of tokens does with their state: ends spans, restores, or lets a reducer read the output out."""

    _visiontok: Any

    def forward_features(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        fill, state = self._visiontok.restore_fill, state_of(y)
        return y if state is None else attach_state(*state.whole(y, fill))

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        state = state_of(x)
        if state is not None and not pre_logits:
            output = self._visiontok.readout(state.memo)
            if output is not None:
                return output
        y = super().forward_head(x, pre_logits)  # type: ignore[misc]
        # Without pool and head the features themselves come out; their state must not.
        return y if state_of(y) is None else y.view_as(y)

    def _visiontok_dense(self: Any, pairs: Any, indices: Any, state: TokenState | None, fill: Any) -> list[Tensor]:
        from timm.models._features import feature_take_indices

        spatial = [y for y, _ in pairs]
        if state is None:
            return spatial
        layers, _ = feature_take_indices(len(self.blocks), indices)
        skip = self.num_prefix_tokens
        # The prefix is in no feature map, but the way back is over the whole sequence.
        whole = [y if skip == 0 else torch.cat((lead, y), dim=1) for y, lead in pairs]
        return [state.restore_at(layer, y, fill)[:, skip:] for layer, y in zip(layers, whole)]


class PatchedMeanHead(PatchedFeatures):
    """A model whose head averages the patch tokens itself."""

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        state = state_of(x)
        if state is not None and state.size is not None and self.global_pool == "avg":
            mean = sized_mean(x[:, state.prefix :], state.size[:, state.prefix :]).unsqueeze(1)
            # The host's average over a single token is that token.
            x = carry_state(x, torch.cat((x[:, : self.num_prefix_tokens], mean), dim=1))
        return super().forward_head(x, pre_logits)


class PatchedMaps(PatchedMeanHead):
    """Such a model whose feature maps come with or without their prefix tokens."""

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        call = super().forward_intermediates  # type: ignore[misc]
        fill = self._visiontok.restore_fill or ("nearest" if output_fmt == "NCHW" else None)
        if fill is None or output_fmt not in ("NCHW", "NLC"):
            return call(x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only)
        final, taken = call(x, indices, self.num_prefix_tokens > 0, norm, stop_early, "NLC", False)
        pairs = taken if self.num_prefix_tokens else [(spatial, None) for spatial in taken]
        features = self._visiontok_dense(pairs, indices, state_of(final), fill)
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            features = [y.transpose(1, 2).unflatten(2, (height, width)).contiguous() for y in features]
        if self.num_prefix_tokens and return_prefix_tokens:
            features = [(y, lead) for y, (_, lead) in zip(features, pairs)]
        state = state_of(final)
        final = final if state is None else state.whole(final, self._visiontok.restore_fill)[0]
        return features if intermediates_only else (final, features)
