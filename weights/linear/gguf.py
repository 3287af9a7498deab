"""Linear weights stored in the packed types of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.gguf_op import dequantize_packed
from ..kernels.gguf_reference import BLOCK_TYPES, BlockType
from .weight_format import WeightFormat


@dataclass(frozen=True)
class GgufFormat(WeightFormat):
    """A weight packed in one GGUF type: `packed["weight"]` is uint8 `[out, bytes per row]`.

    It is unpacked once per `prepare`, then multiplied as a dense one.
    """

    block: BlockType

    splits = True

    @property
    def name(self) -> str:
        return self.block.name

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        dequantize_packed(packed["weight"], out, self.name)
        return out

    def logical_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (*weight.shape[:-1], weight.shape[-1] // self.block.nbytes * self.block.elements)


Q8_0 = "Q8_0"


def pack_q8_0(weight: Tensor) -> Tensor:
    """A weight `[out, in]` fp32 in the most accurate packed type, uint8 `[out, bytes per row]`; `in` is in 32s.

    Source: ggml-org/llama.cpp, `quantize_row_q8_0_ref` of `ggml/src/ggml-quants.c`.
    """
    blocks = weight.reshape(-1, BLOCK_TYPES[Q8_0].elements)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    values = torch.copysign((scaled.abs() + 0.5).floor(), scaled).to(torch.int8)  # halves away from zero
    return torch.cat([scale.half().view(torch.uint8), values.view(torch.uint8)], dim=1).view(weight.shape[0], -1)


GGUF_FORMATS: Mapping[str, GgufFormat] = {name: GgufFormat(block) for name, block in BLOCK_TYPES.items()}
