"""How a run may use the machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..attention.backend import AttentionSpec
from ..attention.select import select_attention
from ..attention.sparse.settings import SparseSettings
from ..fused.select import select_fused_ops
from ..memory.plan.parking import ParkSpec
from ..sampling.caching.settings import StepCacheSettings
from ..system.dtypes import half_dtype
from ..system.processors import processors_of
from ..transformer.execution import Execution

CPU = torch.device("cpu")
# what a run may compute in, as people choose it; None: as suits the device
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def use_device(name: str) -> torch.device:
    """The device of this name, from here on this thread's current one: there Triton launches its kernels.

    ValueError where this machine has none.
    """
    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def find_device(name: str) -> torch.device:
    """The device of this name; ValueError where this machine has none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} does not exist: use cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "no NVIDIA GPU was found" if torch.version.cuda or torch.version.hip else "this PyTorch is a CPU build"
        raise ValueError(f"device {name!r} cannot be used: {why}; use cpu, or install PyTorch for your GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} does not exist: this machine has {torch.cuda.device_count()} GPU(s)")
    return device


@dataclass(frozen=True)
class RunSettings:
    """Device, precision and limits. None means: chosen for the device, or planned.

    `vram_budget_gib` is a hard limit for the whole process; `ram_budget_gib` below the model's size makes its blocks
    stream from the disk. `blocks_to_swap` -1 is planned, 0 ... N by hand; `prefetch` blocks arrive ahead of use.
    """

    device: torch.device = CPU
    dtype: torch.dtype | None = None
    attention_mode: str = "auto"
    quantization: str = "none"  # see weights/linear/compute.py
    lora_mode: str = "auto"  # see weights/lora/attach.py
    vram_budget_gib: float | None = None
    ram_budget_gib: float | None = None
    blocks_to_swap: int = -1
    prefetch: int | None = None
    pinned_memory: bool = True
    batched_guidance: bool = False
    sparse: SparseSettings | None = None  # what self-attention may leave out; None: nothing
    step_cache: StepCacheSettings | None = None  # which passes of a run may be skipped; None: none
    keep_loaded: bool = False  # text encoder and VAE stay in RAM between videos
    keep_model: bool = False  # so do the transformer's weights, alone: the next video's plan counts what they hold
    others: tuple[torch.device, ...] = ()  # cards that share the device's passes
    parking: ParkSpec | None = None  # where streamed blocks lie, beside RAM; None: in RAM or on the disk
    staged_exchange: bool = False  # cards exchange through pinned RAM, also where they reach each other

    @property
    def cards(self) -> tuple[torch.device, ...]:
        """All devices that a pass is made on."""
        return self.device, *self.others

    @property
    def joins_guidance(self) -> bool:
        """Whether cond and uncond are one batch: chosen, or as an even number of cards has half of them each."""
        return self.batched_guidance or len(self.cards) % 2 == 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32 on a CPU; bf16 on a GPU that has it, else fp16."""
        if self.dtype is not None:
            return self.dtype
        if self.device.type != "cuda":
            return torch.float32
        return half_dtype(self.device)

    def execution(self, head_dim: int) -> Execution:
        """Backends for this device; chunk sizes come with the plan. ValueError where the attention mode cannot run."""
        spec = AttentionSpec(self.device, self.compute_dtype, head_dim)
        return Execution(
            self.compute_dtype,
            select_attention(self.attention_mode, spec),
            select_fused_ops(self.device),
            processors=processors_of(self.device),
        )
