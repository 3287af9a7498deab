"""A pass over one section of a full-size FramePack, whose file is a header and nothing behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lowvram_video.benchmarks.synthetic import CONFIGS, write_lora
from lowvram_video.framepack.footprint import SectionSize, guides
from lowvram_video.framepack.network.config import IMAGE_TOKENS, FramePackConfig
from lowvram_video.framepack.network.model import Frames, History, StepCondition, StepNag
from lowvram_video.framepack.sections import num_frames
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.memory.plan.footprint import GIB, Limits
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.transformer.nag import NagSettings
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.lora.file import LoraChoice
from torch import Tensor

from .dry_models import RATES, write_header
from .dry_pass import CountedMemory, DryAttention, dry, use_gpu_kernels

TEXT_TOKENS = 512
WINDOW = 9  # latent frames that are made at once


@dataclass(frozen=True)
class Section:
    """FramePack at a size (width, height) in a budget; all blocks are streamed where `streamed`."""

    stored: str
    size: tuple[int, int]
    budget_gib: float
    quantization: str = "none"
    attention: DryAttention = DryAttention()  # noqa: RUF009 - has no state
    rank: int = 0
    guided: bool = False
    streamed: bool = True

    def __str__(self) -> str:
        more = [word for word, there in (("lora", self.rank), ("guided", self.guided)) if there]
        words = [self.stored, self.quantization, self.attention.name, "x".join(map(str, self.size)), *more]
        return "-".join([*words, f"{self.budget_gib:g}"])

    @property
    def limits(self) -> Limits:
        swap = 60 if self.streamed else -1
        return Limits(int(self.budget_gib * GIB), attention=self.attention.workspace, blocks_to_swap=swap, **RATES)

    @property
    def work(self) -> SectionSize:
        width, height = self.size
        return SectionSize(num_frames(WINDOW), height, width, step_cache=False, nag=self.guided)


def opened(section: Section, folder: Path) -> StreamedFramePack:
    """The model of a section, its file in a folder where it is made if it is not there."""
    config = CONFIGS["framepack"]
    assert isinstance(config, FramePackConfig)
    path = folder / f"framepack_{section.stored}.safetensors"
    if not path.exists():
        write_header(path, config, section.stored)
    loras = []
    if section.rank:
        loras = [LoraChoice(folder / "framepack_lora.safetensors")]
        write_lora(loras[0].path, config, section.rank)
    model = StreamedFramePack(path, RunSettings(torch.device("cpu"), torch.bfloat16), loras=loras)
    busy = [module for block in model.blocks for module in block.busy_modules()]
    select_compute(model.model, busy, section.quantization, torch.device("cpu"))
    use_gpu_kernels(model, section.attention)
    return model


def bytes_of_section(model: StreamedFramePack, plan: MemoryPlan) -> int:
    """The most that a pass under this plan has at a time, beside the weights."""
    work = plan.work
    assert isinstance(work, SectionSize)
    with dry(model, plan) as network:
        height, width = work.latent_size[1:]

        def frames(count: int) -> Frames:
            return Frames(torch.empty(1, model.config.in_channels, count, height, width), torch.arange(count))

        history = History(frames(work.clean_frames), frames(2), frames(16))
        noisy = frames(WINDOW)
        with CountedMemory() as memory:
            condition = condition_of(model)
            if guides(work):
                condition = replace(condition, nag=StepNag(condition_of(model), NagSettings()))
            image = torch.empty(IMAGE_TOKENS, model.config.dim, dtype=torch.bfloat16)
            memory.peak = memory.now
            network(noisy, history, condition, image)
    return memory.peak


def condition_of(model: StreamedFramePack) -> StepCondition:
    """What a step sees of a prompt: the modulation of all blocks has memory, that of the few that run is given."""
    dim, blocks = model.config.dim, model.model.ordered_blocks()

    def made(*size: int) -> Tensor:
        return torch.empty(*size, dim, dtype=torch.bfloat16)

    vectors = [12 if name.startswith("transformer_blocks") else 3 for name in blocks]
    return StepCondition(made(TEXT_TOKENS), tuple(made(count) for count in vectors), made(2))
