"""GGUF types with blocks of 256 elements: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS.

The layouts are told in `gguf_reference.py`. `num_chunks` counts what one thread unpacks: 16 per block for Q4_K, Q5_K
and IQ4_XS (8 bytes of two nibbles), 8 for the others (8 bytes of four 2-bit parts, and what belongs to them).
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .gguf_parts import (
    centred,
    chunk_rows,
    levels,
    read_byte,
    read_chunk,
    read_half,
    read_short,
    read_word,
    write_run,
)


@triton.jit
def group_scale_offset(low_scale, low_offset, high, group):
    """Of Q4_K and Q5_K: the 6-bit scale and offset of a group, fp32 `[ROWS, 1]`, from the three words of them."""
    shift = ((group % 4) * 8).to(tl.uint32)
    low_scale >>= shift
    low_offset >>= shift
    high >>= shift
    scale = tl.where(group < 4, low_scale & 63, (high & 15) | ((low_scale >> 2) & 48))
    offset = tl.where(group < 4, low_offset & 63, ((high >> 4) & 15) | ((low_offset >> 2) & 48))
    return scale.to(tl.float32)[:, None], offset.to(tl.float32)[:, None]


@triton.jit
def unpack_nibbles_k(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr, NBYTES: tl.constexpr, FIFTH: tl.constexpr):
    """A block is the scales of scales and offsets, 12 bytes of those, 256 FIFTH bits and 128 bytes of two nibbles."""
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 16)
    packed_ptr += first * NBYTES
    at = block * NBYTES
    pair = chunk // 4  # two groups of 32 elements share 32 bytes
    quants = read_chunk(packed_ptr, at + (NBYTES - 128) + chunk * 8, inside, 4)
    if FIFTH:
        fifth = read_chunk(packed_ptr, at + 16 + (chunk % 4) * 8, inside, 4) >> (pair * 2).to(tl.uint32)[:, None]
    scale, offset = read_half(packed_ptr, at, inside), read_half(packed_ptr, at + 2, inside)
    low_scale = read_word(packed_ptr, at + 4, inside, 4)
    low_offset = read_word(packed_ptr, at + 8, inside, 4)
    high = read_word(packed_ptr, at + 12, inside, 4)
    start = block * 256 + pair * 64 + (chunk % 4) * 8
    out_ptr += first * 256
    for half in tl.static_range(2):
        s, o = group_scale_offset(low_scale, low_offset, high, pair * 2 + half)
        level = (quants >> (4 * half)) & 15
        if FIFTH:
            level |= ((fifth >> half) & 1) << 4
        write_run(out_ptr, start + 32 * half, (scale * s) * level.to(tl.float32) - offset * o, inside)


@triton.jit
def q4_k(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    unpack_nibbles_k(packed_ptr, out_ptr, num_chunks, ROWS, 144, False)


@triton.jit
def q5_k(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    unpack_nibbles_k(packed_ptr, out_ptr, num_chunks, ROWS, 176, True)


@triton.jit
def q2_k(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 8)
    packed_ptr += first * 84
    at = block * 84
    quants = read_chunk(packed_ptr, at + 16 + chunk * 8, inside, 4)
    scale, offset = read_half(packed_ptr, at + 80, inside), read_half(packed_ptr, at + 82, inside)
    side = chunk // 4  # the block's first or second 128 elements
    column = (chunk % 4) * 8
    out_ptr += first * 256
    for part in tl.static_range(4):
        both = read_byte(packed_ptr, at + side * 8 + part * 2 + column // 16, inside)
        s, o = (both & 15).to(tl.float32)[:, None], (both >> 4).to(tl.float32)[:, None]
        values = (scale * s) * ((quants >> (2 * part)) & 3).to(tl.float32) - offset * o
        write_run(out_ptr, block * 256 + side * 128 + part * 32 + column, values, inside)


@triton.jit
def q3_k(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 8)
    packed_ptr += first * 110
    at = block * 110
    side = chunk // 4
    column = (chunk % 4) * 8
    quants = read_chunk(packed_ptr, at + 32 + chunk * 8, inside, 2)
    high_bits = read_chunk(packed_ptr, at + column, inside, 2) >> (side * 4).to(tl.uint32)[:, None]
    scale = read_half(packed_ptr, at + 108, inside)
    out_ptr += first * 256
    for part in tl.static_range(4):
        group = part * 2 + column // 16  # of the 8 in this side
        low = (read_byte(packed_ptr, at + 96 + group, inside) >> (side * 4).to(tl.uint32)) & 15
        high = read_byte(packed_ptr, at + 104 + group % 4, inside) >> (side * 4 + part // 2 * 2).to(tl.uint32)
        s = centred(low | ((high & 3) << 4), 32)[:, None]
        # with the high bit as its third, a quant counts from -4
        level = ((quants >> (2 * part)) & 3) | (((high_bits >> part) & 1) << 2)
        write_run(out_ptr, block * 256 + side * 128 + part * 32 + column, (scale * s) * centred(level, 4), inside)


@triton.jit
def q6_k(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 8)
    packed_ptr += first * 210
    at = block * 210
    side = chunk // 4
    column = (chunk % 4) * 8
    low_first = read_chunk(packed_ptr, at + side * 64 + column, inside, 2)
    low_second = read_chunk(packed_ptr, at + side * 64 + 32 + column, inside, 2)
    upper = read_chunk(packed_ptr, at + 128 + chunk * 8, inside, 2)
    scale = read_half(packed_ptr, at + 208, inside)
    out_ptr += first * 256
    for part in tl.static_range(4):
        group = read_byte(packed_ptr, at + 192 + side * 8 + part * 2 + column // 16, inside)
        s = centred(group ^ 128, 128)[:, None]
        if part % 2 == 0:
            nibbles = low_first >> (part // 2 * 4)
        else:
            nibbles = low_second >> (part // 2 * 4)
        level = (nibbles & 15) | (((upper >> (2 * part)) & 3) << 4)
        write_run(out_ptr, block * 256 + side * 128 + part * 32 + column, (scale * s) * centred(level, 32), inside)


@triton.jit
def iq4_xs(packed_ptr, out_ptr, num_chunks, ROWS: tl.constexpr):
    chunk, block, inside, first = chunk_rows(num_chunks, ROWS, 16)
    packed_ptr += first * 136
    at = block * 136
    group = chunk // 2  # of 32 elements in 16 bytes
    quants = read_chunk(packed_ptr, at + 8 + chunk * 8, inside, 4)
    low = (read_byte(packed_ptr, at + 4 + group // 2, inside) >> (group % 2 * 4).to(tl.uint32)) & 15
    high = (read_short(packed_ptr, at + 2, inside) >> (group * 2).to(tl.uint32)) & 3
    scale = read_half(packed_ptr, at, inside) * centred(low | (high << 4), 32)[:, None]
    start = block * 256 + group * 32 + (chunk % 2) * 8
    out_ptr += first * 256
    write_run(out_ptr, start, scale * levels(quants), inside)
    write_run(out_ptr, start + 16, scale * levels(quants >> 4), inside)
