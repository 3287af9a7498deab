"""Linear weights stored in the packed types of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


GGUF_FORMATS: Mapping[str, GgufFormat] = {name: GgufFormat(block) for name, block in BLOCK_TYPES.items()}
