"""Weights that are changed as they are read: dequantised, changed, and stored again in the form that they had."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...system.host_memory import allocate_bytes
from ..files.checkpoint import Source, TensorInfo, read_tensor
from ..linear.formats import format_for
from ..linear.made_pairs import MadePairs
from .merge import requantize, stored_after

SCALE = "weight_scale"
Change = Callable[[Tensor], Tensor]  # a dense fp32 weight, which it may write over -> the changed one


class MergedSource:
    """A source's tensors, those of `changes` changed; reading is thread-safe. Their bytes are in no file as such.

    All of them can be changed (`refusal`).
    """

    def __init__(self, origin: Source, changes: Mapping[str, Change]) -> None:
        self._origin, self._changes = origin, changes
        self._pairs = MadePairs()
        self._lock = threading.Lock()  # one weight in fp32 at a time
        self.tensors: dict[str, TensorInfo] = dict(origin.tensors)
        for name in changes:
            info = stored_after(origin.tensors[name])
            assert info is not None, "no refusal"
            self.tensors[name] = replace(info, file=made_from(info.file))

    @torch.inference_mode()
    def read_into(self, name: str, out: Tensor) -> None:
        """The tensor's bytes, as `Checkpoint.read_into`."""
        layer, _, leaf = name.rpartition(".")
        weight = f"{layer}.weight"
        if name in self._changes:
            self._pairs.read_weight(name, out, partial(self._change, name))
        elif leaf == SCALE and weight in self._changes:
            self._pairs.read_scale(weight, out, self.tensors[weight].nbytes, partial(self._change, weight))
        else:
            self._origin.read_into(name, out)

    def _change(self, name: str, out: Tensor) -> Tensor:
        """Write a changed tensor to `out [bytes]`; returns the scale beside it, empty where it has none."""
        info, scale = self._origin.tensors[name], scale_of(self._origin, name)
        made = self.tensors[name]
        stored = out if info.nbytes == made.nbytes else allocate_bytes(info.nbytes)
        self._origin.read_into(name, stored)
        packed = {"weight": stored.view(info.dtype).view(info.shape)}
        if scale is not None:
            packed[SCALE] = read_tensor(self._origin, f"{name.rpartition('.')[0]}.{SCALE}")
        form = format_for(info)
        with self._lock:
            # where it is stored in fp32, that is what was read, and `out`
            changed = self._changes[name](form.dequantize(packed, torch.float32))
            num_scales = packed[SCALE].numel() if scale is not None else 0
            scales = requantize(changed, form, info.dtype, num_scales, out.view(made.dtype).view(made.shape))
        if scale is None:
            return torch.empty(0)
        return packed[SCALE] if scales is None else scales.to(scale.dtype)


def refusal(source: Source, name: str) -> str | None:
    """How a tensor is stored, where it can not be changed and stored so again."""
    info = source.tensors[name]
    if stored_after(info) is not None:
        return None
    return info.quant or str(info.dtype).removeprefix("torch.")


def scale_of(source: Source, name: str) -> TensorInfo | None:
    """The scale that lies beside a layer's weight."""
    layer, _, leaf = name.rpartition(".")
    return source.tensors.get(f"{layer}.{SCALE}") if leaf == "weight" else None


def made_from(file: Path) -> Path:
    """In place of the file of bytes that are made as they are read, so that nobody looks for them there."""
    return file.with_name(f"{file.name} (with LoRA)")
