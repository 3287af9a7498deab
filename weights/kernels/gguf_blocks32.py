"""GGUF types with blocks of 32 elements: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL.

The layouts are told in `gguf_reference.py`. `num_chunks` counts chunks of 8 bytes of quants: 2 per block, 4 for Q8_0.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .gguf_parts import centred, chunk_rows, levels, read_chunk, read_half, read_short, spread_bits, write_run


@triton.jit
def unpack_nibbles(
    packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr,
    NBYTES: tl.constexpr, OFFSET: tl.constexpr, FIFTH: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """A block is a scale, an OFFSET, 32 FIFTH bits and 16 bytes of two nibbles, which may index the IQ4 LEVELS."""
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 2)
    packed_ptr += first * NBYTES
    start = block * NBYTES
    scale = read_half(packed_ptr, start, inside)
    quants = read_chunk(packed_ptr, start + (NBYTES - 16) + chunk * 8, inside, 4 if OFFSET else 2)
    low, high = quants & 15, (quants >> 4) & 15
    if FIFTH:
        bits = start + (NBYTES - 20)
        low |= (spread_bits(read_short(packed_ptr, bits, inside) >> (chunk * 8).to(tl.uint32)) & 1) << 4
        high |= (spread_bits(read_short(packed_ptr, bits + 2, inside) >> (chunk * 8).to(tl.uint32)) & 1) << 4
    if LEVELS:
        low, high = scale * levels(low), scale * levels(high)
    elif OFFSET:
        offset = read_half(packed_ptr, start + 2, inside)
        low, high = scale * low.to(tl.float32) + offset, scale * high.to(tl.float32) + offset
    else:
        low, high = scale * centred(low, 16 if FIFTH else 8), scale * centred(high, 16 if FIFTH else 8)
    out_ptr += first * 32
    write_run(out_ptr, block * 32 + chunk * 8, low, inside)
    write_run(out_ptr, block * 32 + chunk * 8 + 16, high, inside)


@triton.jit
def q4_0(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    unpack_nibbles(packed_ptr, out_ptr, num_chunks, ROWS, 18, False, False, False)


@triton.jit
def q4_1(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    unpack_nibbles(packed_ptr, out_ptr, num_chunks, ROWS, 20, True, False, False)


@triton.jit
def q5_0(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    unpack_nibbles(packed_ptr, out_ptr, num_chunks, ROWS, 22, False, True, False)


@triton.jit
def q5_1(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    unpack_nibbles(packed_ptr, out_ptr, num_chunks, ROWS, 24, True, True, False)


@triton.jit
def iq4_nl(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    unpack_nibbles(packed_ptr, out_ptr, num_chunks, ROWS, 18, False, False, True)


@triton.jit
def q8_0(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 4)
    packed_ptr += first * 34
    scale = read_half(packed_ptr, block * 34, inside)
    quants = read_chunk(packed_ptr, block * 34 + 2 + chunk * 8, inside, 2)
    # int8 as its bits: shifted up by 128 and back
    write_run(out_ptr + first * 32, block * 32 + chunk * 8, scale * centred((quants ^ 128) & 255, 128), inside)
