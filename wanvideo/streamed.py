"""A Wan transformer whose blocks stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..memory.plan.footprint import Limits, ModelFootprint, WorkSize
from ..memory.plan.plan import MemoryPlan, PlanError
from ..memory.stream.pinned import Registrar
from ..memory.stream.ring import DeviceRing
from ..runtime.host_weights import WeightParts
from ..runtime.settings import RunSettings
from ..runtime.several import shared_samples
from ..runtime.streamed import StreamedModel
from ..sampling.caching.followed_cache import FollowedCache
from ..sampling.caching.pass_cache import PassCache
from ..sampling.caching.settings import StepCacheSettings
from ..sampling.caching.step_cache import Prompts, StepCache
from ..transformer.block_cache import BlockCache
from ..weights.files.checkpoint import Checkpoint
from ..weights.lora.file import LoraChoice
from ..weights.lora.names import Aliases
from .checkpoint import build_wan, open_wan
from .footprint import WAN21_VAE, WAN22_VAE, WanFootprint, WanWork, with_residuals
from .lora_names import wan_aliases
from .network.blocks import Context, KeysValues, WanBlock
from .network.camera import PIXELS
from .network.config import WanConfig
from .network.model import Extras, WanModel
from .step_tables import choose_table

logger = logging.getLogger(__name__)

# What only makes keys and values of the prompt: not needed in a pass once those are cached.
TEXT_KV = tuple(f"cross_attn.{layer}." for layer in ("k", "v", "norm_k", "k_img", "v_img", "norm_k_img"))
# Used once, before the blocks: with them it would have to stay until their tokens are embedded.
NOT_STREAMED = "before_proj."
EMBEDDINGS = ("text_embedding", "time_embedding", "time_projection")
NO_PATCHES_CARDS = (
    "another node patches this model's blocks, and sees all tokens there, of which several GPUs have some each: use a "
    "single device, or take that node out"
)
MAX_CONTEXTS = 4  # prompts remembered at a time
COPIES = 3  # of a residual in RAM in a pass that is computed: there before it; back and there again after it

K = TypeVar("K")  # what is known of a prompt
_Parts = dict[tuple[int, int], tuple[Tensor, Tensor | None]]  # by the first of some samples and their end


@dataclass(frozen=True)
class Inputs:
    """What a card's pass is made of: see `WanModel`; `first` of a batch's samples it has, and what follows."""

    latent: Tensor
    timestep: Tensor
    text: Tensor
    image_tokens: Tensor | None
    extras: Extras
    first: int


class StreamedWan(StreamedModel[WanModel]):
    """A Wan checkpoint; `vace_module` is a file whose VACE blocks are the model's too."""

    config: WanConfig
    _contexts: list[tuple[Tensor, Tensor | None, Context]]
    _dropped: list[tuple[Tensor, Tensor | None]]  # prompts whose contexts had to make room for others
    _cuts: list[tuple[Tensor, Tensor | None, _Parts]]  # prompts, and what cards have of them
    parts = WeightParts(
        optional=TEXT_KV,
        unstreamed=(NOT_STREAMED,),
        transient=(*EMBEDDINGS, "img_emb"),
        in_pieces=EMBEDDINGS,
    )

    def __init__(
        self,
        path: str | Path,
        settings: RunSettings,
        registrar: Registrar | None = None,
        between_blocks: Callable[[], None] | None = None,
        loras: Sequence[LoraChoice] = (),
        vace_module: Path | None = None,
    ):
        self.vace_module = vace_module
        self._followed: WeakKeyDictionary[PassCache, FollowedCache] = WeakKeyDictionary()
        super().__init__(path, settings, registrar, between_blocks, loras)
        self.use_step_cache(settings.step_cache)

    def open_file(self, path: str | Path) -> tuple[WanConfig, Checkpoint]:
        return open_wan(path, self.vace_module)

    def open_beside(self, device: torch.device, between_blocks: Callable[[], None]) -> StreamedWan:
        settings = self.settings_beside(device)
        return StreamedWan(self.path, settings, None, between_blocks, self._loras, self.vace_module)

    def build(self, checkpoint: Checkpoint) -> WanModel:
        return build_wan(self.config, checkpoint)

    def lora_aliases(self, checkpoint: Checkpoint) -> Aliases:
        return wan_aliases(checkpoint.tensors)

    def footprint(self, dtype: torch.dtype | None = None) -> ModelFootprint:
        """The model as the planner sees it, from the file's own byte counts; `dtype` is another one to compute in."""
        config, dtype = self.config, dtype or self.model.execution.dtype
        layouts = self.weights.layouts
        ops, steered = self.model.execution.ops, bool(config.vace_layers or config.camera_channels)
        copies_rows = self.costs.copies_rows and not self._compiled and not steered
        fixed = {name: self.weights.source.tensors[name].nbytes for name in self.weights.fixed_names()}
        return WanFootprint(
            name=self.checkpoint.path.name,
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            num_heads=config.num_heads,
            block_bytes=tuple(layout.nbytes for layout in layouts),
            fixed_bytes=sum(fixed.values()),
            transient_bytes=sum(size for name, size in fixed.items() if name.startswith(self.parts.transient)),
            text_kv_bytes=min((layout.nbytes - layout.stream_bytes for layout in layouts), default=0),
            scratch_elements=max((block.scratch_elements(dtype) for block in self.blocks), default=0),
            in_channels=config.in_channels,
            latent_channels=config.out_channels,
            text_tokens=config.text_tokens,
            image_tokens=config.image_pos_tokens or (257 if config.image_dim else 0),
            compute_bytes=dtype.itemsize,
            stage_bytes=() if self._compiled else self.costs.stage_bytes(layouts),
            packs_keys=self.computes_in_8_bits and not self._compiled and not self.model.execution.is_sparse,
            in_8_bits=self.computes_in_8_bits,
            streams_queries=not self.model.execution.is_sparse,
            row_bytes=self.costs.row_bytes(dtype, config.ffn_dim if self._compiled else 0),
            key_row_bytes=self.costs.key_row_bytes(dtype, config.dim),
            product_bytes=self.costs.product_bytes,
            copies_rows=copies_rows,
            norms_in_8_bits=copies_rows and self.costs.takes_late_rows and ops.makes_late_rows(config.dim),
            unpacked_bytes=self.costs.unpacked_bytes(dtype),
            brought_bytes=self.costs.brought_bytes(dtype),
            control_streams=1 if config.vace_layers else 0,
            ray_channels=config.camera_channels * PIXELS**2,
            vae=WAN22_VAE if config.out_channels == 48 else WAN21_VAE,
            home_bytes=tuple(layout.nbytes for layout in layouts),
            form=self.costs.form,
            attention=self.model.execution.attention.name,
        )

    def __call__(
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor,
        image_tokens: Tensor | None = None,
        extras: Extras = Extras(),  # noqa: B008 - immutable
    ) -> Tensor:
        """The velocity (see `WanModel`); when the device runs out of memory the pass is repeated with a leaner plan."""
        hooks = extras.visitor
        if self.several is not None and (hooks.sees_attention or hooks.sees_stream or hooks.sees_text):
            raise ValueError(NO_PATCHES_CARDS)
        self._plan_for(text, image_tokens)
        caches = self._caches_of(extras.prompts, len(latent))

        def run() -> Tensor:
            if self.several is None:
                shown = replace(extras, cache=caches.get(0))
                return self._velocity(Inputs(latent, timestep, text, image_tokens, shown, 0))
            known = self._parts_known(text, image_tokens)

            def bring(model: StreamedModel[WanModel], part: slice) -> Inputs:
                device = model.settings.device
                own = text[part], None if image_tokens is None else image_tokens[part]
                prompt = known.setdefault((part.start, part.stop), own)
                shown = extras.cut(part).to(device)
                return Inputs(latent[part].to(device), timestep[part].to(device), *prompt, shown, part.start)

            return self.several.run(len(latent), bring, make)

        def make(model: StreamedModel[WanModel], given: Inputs) -> Tensor:
            assert isinstance(model, StreamedWan)
            cache = model._own_cache(caches.get(given.first), self)
            return model._velocity(replace(given, extras=replace(given.extras, cache=cache)))

        velocity = self.retrying(run)
        for part in self._parts(len(latent)):
            cache = caches.get(part.start)
            if self.step_cache is not None and cache is not None:
                self.step_cache.done(extras.prompts[part], cache)
        return velocity

    def _parts(self, batch: int) -> list[slice]:
        """The samples of a batch that are decided on by themselves: all, or those that cards have."""
        if self.several is None:
            return [slice(0, batch)]
        parts = {part.start: part for part, _ in shared_samples(batch, self.several.num_cards)}
        return list(parts.values())

    def _caches_of(self, prompts: Prompts, batch: int) -> dict[int, PassCache]:
        """By the first of its samples, the step cache of each part that may be skipped."""
        if self.step_cache is None:
            return {}
        caches = {part.start: self.step_cache.of(prompts[part]) for part in self._parts(batch)}
        return {start: cache for start, cache in caches.items() if cache is not None}

    def _own_cache(self, cache: PassCache | None, first: StreamedWan) -> BlockCache | None:
        """This card's: the decision's, or what goes with it where another card of the same samples decides."""
        share, steps = self.model.share, first.step_cache
        if cache is None or steps is None or share is None or share.exchange.rank == share.ranks[0]:
            return cache
        return self._followed.setdefault(cache, FollowedCache(cache.probes, steps.room))

    def end_steps(self) -> None:
        super().end_steps()
        for followed in self._followed.values():
            followed.residual = None

    def make_plan(self, work: WorkSize, limits: Limits) -> MemoryPlan:
        """As `StreamedModel.make_plan`; a step cache's residuals are in VRAM where that is no slower than in RAM."""
        cache = self.step_cache
        if cache is None or not isinstance(work, WanWork):
            return super().make_plan(work, limits)
        in_ram = with_residuals(work, False)
        nbytes = self._residual_bytes(work)
        beside = _less_pinned(limits, nbytes)
        if cache.settings.residuals == "ram":
            return super().make_plan(in_ram, beside)
        try:
            plan = super().make_plan(with_residuals(work, True), limits)
        except PlanError:
            if cache.settings.residuals == "vram":
                raise
            return super().make_plan(in_ram, beside)
        if cache.settings.residuals == "vram" or limits.ram_is_the_device:
            return plan
        leaner = super().make_plan(in_ram, beside)
        copying = COPIES * nbytes / (limits.h2d_gbps * 1e9)
        return leaner if leaner.seconds_per_step + copying < plan.seconds_per_step else plan

    def _residual_bytes(self, work: WanWork) -> int:
        """Of all that a step cache keeps."""
        return work.residual_count * work.tokens * self.config.dim * self.model.execution.dtype.itemsize

    def start(self, plan: MemoryPlan, ring: DeviceRing | None = None) -> None:
        super().start(plan, ring)
        if self.step_cache is not None and isinstance(plan.work, WanWork):
            self.step_cache.in_ram = self.settings.device.type != "cpu" and not plan.work.residuals
            pins = self.settings.pinned_memory and plan.limits.pinned_cap_bytes != 0
            self.step_cache.pinnable_bytes = self._residual_bytes(plan.work) if pins else 0

    def use_step_cache(self, settings: StepCacheSettings | None) -> None:
        """Skip passes as these settings say; None: compute them all.

        ValueError where the method has no table for this model.
        """
        self.stop()
        self.step_cache = None
        if settings is None:
            return
        table = choose_table(settings, self.config, self.checkpoint.path)
        self.step_cache = StepCache(settings, table)

    def _velocity(self, given: Inputs) -> Tensor:
        device, context = self.settings.device, self.context(given.text, given.image_tokens)
        extras = self._with_context(given.extras)
        return self.model(given.latent.to(device), given.timestep.to(device), context, extras=extras)

    def _parts_known(self, text: Tensor, image_tokens: Tensor | None) -> _Parts:
        """What cards have of the prompts: the same tensors as long as the prompts are equal.

        By these a card knows its context of before, and need not wait for another's memory to compare them.
        """
        parts = _find(self._cuts, text, image_tokens)
        if parts is None:
            parts = {}
            self._cuts = [*self._cuts[1 - MAX_CONTEXTS :], (text, image_tokens, parts)]
        return parts

    def _with_context(self, extras: Extras) -> Extras:
        """The same, a negative prompt of attention with what is made of it once."""
        nag = extras.nag
        if nag is None:
            return extras
        return replace(extras, nag=replace(nag, context=self.context(nag.text, None, nag.embedded)))

    def context(self, text: Tensor, image_tokens: Tensor | None, embedded: bool = False) -> Context:
        """The embedded prompt, made once for equal input; its keys and values too where the plan says so.

        `embedded` text is one that the network need not embed any more.
        """
        known = _find(self._contexts, text, image_tokens)
        if known is not None:
            return known
        self._drop_contexts(len(text))
        device = self.settings.device
        if embedded:
            context = Context(text.to(device, self.model.execution.dtype))
        else:
            image = None if image_tokens is None else image_tokens.to(device)
            context = self.model.embed_context(text.to(device), image)
        if self.plan is not None and self.plan.choice.cache_text_kv:
            shelf = _Shelf(len(self.blocks))
            context.keys_values = self.visit(
                lambda block: shelf.take_in(cast(WanBlock, block).cross_attn.keys_values(context))
            )
        self._contexts.append((text, image_tokens, context))
        return context

    def embed_text(self, text: Tensor) -> Tensor:
        """The embedded text `[B, tokens, dim]` of a prompt; what makes it is brought where the model is stopped."""
        text = text.to(self.settings.device)
        if self.started:
            return self.model.embed_context(text).text
        names = [name for name in self.weights.fixed_names() if name.startswith("text_embedding.")]
        try:
            self.fixed.load(names)
            return self.model.embed_context(text).text
        finally:
            self.fixed.unload(names)

    def forget_contexts(self) -> None:
        self._contexts, self._dropped, self._cuts = [], [], []
        self.model.forget_angles()

    def _drop_contexts(self, num_new: int) -> None:
        """Make room for the contexts of `num_new` samples; keys and values have as much as was planned for."""
        plan, kept = self.plan, self._contexts
        most = plan.work.batch * plan.work.passes_per_step if plan is not None and plan.choice.cache_text_kv else None
        while kept and (len(kept) >= MAX_CONTEXTS or (most is not None and self._num_kept() + num_new > most)):
            text, image_tokens, _ = kept.pop(0)
            self._dropped = [*self._dropped[1 - MAX_CONTEXTS :], (text, image_tokens)]

    def _plan_for(self, text: Tensor, image_tokens: Tensor | None) -> None:
        """Plan anew where more prompts take turns than were planned for: their keys and values would go and come."""
        plan = self.plan
        if plan is None or not plan.choice.cache_text_kv:
            return
        if not any(_same(known, text) and _same(image, image_tokens) for known, image in self._dropped):
            return
        passes = -(-(self._num_kept() + len(text)) // plan.work.batch)
        try:
            more = self.make_plan(replace(plan.work, passes_per_step=passes), plan.limits)
        except PlanError:
            self._dropped.clear()  # not to plan in vain in every pass
            return
        logger.info("%d prompts take turns: planned anew for so many", passes)
        self.start_fitting(more, self._on_spans)

    def _num_kept(self) -> int:
        return sum(len(text) for text, _, _ in self._contexts)


class _Shelf:
    """Keys and values of all blocks in one allocation.

    Each by itself they would lie among what else is made of a block meanwhile, and keep the allocator from giving that
    back: about 0.15 GiB of a Wan 14B.
    """

    def __init__(self, num_blocks: int):
        self._num_blocks = num_blocks
        self._places: Iterator[Tensor] | None = None  # of one block each

    def take_in(self, made: KeysValues) -> KeysValues:
        """A block's, moved here; those of all blocks have the same shapes."""
        flat = [tensor for pair in made.pairs for tensor in pair]
        sizes = [tensor.numel() for tensor in flat]
        if self._places is None:
            self._places = iter(flat[0].new_empty(self._num_blocks, sum(sizes)))
        parts = next(self._places).split(sizes)
        kept = [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, flat, strict=True)]
        return KeysValues(list(zip(kept[::2], kept[1::2], strict=True)))


def _less_pinned(limits: Limits, nbytes: int) -> Limits:
    """What the blocks may have pinned beside residuals of so many bytes."""
    cap = limits.pinned_cap_bytes
    return limits if cap is None else replace(limits, pinned_cap_bytes=max(0, cap - nbytes))


def _find(known: Sequence[tuple[Tensor, Tensor | None, K]], text: Tensor, image_tokens: Tensor | None) -> K | None:
    """What is known of a prompt. The same tensors are looked for first: to compare others is to wait for a device."""
    for one, image, found in known:
        if one is text and image is image_tokens:
            return found
    return next((found for one, image, found in known if _same(one, text) and _same(image, image_tokens)), None)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two inputs are equal; hosts make a new tensor of the same prompt for every step."""
    if one is None or other is None or one is other:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and one.equal(other)
