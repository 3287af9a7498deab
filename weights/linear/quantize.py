"""Quantising a checkpoint while it is read.

Quantised are the weights of the blocks' linear layers, with a scale per row (or one per tensor); norms, biases,
embeddings, modulation and the head stay as stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..files.checkpoint import Checkpoint, TensorInfo
from ..kernels.row_reference import LARGEST, quantized, row_scales
from .dialects import FP8_DTYPES
from .formats import format_for
from .fp8 import FP8, FP8_FULL_PRECISION
from .gguf import GgufFormat
from .int8 import INT8, Int8Dequantized
from .kitchen import KitchenFormat
from .made_pairs import MadePairs
from .weight_format import PLAIN, WeightFormat

PIECE_ELEMENTS = 1 << 21  # of a weight in work at a time, per thread
IN_BLOCK = re.compile(r"(^|\.)((vace_|single_)?(transformer_)?blocks)\.\d+\.(?P<path>.+)\.weight$")
HIGH_PRECISION = re.compile(r"norm|modulation|embed")  # of a path within a block
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Target:
    """What weights become."""

    quant: str  # see TensorInfo.quant
    dtype: torch.dtype
    per_tensor: bool = False
    same: tuple[str, ...] = ()  # stored forms that are left as they are, besides a plain cast to one of `kept`
    kept: tuple[torch.dtype, ...] = ()
    made: tuple[type[WeightFormat], ...] = ()  # forms that become it in each pass, and stay small in RAM


FP8_FORMS = (FP8, FP8_FULL_PRECISION)
FP8_ROWS = Target(FP8, torch.float8_e4m3fn, False, FP8_FORMS, FP8_DTYPES)
# e5m2 cannot be multiplied row by row; what `Fp8Made` is of stays
FP8_MATMUL = replace(FP8_ROWS, kept=(torch.float8_e4m3fn,), made=(GgufFormat, Int8Dequantized))
INT8_ROWS = Target(INT8, torch.int8, False, (INT8,), (torch.int8,))
FP8_TENSORS = replace(FP8_ROWS, per_tensor=True)

# `quantization` of a run -> what is made of the weights as they are read.
ON_READING: Mapping[str, Target] = {"fp8": FP8_ROWS, "fp8_fast": FP8_MATMUL, "int8": INT8_ROWS}


@dataclass(frozen=True)
class StoredLayer:
    """A layer that is to be quantised: how its weight is stored now, and the tensors that it takes."""

    format: WeightFormat
    tensors: Mapping[str, TensorInfo]  # weight, and scales where it has some

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["weight"].unpacked_shape

    @property
    def has_rows_apart(self) -> bool:
        """Whether some rows can be unpacked without the others: no scale is of several of them but of all."""
        scale = self.tensors.get("weight_scale")
        return scale is None or math.prod(scale.shape) == 1 or scale.shape[0] == self.shape[0]


@dataclass(frozen=True)
class QuantizedSource(Checkpoint):
    """A checkpoint whose blocks' weights are quantised as they are read; `tensors` are those that come out.

    Reading is thread-safe and takes a few MB of temporaries per thread. A weight is quantised when it or its scale is
    read (`MadePairs`). The bytes of quantised tensors are in no file: they cannot be streamed from the disk.
    """

    origin: Checkpoint
    target: Target
    layers: Mapping[str, StoredLayer]
    device: torch.device = CPU  # where the arithmetic runs
    pairs: MadePairs = field(default_factory=MadePairs)

    def read_into(self, name: str, out: Tensor) -> None:
        """The tensor's bytes, as `Checkpoint.read_into`."""
        layer, _, leaf = name.rpartition(".")
        if layer not in self.layers or leaf == "bias":
            self.origin.read_into(name, out)
            return
        make = partial(self._quantize, self.layers[layer])
        if leaf == "weight":
            self.pairs.read_weight(layer, out, make)
        else:
            self.pairs.read_scale(layer, out, self.tensors[f"{layer}.weight"].nbytes, make)

    def _quantize(self, layer: StoredLayer, out: Tensor) -> Tensor:
        """Write a layer's weight to `out [bytes]`; returns its scales, `[out, 1]` or `[1, 1]`."""
        target, (num_rows, _) = self.target, layer.shape
        scales = torch.empty(num_rows, 1)
        if target.per_tensor:
            for rows, weight in self._pieces(layer):
                scales[rows] = row_scales(weight, LARGEST[target.dtype]).cpu()
            scales.fill_(scales.max())
        values = out.view(target.dtype).view(layer.shape)
        for rows, weight in self._pieces(layer):
            scale = scales[rows].to(weight.device) if target.per_tensor else row_scales(weight, LARGEST[target.dtype])
            values[rows] = quantized(weight, scale, target.dtype).cpu()
            scales[rows] = scale.cpu()
        return scales[:1].clone() if target.per_tensor else scales

    def _pieces(self, layer: StoredLayer) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time: their place and the weight in fp32."""
        num_rows, num_columns = layer.shape
        step = max(1, PIECE_ELEMENTS // num_columns) if layer.has_rows_apart else num_rows
        for first in range(0, num_rows, step):
            rows = slice(first, min(first + step, num_rows))
            packed = {
                leaf: self._read_rows(info, rows if info.shape[:1] == (num_rows,) else None).to(self.device)
                for leaf, info in layer.tensors.items()
            }
            yield rows, layer.format.dequantize(packed, torch.float32)

    def _read_rows(self, info: TensorInfo, rows: slice | None) -> Tensor:
        if rows is not None:
            row_bytes = info.nbytes // info.shape[0]
            num_rows = rows.stop - rows.start
            info = replace(
                info,
                shape=(num_rows, *info.shape[1:]),
                offset=info.offset + rows.start * row_bytes,
                nbytes=num_rows * row_bytes,
            )
        return Checkpoint(self.origin.path, {info.name: info}, {}).read(info.name)


def quantize_checkpoint(checkpoint: Checkpoint, quantization: str, device: torch.device = CPU) -> Checkpoint:
    """The checkpoint as a run with this `quantization` reads it; itself where nothing is to be quantised.

    Names are official ones, dialects undone (`open_wan`). The arithmetic of quantising runs on `device`.
    """
    target = ON_READING.get(quantization)
    return checkpoint if target is None else quantized_source(checkpoint, target, device)


def quantized_source(checkpoint: Checkpoint, target: Target, device: torch.device = CPU) -> Checkpoint:
    """The checkpoint with its blocks' weights made `target`; itself where they are that already."""
    layers = {name: layer for name, layer in _stored_layers(checkpoint) if not _is_already(layer, target)}
    if not layers:
        return checkpoint
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in layers or leaf == "bias":
            tensors[name] = info
        elif leaf == "weight":
            tensors |= _quantized_infos(layers[layer], info, layer, target)
    return QuantizedSource(checkpoint.path, tensors, checkpoint.metadata, checkpoint, target, layers, device)


