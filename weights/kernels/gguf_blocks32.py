"""GGUF types with blocks of 32 elements: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL.

The layouts are told in `gguf_reference.py`. `num_chunks` counts chunks of 8 bytes of quants: 2 per block, 4 for Q8_0.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .gguf_parts import centred, chunk_rows, levels, read_chunk, read_half, read_short, spread_bits, write_run


@triton.jit
def q4_0(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 2)
    packed_ptr += first * 18
    scale = read_half(packed_ptr, block * 18, inside)
    quants = read_chunk(packed_ptr, block * 18 + 2 + chunk * 8, inside, 2)
    start = block * 32 + chunk * 8
    out_ptr += first * 32
    write_run(out_ptr, start, scale * centred(quants & 15, 8), inside)
    write_run(out_ptr, start + 16, scale * centred((quants >> 4) & 15, 8), inside)


@triton.jit
def q4_1(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 2)
    packed_ptr += first * 20
    scale = read_half(packed_ptr, block * 20, inside)
    offset = read_half(packed_ptr, block * 20 + 2, inside)
    quants = read_chunk(packed_ptr, block * 20 + 4 + chunk * 8, inside, 4)
    start = block * 32 + chunk * 8
    out_ptr += first * 32
    write_run(out_ptr, start, scale * (quants & 15).to(tl.float32) + offset, inside)
    write_run(out_ptr, start + 16, scale * ((quants >> 4) & 15).to(tl.float32) + offset, inside)


@triton.jit
def q5_0(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 2)
    packed_ptr += first * 22
    scale = read_half(packed_ptr, block * 22, inside)
    fifth_low = spread_bits(read_short(packed_ptr, block * 22 + 2, inside) >> (chunk * 8).to(tl.uint32))
    fifth_high = spread_bits(read_short(packed_ptr, block * 22 + 4, inside) >> (chunk * 8).to(tl.uint32))
    quants = read_chunk(packed_ptr, block * 22 + 6 + chunk * 8, inside, 2)
    start = block * 32 + chunk * 8
    out_ptr += first * 32
    low = (quants & 15) | ((fifth_low & 1) << 4)
    high = ((quants >> 4) & 15) | ((fifth_high & 1) << 4)
    write_run(out_ptr, start, scale * centred(low, 16), inside)
    write_run(out_ptr, start + 16, scale * centred(high, 16), inside)


@triton.jit
def q5_1(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 2)
    packed_ptr += first * 24
    scale = read_half(packed_ptr, block * 24, inside)
    offset = read_half(packed_ptr, block * 24 + 2, inside)
    fifth_low = spread_bits(read_short(packed_ptr, block * 24 + 4, inside) >> (chunk * 8).to(tl.uint32))
    fifth_high = spread_bits(read_short(packed_ptr, block * 24 + 6, inside) >> (chunk * 8).to(tl.uint32))
    quants = read_chunk(packed_ptr, block * 24 + 8 + chunk * 8, inside, 4)
    start = block * 32 + chunk * 8
    out_ptr += first * 32
    low = (quants & 15) | ((fifth_low & 1) << 4)
    high = ((quants >> 4) & 15) | ((fifth_high & 1) << 4)
    write_run(out_ptr, start, scale * low.to(tl.float32) + offset, inside)
    write_run(out_ptr, start + 16, scale * high.to(tl.float32) + offset, inside)


@triton.jit
def q8_0(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 4)
    packed_ptr += first * 34
    scale = read_half(packed_ptr, block * 34, inside)
    quants = read_chunk(packed_ptr, block * 34 + 2 + chunk * 8, inside, 2)
    # int8 as its bits: shifted up by 128 and back
    write_run(out_ptr + first * 32, block * 32 + chunk * 8, scale * centred((quants ^ 128) & 255, 128), inside)


@triton.jit
def iq4_nl(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 2)
    packed_ptr += first * 18
    scale = read_half(packed_ptr, block * 18, inside)
    quants = read_chunk(packed_ptr, block * 18 + 2 + chunk * 8, inside, 2)
    start = block * 32 + chunk * 8
    out_ptr += first * 32
    write_run(out_ptr, start, scale * levels(quants), inside)
    write_run(out_ptr, start + 16, scale * levels(quants >> 4), inside)
