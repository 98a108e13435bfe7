"""The handle on a patched multimodal language model: vision tower, prompt, decoder and cache under one plan."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from visiontok.core import patching
from visiontok.core.backbone import Backbone, Block
from visiontok.core.chain import Chain
from visiontok.core.multimodal_plan import PROMPT, MultimodalPlan, Stop, VisualTrace
from visiontok.core.plan import Point, support
from visiontok.core.reducer import Reducer, Where
from visiontok.core.reduction import Reduction
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Site
from visiontok.core.visual import PromptReducer
from visiontok.errors import IncompatibleError, NotPatchedError, ParameterError

__all__ = ["PROMPT", "MultimodalBackbone", "MultimodalReduction", "Stop", "VisualTrace"]

_ORDER = (*PROMPT, Site.LLM, Site.KV)


class MultimodalBackbone(Backbone):
    """Base of families of multimodal language models."""

    def handle(self, model: nn.Module, reducers: Any, chain: Any) -> MultimodalReduction:
        return MultimodalReduction(model, self, reducers, chain)

    @abstractmethod
    def vision_tower(self, model: nn.Module) -> Block:
        """The vision tower."""

    @abstractmethod
    def encoder(self, model: nn.Module) -> Backbone | None:
        """The family of the vision tower, or None if no backbone knows it."""

    @abstractmethod
    def decoder(self, model: nn.Module) -> list[Block]:
        """The decoder's layers."""

    @abstractmethod
    def tower_depth(self, model: nn.Module) -> int:
        """Layers of the vision tower."""

    @abstractmethod
    def attach(self, model: nn.Module, reduction: MultimodalReduction) -> None:
        """Installs hooks and watched attention."""

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """Undoes `attach`; harmless where nothing was attached."""

    def anatomy(self, model: nn.Module) -> Any:
        """`core.costs.Anatomy`: what the model's parts cost.

        Raises:
            IncompatibleError: That is not known.
        """
        raise IncompatibleError(f"the costs of {type(model).__name__} ({self.name}) are not known.")

    def check_stop(self, model: nn.Module, reducer: Reducer, layer: int) -> None:
        """Raises IncompatibleError if a reducer cannot act at that decoder layer."""


class _Notes(threading.local):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.trace: list[VisualTrace] = []


class _Shared:
    """Per-thread notes; a copy starts empty."""

    def __init__(self) -> None:
        self.now = _Notes()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Shared, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return _Shared()


