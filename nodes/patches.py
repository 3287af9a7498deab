"""ComfyUI's weight patches (LoRA and others), merged into weights while they are read from the file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..weights.formats import format_for
from ..weights.linear import WeightFormat
from ..weights.lora_merge import can_requantize, requantize
from ..weights.lora_source import made_from
from ..weights.reader import Checkpoint, TensorInfo
from . import host

logger = logging.getLogger(__name__)

PREFIX = "diffusion_model."  # of our parameters' names in ComfyUI's model
SCALE = "weight_scale"


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
        if any(self.tensors[name].dtype.itemsize == 1 for name in self._patches):
            logger.info("%s: weights are rounded to 8 bits again after merging a LoRA.", checkpoint.path.name)

    def read_into(self, name: str, out: Tensor) -> None:
        """Read a tensor's bytes, patched, into `out` (1-D uint8 on the CPU); thread-safe."""
        layer, _, leaf = name.rpartition(".")
        weight = f"{layer}.weight"
        if name in self._patches:
            self._read_merged(name, out)
        elif leaf == SCALE and weight in self._patches:
            if weight not in self._scales:
                self._read_merged(weight, torch.empty(self.tensors[weight].nbytes, dtype=torch.uint8))
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
                f"{self.checkpoint.path.name} stores {name} as {stored}, into which a LoRA cannot be merged: "
                "use the bf16, fp16, fp8 or int8 file of this model with LoRAs"
            )
