"""Pieces that the GGUF kernels share: how a thread reads the 8 bytes that it works on and writes what they hold.

Every kernel gives one thread one chunk: 8 consecutive bytes of quants, which become 8, 16 or 32 elements in runs of 8.
A program's chunks are the rows of `[ROWS, 8]` tensors, so that a row lies in one thread's registers and a run leaves
as one 16-byte store (in 16-bit dtypes); scales are `[ROWS]` tensors, read by the thread that needs them. Bytes are read
in the widest words that the block's size keeps aligned, and taken apart in 32-bit registers.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def chunk_rows(num_chunks, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """(chunk within its block, block counted from the program's first, whether it exists) `[ROWS]`; first block.

    The first block is an int64, since element offsets outgrow 32 bits; what is counted from it does not.
    """
    tl.static_assert(ROWS % CHUNKS == 0)
    row = tl.arange(0, ROWS)
    first = tl.program_id(0).to(tl.int64) * ROWS
    return row % CHUNKS, row // CHUNKS, first + row < num_chunks, first // CHUNKS


@triton.jit
def read_half(block_ptr, offset, inside):
    """fp16 at a byte offset (even) -> fp32 `[ROWS, 1]`."""
    value = tl.load(block_ptr.to(tl.pointer_type(tl.float16)) + offset // 2, mask=inside, other=0.0)
    return value.to(tl.float32)[:, None]


@triton.jit
def read_byte(block_ptr, offset, inside):
    return tl.load(block_ptr + offset, mask=inside, other=0).to(tl.uint32)


@triton.jit
def read_short(block_ptr, offset, inside):
    """16 bits at an even byte offset."""
    return tl.load(block_ptr.to(tl.pointer_type(tl.uint16)) + offset // 2, mask=inside, other=0).to(tl.uint32)


@triton.jit
def read_word(block_ptr, offset, inside, ALIGN: tl.constexpr):
    """32 bits at a byte offset that is a multiple of `ALIGN` (2 or 4)."""
    if ALIGN >= 4:
        return tl.load(block_ptr.to(tl.pointer_type(tl.uint32)) + offset // 4, mask=inside, other=0)
    return read_short(block_ptr, offset, inside) | (read_short(block_ptr, offset + 2, inside) << 16)


@triton.jit
def read_chunk(block_ptr, offset, inside, ALIGN: tl.constexpr):
    """8 bytes -> `[ROWS, 8]` uint32, each byte lowest; what lies above it is of its neighbours."""
    low = read_word(block_ptr, offset, inside, ALIGN)
    high = read_word(block_ptr, offset + 4, inside, ALIGN)
    col = tl.arange(0, 8)[None, :]
    return tl.where(col < 4, low[:, None], high[:, None]) >> ((col % 4) * 8).to(tl.uint32)


@triton.jit
def spread_bits(bits):
    """`[ROWS]`, 8 bits each -> `[ROWS, 8]`, each bit lowest."""
    return bits[:, None] >> tl.arange(0, 8)[None, :].to(tl.uint32)


@triton.jit
def centred(quants, CENTRE: tl.constexpr):
    """Small unsigned integers -> fp32 minus the centre."""
    return (quants.to(tl.int32) - CENTRE).to(tl.float32)


@triton.jit
def levels(quants):
    """Indices into the IQ4 levels -> fp32; the 16 levels are bytes, plus 128, of four words."""
    quants &= 15
    words = tl.where(
        quants < 8,
        tl.where(quants < 4, 0x3F2D1801, 0x766A5D4F),
        tl.where(quants < 12, 0xA6998D81, 0xF1D9C5B5),
    ).to(tl.uint32)
    return centred((words >> ((quants % 4) * 8)) & 255, 128)


@triton.jit
def write_run(out_ptr, offset, values, inside):
    """8 elements per row, from element `offset [ROWS]` on."""
    col = tl.arange(0, 8)[None, :]
    tl.store(out_ptr + offset[:, None] + col, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])
