"""ComfyUI's weight patches: plain LoRAs run beside linear layers, others are merged into weights as they are read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..host_memory import allocate_bytes
from ..weights.formats import format_for
from ..weights.linear import Linear, WeightFormat
from ..weights.lora import Lora, LoraReport, LowRankPair
from ..weights.lora_merge import can_requantize, requantize
from ..weights.lora_source import made_from
from ..weights.reader import Checkpoint, TensorInfo
from . import host

logger = logging.getLogger(__name__)

PREFIX = "diffusion_model."  # of our parameters' names in ComfyUI's model
SCALE = "weight_scale"
IN_MEMORY = Path("a LoRA loaded by ComfyUI")


@dataclass(frozen=True)
class SortedPatches:
    """A ModelPatcher's patches: `beside` by layer, each a LoRA of its own with its own strength; `merged` by key."""

    beside: Sequence[tuple[str, host.LowRankPatch]] = ()
    merged: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def strengths(self) -> list[float]:
        return [patch.strength for _, patch in self.beside]

    def loras(self) -> list[Lora]:
        """Those that run beside layers."""
        loras = []
        for layer, patch in self.beside:
            factors = PatchFactors(IN_MEMORY, {}, {}, patch.up, patch.down)
            pair = LowRankPair("down", "up", patch.down.shape[0], patch.scale)
            loras.append(Lora(factors, {layer: pair}, {}, LoraReport(IN_MEMORY, 1, {})))
        return loras

    def same_but_strengths(self, other: SortedPatches) -> bool:
        """Whether nothing need be read for one after the other; ComfyUI's loaders keep the tensors of their file."""
        return (
            not (self.merged or other.merged)
            and len(self.beside) == len(other.beside)
            and all(
                layer == other_layer
                and patch.up is known.up
                and patch.down is known.down
                and patch.scale == known.scale
                for (layer, patch), (other_layer, known) in zip(self.beside, other.beside, strict=True)
            )
        )


@dataclass(frozen=True)
class PatchFactors(Checkpoint):
    """A LoRA's factors of one layer, which ComfyUI holds in memory."""

    up: Tensor
    down: Tensor

    def read(self, name: str) -> Tensor:
        return self.up if name == "up" else self.down


def sort_patches(patches: Mapping[str, Sequence[Any]], model: nn.Module) -> SortedPatches:
    """Patches of a model by what is done with them; those of one weight stay together, as their order may matter."""
    linear = {
        f"{PREFIX}{name}.weight": (name, module) for name, module in model.named_modules() if isinstance(module, Linear)
    }
    beside: list[tuple[str, host.LowRankPatch]] = []
    merged: dict[str, Sequence[Any]] = {}
    for key, found in patches.items():
        layer, module = linear.get(key, ("", None))
        low_rank = [patch for each in found if (patch := host.low_rank_patch(each)) is not None]
        if module is not None and len(low_rank) == len(found) and all(_fits(patch, module) for patch in low_rank):
            beside += [(layer, patch) for patch in low_rank]
        else:
            merged[key] = list(found)
    return SortedPatches(beside, merged)


def _fits(patch: host.LowRankPatch, layer: Linear) -> bool:
    (out, rank), (same_rank, inner) = patch.up.shape, patch.down.shape
    return rank == same_rank and (out, inner) == (layer.out_features, layer.in_features)


class PatchedCheckpoint:
    """A checkpoint's tensors with patches merged into them; the file itself stays as it is.

    `patches` are those of a ModelPatcher, by ComfyUI's key. ValueError where a patched weight cannot be merged into.
    """

    def __init__(self, checkpoint: Checkpoint, patches: Mapping[str, Sequence[Any]]):
        self.checkpoint = checkpoint
        named = {key.removeprefix(PREFIX): (key, list(found)) for key, found in patches.items()}
        self._patches = {name: found for name, found in named.items() if name in checkpoint.tensors}
        self._scales: dict[str, Tensor] = {}
        self._lock = threading.Lock()  # one weight in fp32 at a time
        self.tensors: dict[str, TensorInfo] = dict(checkpoint.tensors)
        for name in self._patches:
            info = self.tensors[name]
            self._check(name, info)
            self.tensors[name] = replace(info, file=made_from(info.file))
        rounded = any(self.tensors[name].dtype.itemsize == 1 for name in self._patches)
        logger.info(
            "%s: %d weights have patches that can only be merged (such as LoHa, LoKr, DoRA, differences)%s.",
            checkpoint.path.name,
            len(self._patches),
            "; they are rounded to 8 bits again" if rounded else "",
        )

    def read_into(self, name: str, out: Tensor) -> None:
        """Read a tensor's bytes, patched, into `out` (1-D uint8 on the CPU); thread-safe."""
        layer, _, leaf = name.rpartition(".")
        weight = f"{layer}.weight"
        if name in self._patches:
            self._read_merged(name, out)
        elif leaf == SCALE and weight in self._patches:
            if weight not in self._scales:
                self._read_merged(weight, allocate_bytes(self.tensors[weight].nbytes))
            out.copy_(self._scales[weight].reshape(-1).view(torch.uint8))
        else:
            self.checkpoint.read_into(name, out)

    def _read_merged(self, name: str, out: Tensor) -> None:
        info, form, scale = self.checkpoint.tensors[name], self._format(name), self._scale_info(name)
        self.checkpoint.read_into(name, out)
        packed = {"weight": out.view(info.dtype).view(info.shape)}
        if scale is not None:
            packed[SCALE] = self.checkpoint.read(scale.name)
        key, patches = self._patches[name]
        with self._lock:
            dense = form.dequantize(packed, torch.float32).clone()
            merged = host.merge_patches(patches, dense, key).float()
            num_scales = packed[SCALE].numel() if scale is not None else 0
            values, scales = requantize(merged, form, info.dtype, num_scales)
            packed["weight"].copy_(values)
            if scales is not None and scale is not None:
                self._scales[name] = scales.to(scale.dtype)

    def _scale_info(self, name: str) -> TensorInfo | None:
        return self.checkpoint.tensors.get(f"{name.rpartition('.')[0]}.{SCALE}") if name.endswith(".weight") else None

    def _format(self, name: str) -> WeightFormat:
        scale = self._scale_info(name)
        return format_for(self.checkpoint.tensors[name], {SCALE: scale} if scale is not None else {})

    def _check(self, name: str, info: TensorInfo) -> None:
        if not can_requantize(self._format(name), info.dtype):
            stored = info.quant or str(info.dtype).removeprefix("torch.")
            raise ValueError(
                f"{self.checkpoint.path.name} stores {name} as {stored}, into which this LoRA (LoHa, LoKr, DoRA or a "
                "difference) cannot be merged: use a plain LoRA, or the bf16, fp16, fp8 or int8 file of this model"
            )


def patch_identity(patches: Mapping[str, Sequence[Any]]) -> list[Any]:
    """What a result depends on of a ModelPatcher's patches, as JSON values and tensors."""
    return [[key, [_plain(part) for patch in found for part in patch]] for key, found in sorted(patches.items())]


def _plain(value: Any) -> Any:
    if isinstance(value, (Tensor, str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return [type(value).__name__, _plain(getattr(value, "weights", None))]  # an adapter of ComfyUI's