def _stored_layers(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredLayer]]:
    for name, info in checkpoint.tensors.items():
        match = IN_BLOCK.search(name)
        if match is None or HIGH_PRECISION.search(match["path"]) or len(info.unpacked_shape) != 2:
            continue
        layer = name.removesuffix(".weight")
        scale = checkpoint.tensors.get(f"{layer}.weight_scale")
        form = format_for(info)
        if not isinstance(form, KitchenFormat):  # their rows cannot be read apart, and they are small enough
            scales = {} if scale is None or form is PLAIN else {"weight_scale": scale}
            yield layer, StoredLayer(form, {"weight": info, **scales})


def _is_already(layer: StoredLayer, target: Target) -> bool:
    weight, scale = layer.tensors["weight"], layer.tensors.get("weight_scale")
    if isinstance(layer.format, target.made):
        return True
    if weight.dtype not in target.kept or weight.quant not in (None, *target.same):
        return False
    return scale is None or not target.per_tensor or torch.Size(scale.shape).numel() == 1


def _quantized_infos(layer: StoredLayer, info: TensorInfo, name: str, target: Target) -> dict[str, TensorInfo]:
    nowhere = Path(f"{info.file} (quantised as it is read)")  # so that nobody reads these offsets from the file
    rows, columns = layer.shape
    weight = TensorInfo(
        f"{name}.weight", target.dtype, (rows, columns), nowhere, info.offset, rows * columns, target.quant
    )
    shape = () if target.per_tensor else (rows, 1)
    scale = TensorInfo(
        f"{name}.weight_scale", torch.float32, shape, nowhere, info.offset, 4 * torch.Size(shape).numel()
    )
    return {weight.name: weight, scale.name: scale}
