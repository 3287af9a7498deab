"""The published models as the planner sees them, without their files: all that a plan needs is in their dimensions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..framepack.footprint import SectionSize
from ..framepack.network.config import FramePackConfig
from ..framepack.network.model import FramePackModel
from ..framepack.sections import num_frames
from ..framepack.streamed import StreamedFramePack
from ..memory.plan.footprint import ModelFootprint, WorkSize
from ..runtime.settings import RunSettings
from ..wanvideo.footprint import wan_work
from ..wanvideo.network.config import WanConfig
from ..wanvideo.network.model import WanModel
from ..wanvideo.streamed import StreamedWan
from ..weights.files.checkpoint import Checkpoint, TensorInfo
from ..weights.files.gguf import PACKED_TYPES
from ..weights.linear.fp8 import FP8
from ..weights.linear.quantize import HIGH_PRECISION, IN_BLOCK

BF16 = "bf16"
# By their names for people: how the blocks' weights are stored, and the quantization that they run with.
FORMS: Mapping[str, tuple[str, str]] = {
    "bf16": (BF16, "none"),
    "fp8": (FP8, "none"),
    "fp8 with fp8_fast": (FP8, "fp8_fast"),
    "int8 of fp8": (FP8, "int8"),
    "Q8_0": ("Q8_0", "none"),
    "Q4_K": ("Q4_K", "none"),
}
NOWHERE = Path("no file")


@dataclass(frozen=True)
class PublishedModel:
    """A model in a form of FORMS, and a work that it was made for."""

    title: str
    form: str
    footprint: Callable[[], ModelFootprint]
    work: WorkSize


class _Wan(StreamedWan):
    """A Wan transformer that is in no file."""

    def __init__(self, config: WanConfig, stored: str, settings: RunSettings):
        self._made = config, imagined_checkpoint(WanModel(config, device="meta"), stored)
        super().__init__(NOWHERE, settings)

    def open_file(self, path: str | Path) -> tuple[WanConfig, Checkpoint]:
        return self._made


class _FramePack(StreamedFramePack):
    """A FramePack transformer that is in no file."""

    def __init__(self, config: FramePackConfig, stored: str, settings: RunSettings):
        self._made = config, imagined_checkpoint(FramePackModel(config, device="meta"), stored)
        super().__init__(NOWHERE, settings)

    def open_file(self, path: str | Path) -> tuple[FramePackConfig, Checkpoint]:
        return self._made


def imagined_checkpoint(model: nn.Module, stored: str) -> Checkpoint:
    """What a file of this model would hold: the blocks' weights in a form, the rest in bf16."""
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in model.state_dict().items():
        match = IN_BLOCK.search(name)
        shape = tuple(tensor.shape)
        is_packed = match is not None and len(shape) == 2 and not HIGH_PRECISION.search(match["path"])
        for info in _infos(name, shape, stored if is_packed else BF16):
            tensors[info.name] = info
    return Checkpoint(NOWHERE, tensors, {})


def _infos(name: str, shape: tuple[int, ...], stored: str) -> list[TensorInfo]:
    elements = math.prod(shape)
    if stored == BF16:
        return [TensorInfo(name, torch.bfloat16, shape, NOWHERE, 0, 2 * elements)]
    if stored == FP8:
        scale = re.sub(r"weight$", "weight_scale", name)
        return [
            TensorInfo(name, torch.float8_e4m3fn, shape, NOWHERE, 0, elements, FP8),
            TensorInfo(scale, torch.float32, (), NOWHERE, 0, 4),
        ]
    block = PACKED_TYPES[stored]
    packed = (*shape[:-1], shape[-1] // block.elements * block.nbytes)
    return [TensorInfo(name, torch.uint8, packed, NOWHERE, 0, math.prod(packed), stored, shape)]


def wan_footprint(config: WanConfig, form: str) -> ModelFootprint:
    """A Wan transformer in a form of FORMS, as it computes in bf16."""
    stored, settings = _settings(form)
    return _Wan(config, stored, settings).footprint()


def framepack_footprint(form: str) -> ModelFootprint:
    """FramePack's transformer in a form of FORMS, as it computes in bf16."""
    stored, settings = _settings(form)
    return _FramePack(FramePackConfig(), stored, settings).footprint()


def _settings(form: str) -> tuple[str, RunSettings]:
    stored, quantization = FORMS[form]
    return stored, RunSettings(dtype=torch.bfloat16, quantization=quantization, attention_mode="sdpa")


SMALL = WanConfig("t2v", 1536, 8960, 12, 30)
FIVE = WanConfig("ti2v", 3072, 14336, 24, 30, in_channels=48, out_channels=48)
LARGE = WanConfig("t2v", 5120, 13824, 40, 40)
EXPERT = WanConfig("i2v", 5120, 13824, 40, 40, in_channels=36)


def published_models() -> tuple[PublishedModel, ...]:
    """What steps are told of."""
    video, large_video = (832, 480, 81), (1280, 720, 81)

    def wan(title: str, config: WanConfig, form: str, size: tuple[int, int, int]) -> PublishedModel:
        return PublishedModel(title, form, partial(wan_footprint, config, form), wan_work(config, size))

    section = SectionSize(num_frames(9), 608, 640)
    return (
        wan("Wan 2.1 1.3B", SMALL, "bf16", video),
        wan("Wan 2.2 TI2V 5B", FIVE, "fp8", (1280, 704, 121)),
        wan("Wan 2.1 14B", LARGE, "fp8", video),
        wan("Wan 2.1 14B", LARGE, "fp8 with fp8_fast", video),
        wan("Wan 2.1 14B", LARGE, "Q4_K", video),
        wan("Wan 2.1 14B", LARGE, "fp8", large_video),
        wan("Wan 2.2 I2V A14B, each expert", EXPERT, "fp8", video),
        PublishedModel("FramePack", "fp8", partial(framepack_footprint, "fp8"), section),
    )
