"""Unpacking GGUF bytes as one operator that torch.compile leaves alone: Triton on a GPU, else the torch reference."""

# No `from __future__ import annotations`: torch.library reads the annotations themselves.
import torch
from torch import Tensor

from ...system.kernel_choice import Chosen, disagreement, kept_when_final, relative_error, works
from ...system.operators import on_device_of, returns_nothing
from .gguf_reference import BLOCK_TYPES, dequantize_reference, random_blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK_ELEMENTS = 1 << 22  # the reference makes about ten temporaries of this many
PROBE_BLOCKS = 300


@torch.library.custom_op("lowvram_video::dequantize_gguf", mutates_args=("out",))
def dequantize_packed(packed: Tensor, out: Tensor, quant: str) -> None:
    """Unpack bytes (uint8, contiguous) of the GGUF type `quant` into `out`, a contiguous float tensor of their size.

    Raises ValueError where the two do not fit together.
    """
    block = BLOCK_TYPES[quant]
    if packed.dtype != torch.uint8 or out.dtype not in DTYPES or packed.device != out.device:
        raise ValueError(
            f"{quant} bytes are {packed.dtype} on {packed.device} and go to {out.dtype} on {out.device}; expected "
            "uint8 to float32, float16 or bfloat16 on one device"
        )
    if not packed.is_contiguous() or not out.is_contiguous():
        raise ValueError(f"{quant}: packed bytes and output must be contiguous")
    if packed.numel() % block.nbytes or packed.numel() // block.nbytes * block.elements != out.numel():
        raise ValueError(
            f"{packed.numel()} bytes of {quant} ({block.nbytes} per {block.elements} elements) do not fill "
            f"an output of shape {list(out.shape)}"
        )
    if out.numel() == 0:
        return
    if packed.is_cuda and packed.data_ptr() % 4 == 0 and triton_agrees(quant, packed.device):
        _run_triton(packed, out, quant)
    else:
        dequantize_in_chunks(packed, out, quant)


dequantize_packed.register_fake(returns_nothing)


def dequantize_in_chunks(packed: Tensor, out: Tensor, quant: str) -> None:
    """The reference, a few million elements at a time so that its fp32 temporaries stay small."""
    block = BLOCK_TYPES[quant]
    blocks, values = packed.view(-1, block.nbytes), out.view(-1, block.elements)
    step = CHUNK_ELEMENTS // block.elements
    for first in range(0, blocks.shape[0], step):
        part = blocks[first : first + step]
        values[first : first + step] = dequantize_reference(part, quant, (part.shape[0], block.elements))


@kept_when_final
def triton_agrees(quant: str, device: torch.device) -> Chosen[bool]:
    """Whether the Triton kernel of this type works on this GPU; once that is known it is not tried again."""
    return works(f"unpacking {quant}", device, lambda: _disagreement(quant, device))


def _disagreement(quant: str, device: torch.device) -> str | None:
    packed = random_blocks(quant, PROBE_BLOCKS, torch.Generator().manual_seed(0)).to(device)
    want = dequantize_reference(packed, quant, (PROBE_BLOCKS, BLOCK_TYPES[quant].elements))
    got = torch.full_like(want, torch.nan)
    _run_triton(packed, got, quant)
    return disagreement(relative_error(got, want), bound=0.0)


def _run_triton(packed: Tensor, out: Tensor, quant: str) -> None:
    from .gguf_launch import dequantize_triton

    with on_device_of(out):
        dequantize_triton(packed, quant, out)
