"""A Wan transformer on a device that need not hold it: weights where the plan says, blocks streamed while they run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..memory.disk_blocks import DiskBlocks
from ..memory.footprint import WAN21_VAE, WAN22_VAE, Limits, ModelFootprint, WorkSize
from ..memory.host_buffers import CudaRegistrar, HostBlocks, PinnedBudget
from ..memory.lanes import Span, TimedLanes, lanes_for
from ..memory.layout import BlockLayout, Part, TensorSource, layout_block
from ..memory.lender import Lender
from ..memory.pinned import Registrar
from ..memory.plan import MemoryPlan, PlanError, plan_leaner, plan_memory
from ..memory.ring import DeviceRing
from ..memory.spool import Spool
from ..memory.streamer import BlockStreamer
from ..weights.compute import select_compute
from ..weights.lora import Lora, LoraChoice
from ..weights.lora_source import AttachedLoras
from ..weights.lora_source import Source as WeightSource
from ..weights.quantize import QuantizedSource, quantize_checkpoint
from .blocks import Context, WanBlock
from .checkpoint import build_wan, open_wan
from .loras import attach_wan_loras
from .model import Extras, here_already
from .settings import RunSettings

logger = logging.getLogger(__name__)

GIB = 2**30
# What only makes keys and values of the prompt: not needed in a pass once those are cached.
TEXT_KV = tuple(f"cross_attn.{layer}." for layer in ("k", "v", "norm_k", "k_img", "v_img", "norm_k_img"))
# Used once, before the blocks: with them it would have to stay until their tokens are embedded.
NOT_STREAMED = "before_proj."
# Needed before the blocks only, so they can share bytes with what comes later.
LENDABLE = ("text_embedding", "time_embedding", "time_projection", "img_emb")
NUM_READERS = 8  # threads
MAX_CONTEXTS = 4  # prompts remembered at a time


class StreamedWan:
    """One checkpoint's model with its host memory, its plan and, between `start` and `stop`, its device memory.

    Opening reads the header only. Raises CheckpointError for a file that is no Wan transformer.
    """

    def __init__(
        self,
        path: str | Path,
        settings: RunSettings,
        registrar: Registrar | None = None,
        between_blocks: Callable[[], None] | None = None,
        loras: Sequence[LoraChoice] = (),
    ):
        self.settings = settings
        self.between_blocks = between_blocks
        self.config, self.checkpoint = open_wan(path)
        self.checkpoint = quantize_checkpoint(self.checkpoint, settings.quantization, settings.device)
        self.model = build_wan(self.config, self.checkpoint)
        self.model.execution = settings.execution(self.config)
        select_compute(self.model, list(self.model.ordered_blocks().values()), settings.quantization, settings.device)
        dtype = self.model.execution.dtype
        self.loras = attach_wan_loras(self.model, self.checkpoint, loras, dtype, settings.lora_mode)
        # what is read: the file's tensors, perhaps with LoRAs beside them or merged into them
        self.weights: TensorSource = self.loras.source() if loras else self.checkpoint
        self.blocks = list(self.model.ordered_blocks().values())
        self.layouts = self._lay_out()
        self.limits: Limits | None = None
        self.plan: MemoryPlan | None = None
        self.source: HostBlocks | DiskBlocks | None = None
        self.spool: Spool | None = None
        self.streamer: BlockStreamer | None = None
        self.lender: Lender | None = None
        self.ring: DeviceRing | None = None
        self._timed_since = 0.0
        self._contexts: list[tuple[Tensor, Tensor | None, Context]] = []
        self._registrar = registrar
        if registrar is None and settings.device.type == "cuda" and settings.pinned_memory:
            self._registrar = CudaRegistrar(settings.device)

    def footprint(self, dtype: torch.dtype | None = None) -> ModelFootprint:
        """The model as the planner sees it, from the file's own byte counts; `dtype` is another one to compute in."""
        config, dtype = self.config, dtype or self.model.execution.dtype
        fixed = {name: self.weights.tensors[name].nbytes for name in self._fixed_names()}
        return ModelFootprint(
            name=self.checkpoint.path.name,
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            num_heads=config.num_heads,
            block_bytes=tuple(layout.nbytes for layout in self.layouts),
            fixed_bytes=sum(fixed.values()),
            lendable_bytes=sum(size for name, size in fixed.items() if name.startswith(LENDABLE)),
            text_kv_bytes=min((layout.nbytes - layout.stream_bytes for layout in self.layouts), default=0),
            scratch_elements=max((block.scratch_elements(dtype) for block in self.blocks), default=0),
            in_channels=config.in_channels,
            latent_channels=config.out_channels,
            text_tokens=config.text_tokens,
            image_tokens=config.image_pos_tokens or (257 if config.image_dim else 0),
            compute_bytes=dtype.itemsize,
            control_streams=1 if config.vace_layers else 0,
            vae=WAN22_VAE if config.out_channels == 48 else WAN21_VAE,
        )

    def make_plan(self, work: WorkSize, limits: Limits) -> MemoryPlan:
        """The plan for this work; PlanError names what would fit where this does not."""
        if self.settings.device.type == "cpu" and limits.ram_budget_bytes is not None and limits.blocks_to_swap < 0:
            # RAM is the device: no block is resident for free
            limits = replace(limits, blocks_to_swap=len(self.layouts))
        self.limits = limits
        return plan_memory(self.footprint(), work, limits)

    def read(self, plan: MemoryPlan) -> None:
        """Bring the blocks into host memory (or get ready to read them from disk); again is harmless."""
        if self.source is not None:
            return
        budget = self._pinned_budget()
        if plan.from_disk:
            if isinstance(self.checkpoint, QuantizedSource):
                raise ValueError(
                    f"{self.checkpoint.path.name} cannot be quantised to {self.settings.quantization} and streamed "
                    "from disk at once: the quantised bytes are in no file. Convert it first (lowvram-video convert), "
                    "or raise the RAM budget"
                )
            self.spool = Spool(self.weights, self.layouts)
            self.source = DiskBlocks(self.spool, self.layouts, budget, plan.num_staging)
        else:
            streamed = [index for index in range(plan.num_blocks) if index not in plan.resident_blocks]
            self.source = HostBlocks(self.weights, self.layouts, budget, pin=streamed, check=self.between_blocks)

    def _pinned_budget(self) -> PinnedBudget | None:
        if self._registrar is None or not self.settings.pinned_memory:
            return None
        return PinnedBudget(self._registrar, self.limits.pinned_cap_bytes if self.limits else None)

    def start(self, plan: MemoryPlan, ring: DeviceRing | None = None) -> None:
        """Put the model on its device as the plan says. `ring` is one shared with another expert of the same layout."""
        self.stop()
        self.read(plan)
        assert self.source is not None
        self.plan = plan
        try:
            self._load_fixed(plan)
            self.loras.place(self.settings.device)
            part = Part.STREAM if plan.cache_text_kv else Part.ALL
            self.ring = ring or self._make_ring(plan)
            self._timed_since = time.perf_counter()
            self.streamer = BlockStreamer(
                [self.blocks],
                self.source,
                self.settings.device,
                ring=self.ring,
                resident=plan.resident_blocks,
                part=part,
                between_blocks=self.between_blocks,
            )
            self.streamer.load()
        except BaseException:
            self.stop()
            raise
        self.model.stream = self.streamer
        self.model.execution = replace(self.model.execution, token_chunk=plan.token_chunk, head_groups=plan.head_groups)

    def stop(self) -> None:
        """Give the device memory back; the weights stay in host memory. Again is harmless."""
        self.model.stream = iter
        self.model.lend = here_already
        lender, self.lender = self.lender, None
        if lender is not None:
            lender.release()
        self._contexts.clear()
        streamer, self.streamer, self.ring = self.streamer, None, None
        if streamer is not None:
            streamer.unload()
        for name in self._fixed_names():
            info = self.weights.tensors[name]
            self._assign(name, torch.empty(info.shape, dtype=info.dtype, device="meta"))

    def release(self) -> None:
        """Give device and host memory back."""
        self.stop()
        source, self.source = self.source, None
        if source is not None:
            source.release()
        spool, self.spool = self.spool, None
        if spool is not None:
            spool.close()

    def __call__(
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor,
        image_tokens: Tensor | None = None,
        extras: Extras = Extras(),  # noqa: B008 - immutable
    ) -> Tensor:
        """The velocity (see `WanModel`); when the device runs out of memory the pass is repeated with a leaner plan."""
        while True:
            try:
                return self.model(latent, timestep, self.context(text, image_tokens), extras=extras)
            except torch.cuda.OutOfMemoryError:
                leaner = self._leaner_plan()
                if leaner is None:
                    raise
            # outside the handler: its traceback holds the failed pass's activations
            self.stop()
            torch.cuda.empty_cache()
            self.start(leaner)

    def context(self, text: Tensor, image_tokens: Tensor | None) -> Context:
        """The embedded prompt, made once for equal input; its keys and values too where the plan says so."""
        for known_text, known_image, context in self._contexts:
            if _same(known_text, text) and _same(known_image, image_tokens):
                return context
        del self._contexts[: len(self._contexts) + 1 - MAX_CONTEXTS]
        device = self.settings.device
        context = self.model.embed_context(text.to(device), None if image_tokens is None else image_tokens.to(device))
        if self.plan is not None and self.plan.cache_text_kv:
            self._cache_keys_values(context)
        self._contexts.append((text, image_tokens, context))
        return context

    def set_lora_strengths(self, strengths: Sequence[float]) -> None:
        """Other strengths, one per LoRA; nothing is read again but what LoRAs are merged into."""
        self.forget_contexts()  # LoRAs change them too
        self.loras.set_strengths(strengths)
        if self.loras.are_merged:
            self.release()
            self.weights = self.loras.source()

    def attach_loras(
        self, loras: Sequence[Lora], strengths: Sequence[float], source: WeightSource | None = None
    ) -> None:
        """Have these LoRAs on the model, which is stopped for it, in place of those it has.

        `source` holds its tensors where they are not the file's. Host memory stays, and is read again, where every
        tensor keeps its place.
        """
        self.stop()
        self.loras.detach()
        source = source or self.checkpoint
        dtype, mode = self.model.execution.dtype, self.settings.lora_mode
        self.loras = AttachedLoras(self.model, source, loras, strengths, dtype, mode)
        self.weights = self.loras.source() if loras else source
        before, self.layouts = self.layouts, self._lay_out()
        if not isinstance(self.source, HostBlocks) or before != self.layouts:
            self.release()
            return
        try:
            self.source.refill(self.weights, self.between_blocks)
        except BaseException:  # an interrupt too leaves them half read
            self.release()
            raise

    def spans(self) -> tuple[list[Span], float]:
        """What the timed lanes did since the last call, and how many seconds ago their clock began."""
        if self.ring is None or not isinstance(self.ring.lanes, TimedLanes):
            return [], 0.0
        return self.ring.lanes.spans(), time.perf_counter() - self._timed_since

    def forget_contexts(self) -> None:
        """Free what was made of prompts."""
        self._contexts.clear()

    @property
    def started(self) -> bool:
        return self.streamer is not None

    @property
    def device_bytes(self) -> int:
        """Bytes of weights, and of the ring for them, on the device; 0 unless started."""
        if self.plan is None or not self.started:
            return 0
        memory = self.plan.denoise
        return memory.fixed_weights + memory.residents + memory.ring

    @property
    def largest_block_bytes(self) -> int:
        return max(layout.nbytes for layout in self.layouts)

    @property
    def host_bytes(self) -> int:
        return 0 if self.source is None else self.source.host_bytes

    @property
    def pinned_bytes(self) -> int:
        lent = 0 if self.lender is None else self.lender.pinned_bytes
        return lent + (0 if self.source is None else self.source.pinned_bytes)

    def _lay_out(self) -> list[BlockLayout]:
        layouts = []
        for prefix, block in self.model.ordered_blocks().items():
            names = [name for name in block.state_dict() if not name.startswith(NOT_STREAMED)]
            text_kv = {name for name in names if name.startswith(TEXT_KV)}
            layouts.append(layout_block(self.weights, prefix, names, text_kv))
        return layouts

    def _cache_keys_values(self, context: Context) -> None:
        """One pass over the blocks with only the weights that this takes; they then stay at home."""
        assert self.source is not None
        sizes = [layout.part_bytes(Part.OPTIONAL) for layout in self.layouts]
        ring = None if self.ring is None else DeviceRing(2 * max(sizes), self.settings.device)
        visitor = BlockStreamer(
            [self.blocks], self.source, self.settings.device, ring=ring, part=Part.OPTIONAL,
            between_blocks=self.between_blocks,
        )  # fmt: skip
        try:
            visitor.load()
            context.keys_values = [
                cast(WanBlock, block).cross_attn.keys_values(context) for block in visitor(self.blocks)
            ]
        finally:
            visitor.unload()
        if self.streamer is not None:  # both read from one source: what was prefetched is asked for again
            self.streamer.lose_ring()

    def _leaner_plan(self) -> MemoryPlan | None:
        if self.plan is None or self.limits is None:
            return None
        try:
            leaner = plan_leaner(self.footprint(), self.limits, self.plan)
        except PlanError:
            return None
        logger.warning(
            "out of VRAM under a plan of %.2f GiB: the pass is repeated with one of %.2f GiB; no step is lost",
            self.plan.predicted_denoise_bytes / GIB,
            leaner.predicted_denoise_bytes / GIB,
        )
        return leaner

    def _make_ring(self, plan: MemoryPlan) -> DeviceRing | None:
        if self.settings.device.type == "cpu" and not plan.from_disk:
            return None  # the blocks run where they lie
        return DeviceRing(plan.ring_bytes, self.settings.device, lanes_for(self.settings.device, self.settings.timed))

    def _fixed_names(self) -> list[str]:
        """Parameters outside what is streamed."""
        streamed = {f"{layout.prefix}.{place.name}" for layout in self.layouts for place in layout.places}
        return [name for name in self.model.state_dict() if name not in streamed]

    def _load_fixed(self, plan: MemoryPlan) -> None:
        device = self.settings.device
        lent = LENDABLE if plan.lend_fixed and device.type != "cpu" else ()
        if lent:
            modules = {name: module for name in LENDABLE if (module := getattr(self.model, name)) is not None}
            self.lender = Lender(self.weights, modules, device, self._pinned_budget())
            self.model.lend = self.lender
        names = [name for name in self._fixed_names() if not name.startswith(lent)]
        with ThreadPoolExecutor(NUM_READERS) as readers:
            for name, tensor in zip(names, readers.map(self._read, names), strict=True):
                self._assign(name, tensor.to(device))

    def _read(self, name: str) -> Tensor:
        info = self.weights.tensors[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self.weights.read_into(name, raw)
        return raw.view(info.dtype).view(info.shape)

    def _assign(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor, requires_grad=False))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two inputs are equal; hosts make a new tensor of the same prompt for every step."""
    if one is None or other is None or one is other:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and one.equal(other)
