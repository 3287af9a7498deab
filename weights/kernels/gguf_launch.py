"""Which kernel unpacks which GGUF type, and launching it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...system.grids import cdiv
from . import gguf_blocks32 as blocks32
from . import gguf_blocks256 as blocks256


@dataclass(frozen=True)
class Launch:
    """A kernel, the bytes of a block that it reads, chunks per block, and the chunks (rows) of one program."""

    kernel: Any
    block_bytes: int
    chunks: int
    rows: int = 256
    num_warps: int = 4


LAUNCHES: Mapping[str, Launch] = {
    "Q8_0": Launch(blocks32.q8_0, 34, 4),
    "Q6_K": Launch(blocks256.q6_k, 210, 8, rows=128),
    "Q5_K": Launch(blocks256.q5_k, 176, 16),
    "Q5_1": Launch(blocks32.q5_1, 24, 2),
    "Q5_0": Launch(blocks32.q5_0, 22, 2),
    "Q4_K": Launch(blocks256.q4_k, 144, 16),
    "Q4_1": Launch(blocks32.q4_1, 20, 2),
    "Q4_0": Launch(blocks32.q4_0, 18, 2),
    "Q3_K": Launch(blocks256.q3_k, 110, 8, rows=128),
    "Q2_K": Launch(blocks256.q2_k, 84, 8, rows=128),
    "IQ4_NL": Launch(blocks32.iq4_nl, 18, 2),
    "IQ4_XS": Launch(blocks256.iq4_xs, 136, 16),
}


def dequantize_triton(packed: Tensor, quant: str, out: Tensor, launch: Launch | None = None) -> None:
    """Unpack contiguous bytes into `out`, a contiguous fp32, fp16 or bf16 tensor of as many elements as they hold."""
    launch = launch or LAUNCHES[quant]
    assert packed.is_contiguous() and out.is_contiguous()
    assert packed.data_ptr() % 4 == 0, "kernels read words of four bytes"
    num_chunks = packed.numel() // launch.block_bytes * launch.chunks
    grid = (cdiv(num_chunks, launch.rows),)
    launch.kernel[grid](packed, out, num_chunks, ROWS=launch.rows, num_warps=launch.num_warps)
