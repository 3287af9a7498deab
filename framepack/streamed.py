"""A FramePack transformer whose blocks stream; what depends on step and prompt alone is made once per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..memory.plan.footprint import ModelFootprint
from ..memory.plan.plan import MemoryPlan
from ..memory.stream.layout import Part
from ..memory.stream.pinned import Registrar
from ..runtime.host_weights import WeightParts
from ..runtime.settings import RunSettings
from ..runtime.streamed import StreamedModel
from ..sampling.caching.followed_cache import FollowedCache
from ..sampling.schedules import NUM_TRAIN_TIMESTEPS
from ..transformer.block_cache import BlockCache
from ..weights.files.checkpoint import Checkpoint
from ..weights.lora.file import LoraChoice
from ..weights.lora.names import Aliases
from .checkpoint import build_framepack, open_framepack
from .footprint import FramePackFootprint
from .lora_names import framepack_aliases
from .network.blocks import SingleBlock
from .network.config import FramePackConfig
from .network.model import FramePackModel, Frames, History, Prompt, StepCondition
from .sections import SectionMode

# Modulation: a quarter of all weights, which act on one vector per step.
MODULATION = ("norm1.linear.", "norm1_context.linear.", "norm.linear.")


class Inputs(NamedTuple):
    """What a card's pass is made of: see `FramePackModel`."""

    noisy: Frames
    history: History
    condition: StepCondition
    image: Tensor | None


class StreamedFramePack(StreamedModel[FramePackModel]):
    """A FramePack checkpoint.

    `model_type` is "base" or "f1", or "auto": by the file's metadata or name, as their weights have the same names.
    """

    config: FramePackConfig
    parts = WeightParts(
        optional=MODULATION, per_run=("time_text_embed.", "context_embedder.", "image_projection.", "norm_out.")
    )

    def __init__(
        self,
        path: str | Path,
        settings: RunSettings,
        registrar: Registrar | None = None,
        between_blocks: Callable[[], None] | None = None,
        loras: Sequence[LoraChoice] = (),
        model_type: str = "auto",
    ):
        self._model_type = model_type
        self._followed: WeakKeyDictionary[BlockCache, FollowedCache] = WeakKeyDictionary()
        super().__init__(path, settings, registrar, between_blocks, loras)

    def open_file(self, path: str | Path) -> tuple[FramePackConfig, Checkpoint]:
        return open_framepack(path, self._model_type)

    def open_beside(self, device: torch.device, between_blocks: Callable[[], None]) -> StreamedFramePack:
        settings = self.settings_beside(device)
        return StreamedFramePack(self.path, settings, None, between_blocks, self._loras, self._model_type)

    def build(self, checkpoint: Checkpoint) -> FramePackModel:
        return build_framepack(self.config, checkpoint)

    def lora_aliases(self, checkpoint: Checkpoint) -> Aliases:
        return framepack_aliases(checkpoint.tensors)

    @property
    def mode(self) -> SectionMode:
        """Whether sections are made from the end (base) or from the start (F1)."""
        return cast(SectionMode, self.config.model_type)

    def footprint(self, dtype: torch.dtype | None = None) -> ModelFootprint:
        """The model as the planner sees it, from the file's own byte counts; `dtype` is another one to compute in."""
        config, dtype = self.config, dtype or self.model.execution.dtype
        layouts = self.weights.layouts
        fixed = [name for name in self.weights.fixed_names() if not name.startswith(self.parts.per_run)]
        singles = [block for block in self.blocks if isinstance(block, SingleBlock)]
        return FramePackFootprint(
            name=self.checkpoint.path.name,
            dim=config.dim,
            ffn_dim=config.mlp_dim,
            num_heads=config.num_heads,
            block_bytes=tuple(layout.stream_bytes for layout in layouts),
            per_run_bytes=sum(layout.part_bytes(Part.OPTIONAL) for layout in layouts),
            fixed_bytes=sum(self.weights.source.tensors[name].nbytes for name in fixed),
            scratch_elements=max((block.scratch_elements(dtype) for block in self.blocks), default=0),
            in_channels=config.in_channels,
            latent_channels=config.out_channels,
            compute_bytes=dtype.itemsize,
            in_8_bits=self.computes_in_8_bits,
            stage_bytes=() if self._compiled else self.costs.stage_bytes(layouts),
            row_bytes=self.costs.row_bytes(dtype, config.mlp_dim if self._compiled else 0),
            key_row_bytes=self.costs.key_row_bytes(dtype, config.dim),
            product_bytes=self.costs.product_bytes,
            unpacked_bytes=self.costs.unpacked_bytes(dtype),
            vae=None,
            num_double=config.num_layers,
            norms_once=not self._compiled and all(block.proj_out.is_dense(dtype) for block in singles),
            home_bytes=tuple(layout.nbytes for layout in layouts),
            form=self.costs.form,
            attention=self.model.execution.attention.name,
        )

    def prepared(
        self,
        plan: MemoryPlan,
        prompts: Sequence[Prompt],
        features: Sequence[Tensor | None],
        timesteps: Tensor,
        guidance: float,
    ) -> tuple[list[list[StepCondition]], list[Tensor | None]]:
        """What each step sees of every prompt, and the tokens of every picture's features, in host memory.

        Call it before `start`: its weights and those of a pass are not on the device at the same time. `timesteps [S]`
        and `guidance` are times 1000; a prompt with a guidance of its own has that. Equal features in a row share
        their tokens.
        """
        device, home = self.settings.device, torch.device("cpu")
        conditions: list[list[StepCondition]] = []
        images: list[Tensor | None] = []
        with self.preparing(plan):
            for prompt in prompts:
                own = guidance if prompt.guidance is None else prompt.guidance * NUM_TRAIN_TIMESTEPS
                made = self.model.conditions(prompt.to(device), timesteps, own, self.visit)
                conditions.append([condition.to(home) for condition in made])
            for index, tokens in enumerate(features):
                before = features[index - 1] if index else None
                if tokens is not None and before is not None and tokens.equal(before):
                    images.append(images[-1])
                else:
                    images.append(None if tokens is None else self.model.embed_image(tokens.to(device)).to(home))
        return conditions, images

    def end_steps(self) -> None:
        super().end_steps()
        for cache, followed in self._followed.items():  # both: cards would not skip the same passes
            cache.residual = followed.residual = None

    def __call__(
        self,
        noisy: Frames,
        history: History,
        condition: StepCondition,
        image: Tensor | None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """The velocity (see `FramePackModel`); when the device runs out of memory, again with a leaner plan."""
        if self.several is None:
            condition = condition.to(self.settings.device)
            return self.retrying(lambda: self.model(noisy, history, condition, image, cache))
        several = self.several

        def bring(model: StreamedModel[FramePackModel], _: slice) -> Inputs:
            device = model.settings.device
            shown = image if image is None else image.to(device)
            return Inputs(noisy.to(device), history.to(device), condition.to(device), shown)

        def make(model: StreamedModel[FramePackModel], given: Inputs) -> Tensor:
            assert isinstance(model, StreamedFramePack)
            own = cache if model is self or cache is None else model._followed.setdefault(cache, FollowedCache())
            return model.model(*given, own)

        return self.retrying(lambda: several.run(1, bring, make))