class MultimodalReduction(Reduction):
    """What `visiontok.patch` returns for a multimodal language model.

    Attributes:
        inner: The reduction of the vision tower, or None.
        prompt: Who acts between tower and decoder, or None.
        stages: Who acts inside the decoder, by layer.
        evictions: Who acts on the cache, by layer.
    """

    backbone: MultimodalBackbone

    def __init__(
        self, model: nn.Module, backbone: MultimodalBackbone, reducers: Sequence[Reducer], chain: Chain
    ) -> None:
        self.model = model
        self.backbone = backbone
        self._chain = chain
        self._shared = _Shared()
        self._modules: list[nn.Module] = []
        self._head = None
        self._bind(reducers)

    def _bind(self, reducers: Sequence[Reducer]) -> None:
        reducers = [reducer.placed(self.backbone.provides) for reducer in reducers]
        parts = [(owner, part) for owner in reducers for part in owner.parts()]
        for owner, _ in parts:
            fits = support(owner, self.backbone, self.model)
            if not fits:
                raise IncompatibleError(f"{owner.name} cannot be used on {type(self.model).__name__}: {fits.reason}")
        # A method that acts in the tower only goes there whole, for its parts know one another.
        whole = [owner for owner in reducers if all(part.site not in _ORDER for part in owner.parts())]
        tower = [*whole, *(part for owner, part in parts if owner not in whole and part.site not in _ORDER)]
        inner = None
        if tower:
            encoder, place = self.backbone.encoder(self.model), self.backbone.vision_tower(self.model)
            if encoder is None:
                raise IncompatibleError(f"no reducer can act in {place.path} ({type(place.module).__name__}).")
            inner = Reduction(place.module, encoder, tower, self._chain)
        stops: dict[Site, dict[int, Stop]] = {site: {} for site in _ORDER}
        owners: dict[tuple[Site, int], Reducer] = {}
        decoder = len(self.backbone.decoder(self.model))
        for owner, part in parts:
            if part.site not in _ORDER:
                continue
            site = Site.POST if part.site is Site.EMBED else part.site
            depth = self.backbone.tower_depth(self.model) if part.site in PROMPT else decoder
            if part.gflops is not None:
                raise ParameterError(f"{part.name}: gflops is no budget on a language model; give keep, r or tokens.")
            for layer, budget in _budgets(part, depth).items():
                if budget.idle and not part.always:
                    continue
                other = owners.setdefault((site, layer), owner)
                if other is not owner:
                    raise IncompatibleError(
                        f"{owner.name} and {other.name} both act at ({site}, layer {layer}); give one of them other "
                        "layers."
                    )
                self.backbone.check_stop(self.model, part, layer)
                stops[part.site][layer] = Stop(part, budget, layer)
        prompt = [stop for site in PROMPT for stop in stops[site].values()]
        self.reducers, self.inner = tuple(reducers), inner
        self.prompt: Stop | None = prompt[0] if prompt else None
        self.stages, self.evictions = dict(sorted(stops[Site.LLM].items())), dict(sorted(stops[Site.KV].items()))
        self.plan = self._planned()

    def _planned(self) -> MultimodalPlan:
        backbone, model = self.backbone, self.model
        length, prefix = backbone.length(model), backbone.prefix(model)
        decoder = backbone.decoder(model)
        now = length - prefix
        if self.inner is not None:
            own = self.inner.plan
            now = (own.tokens[-2:-1] or own.tokens)[0] - own.prefix
        points: list[Point] = []
        start = now

        def add(stop: Stop, path: str, site: Site, before: int) -> int:
            where = Where(stop.layer, len(decoder), start=start, grid=backbone.grid(model), frames=1)
            after = before - stop.reducer.removed(before, stop.budget, where, 0)
            note = "" if after != before or stop.reducer.always else "nothing to remove"
            if note and stop.budget.count is not None and stop.budget.count > before:
                note = f"nothing to remove: {stop.budget.count} tokens asked for, the image has {before}"
            points.append(Point(site, stop.layer, path, stop.reducer, stop.budget, before, after, note))
            return after

        if self.prompt is not None:
            now = add(self.prompt, backbone.vision_tower(model).path, self.prompt.reducer.site, now)
        entering = []
        for layer, block in enumerate(decoder):
            if layer in self.stages:
                now = add(self.stages[layer], block.path, Site.LLM, now)
            entering.append(now)
        for layer, stop in self.evictions.items():
            add(stop, decoder[layer].path, Site.KV, entering[layer])
        return MultimodalPlan(
            backbone.name, type(model).__name__, len(decoder), prefix, length, tuple(points),
            tower=None if self.inner is None else self.inner.plan, decoder=len(decoder),
        )  # fmt: skip

    # ---- life cycle

    def install(self) -> None:
        """Puts the patch in place; nothing is changed if it fails."""
        swaps = self.backbone.swaps(self.model)
        patching.install(swaps)
        self._modules = [swap.module for swap in swaps]
        vars(self.model)[patching.ATTRIBUTE] = self
        try:
            if self.inner is not None:
                self.inner.install()
            self.backbone.attach(self.model, self)
        except BaseException:
            self.unpatch()
            raise

    def unpatch(self) -> nn.Module:
        """Restores the model bit for bit and returns it.

        Raises:
            NotPatchedError: It is not patched any more.
        """
        if not self._modules:
            raise NotPatchedError("this reduction is not in place any more.")
        self.backbone.detach(self.model)
        if self.inner is not None and self.inner.in_place:
            self.inner.unpatch()
        patching.remove(self._modules)
        vars(self.model).pop(patching.ATTRIBUTE, None)
        self._modules = []
        return self.model

    def set(self, **params: Any) -> MultimodalReduction:
        """Changes parameters of the only reducer; see `Reduction.set`."""
        if not self._modules:
            raise NotPatchedError("this reduction is not in place any more; patch again.")
        if len(self.reducers) != 1:
            names = ", ".join(reducer.name for reducer in self.reducers)
            raise ParameterError(f"set(...) is ambiguous with {len(self.reducers)} reducers ({names}); patch again.")
        changed = self.reducers[0].replaced(**params)
        before = self.inner
        self._bind([changed])
        if before is not None:
            before.unpatch()
        if self.inner is not None:
            self.inner.install()
        self._shared = _Shared()
        self.backbone.detach(self.model)
        self.backbone.attach(self.model, self)
        return self

    # ---- looking

    @property
    def tokens(self) -> list[int]:
        """Visual tokens per decoder layer at prefill, the most of any picture: of the last forward, else the plan."""
        return list(self._shared.now.tokens) or self.plan.tokens

    @property
    def trace(self) -> list[Any]:
        """What each place did in this thread's last forward, tower first; empty unless patched with `trace=True`."""
        inner = [] if self.inner is None else self.inner.trace
        return [*inner, *self._shared.now.trace]

    def started(self, tokens: list[int]) -> None:
        """Starts the notes of a prompt: visual tokens of each picture."""
        self._shared.now.tokens = [max(tokens, default=0)] * len(self.backbone.decoder(self.model))
        self._shared.now.trace = []

    def started_decoder(self, tokens: list[int]) -> None:
        """Starts the notes of a prompt that came to the decoder as it was."""
        if self.prompt is None and self.inner is None:
            self.started(tokens)

    def noted(self, trace: VisualTrace) -> None:
        """Notes what one place did."""
        notes = self._shared.now
        most = max((kept.shape[-1] for kept in trace.kept), default=0)
        if trace.site is not Site.KV:
            first = 0 if trace.site in PROMPT else trace.layer
            notes.tokens[first:] = [most] * (len(notes.tokens) - first)
        if self._chain.trace:
            notes.trace.append(trace)

    def report(self, input_size: Any = None, **given: Any) -> Any:
        """Compute and memory of encoder, projector, prefill and decode; see `visiontok.core.costs.report`.

        Args:
            input_size: Unused; multimodal prompts are described by `given`.
            **given: `prompt` (text tokens, an int or a text length), `images`, `new_tokens`.
        """
        from visiontok.core.costs import report

        if input_size is not None:
            raise ParameterError("input_size is not used for language models; give prompt=, images= and new_tokens=.")
        return report(self, **given)

    # ---- for the backbone

    @property
    def tower_chain(self) -> Chain:
        """Notes of the vision tower's blocks."""
        return self._chain

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the tower whose attention is wanted."""
        if self.prompt is None:
            return ()
        return tuple(self.prompt.reducer.taps(self.backbone.tower_depth(self.model)))

    @property
    def needs(self) -> frozenset[str]:
        """Signals of the tower's attention that are wanted."""
        return frozenset() if self.prompt is None else frozenset(str(s) for s in self.prompt.reducer.needs)

    @property
    def watches_tower(self) -> bool:
        """Whether the tower's attention has to be watched."""
        return bool(self.taps) and bool(self.needs & {str(Signal.ATTN_PREFIX), "QUERY_PREFIX", "KEY"})

    @property
    def acts_in_decoder(self) -> bool:
        """Whether anything happens inside the decoder or to its cache."""
        return bool(self.stages) or bool(self.evictions)

    @property
    def keeps_positions(self) -> bool:
        """Whether the shortened prompt keeps the positions of the full one."""
        return self.prompt is not None and self.prompt.reducer.positions == "original"


def _budgets(part: Reducer, depth: int) -> Mapping[int, Budget]:
    if part.tokens is None:
        return part.budgets(depth)
    layers = list(part.layers(depth)) if not isinstance(part, PromptReducer) else list(part.span(depth))
    if len(layers) == 1:
        return {layers[0]: Budget(count=part.tokens)}
    raise ParameterError(f"{part.name}: tokens is no budget for {len(layers)} places in a decoder; give keep or r.")
