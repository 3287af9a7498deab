"""What a pass takes on a card that was measured: the sum of its parts, each by its own measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...system.card_profile import WITHIN, AttentionRow, CardProfile, ProductRow

PLAIN = "plain"  # `WeightFormat.name` of weights in the compute dtype, whose products unpacked ones are
FP8_MATMUL, MADE_FP8 = "fp8 matmul", ", multiplied in fp8"  # a name, and the ending of names
ROUNDED_BYTES = 5  # read and written of each weight that is rounded to fp8 from 16 bits
SDPA = "sdpa"
EAGER_PASSES = 4  # how often as much memory is gone through where steps between products are not one kernel each
FEW_KEYS = 4 * 512  # attention over fewer is cross-attention, slower for its size

# Rows of a matrix product, and the share of full speed it reaches with at least so many: fewer leave the last wave of
# tiles half empty.
GEMM_EFFICIENCY = ((32768, 1.0), (16384, 0.99), (8192, 0.98), (4096, 0.95), (2048, 0.88), (1024, 0.78), (0, 0.58))


@dataclass(frozen=True)
class PassWork:
    """What a pass computes: FLOPs of products, of self-attention and of attention to `context_keys` of text or image.

    `form` and `attention` are the names of the format that most of the blocks' weights have and of the backend.
    `block_weights` are elements of all blocks' linear layers that a pass uses, `moved_bytes` what its steps between
    products read and write.
    """

    dim: int
    ffn_dim: int
    ffn_share: float  # of the products' FLOPs, in layers between `dim` and `ffn_dim`
    form: str
    attention: str
    tokens: int
    context_keys: int
    product_flops: float
    self_flops: float
    cross_flops: float
    block_weights: float
    moved_bytes: float


@dataclass(frozen=True)
class PassParts:
    """Seconds of a pass at full speed: products, attention, and all the rest, which no choice of the plan changes."""

    products: float
    attention: float
    other: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.other


def pass_parts(card: CardProfile, work: PassWork) -> PassParts | None:
    """The parts of a pass on this card; None where too little of it was measured to tell.

    A form that was not measured itself multiplies as the plain one does; a backend that was not, as sdpa does. A form
    made fp8 while it is unpacked multiplies as fp8 does, and is unpacked and rounded.
    """
    stored, made_fp8, _ = work.form.partition(MADE_FP8)
    form = FP8_MATMUL if made_fp8 else stored
    layers = _layer_rows(card.products, form, work) or _layer_rows(card.products, PLAIN, work)
    unpacked = _layer_rows(card.products, stored, work)
    attention = _backend_rows(card.attention, work.attention) or _backend_rows(card.attention, SDPA)
    within = card.gbps(WITHIN)
    if not layers or not attention or within is None:
        return None
    products = sum(share * work.product_flops / (1e12 * _full_speed(row)) for row, share in layers)
    per_weight = sum(share * _prepare_seconds(row) / (row.inputs * row.outputs) for row, share in unpacked)
    per_weight += ROUNDED_BYTES / (1e9 * within) if made_fp8 else 0.0
    self_seconds = work.self_flops / (1e12 * _speed(attention, work.tokens, work.tokens))
    cross_seconds = work.cross_flops / (1e12 * _speed(attention, work.tokens, work.context_keys))
    other = per_weight * work.block_weights + work.moved_bytes / (1e9 * within)
    return PassParts(products, self_seconds + cross_seconds, other)


def gemm_share(rows: int) -> float:
    """The share of full speed that a product of so many rows reaches."""
    return next(share for least, share in GEMM_EFFICIENCY if rows >= least)


def _layer_rows(rows: Sequence[ProductRow], form: str, work: PassWork) -> list[tuple[ProductRow, float]]:
    """For each kind of layer the measured one that is nearest in shape, and its share of the FLOPs."""
    own = [row for row in rows if row.form == form and row.tflops]
    if not own:
        return []
    kinds = (
        (work.dim, work.dim, 1 - work.ffn_share),
        (work.dim, work.ffn_dim, work.ffn_share / 2),
        (work.ffn_dim, work.dim, work.ffn_share / 2),
    )
    return [(min(own, key=lambda row: _distance(row, inputs, outputs)), share) for inputs, outputs, share in kinds]


def _distance(row: ProductRow, inputs: int, outputs: int) -> float:
    return abs(math.log(row.inputs / inputs)) + abs(math.log(row.outputs / outputs))


def _full_speed(row: ProductRow) -> float:
    """TFLOP/s with as many rows as one likes."""
    assert row.tflops is not None
    return row.tflops / gemm_share(row.rows)


def _prepare_seconds(row: ProductRow) -> float:
    return (row.prepare_milliseconds or 0.0) / 1e3


def _backend_rows(rows: Sequence[AttentionRow], backend: str) -> list[AttentionRow]:
    """Those of a backend that have figures; [] unless self-attention is among them."""
    own = [row for row in rows if row.backend == backend and row.tflops]
    return own if any(row.queries == row.keys for row in own) else []


def _speed(rows: Sequence[AttentionRow], queries: int, keys: int) -> float:
    """TFLOP/s of attention of this size: between two lengths by their logarithms, beyond them as at the nearest.

    Attention over few keys goes by measurements of such, where there are any.
    """
    crossing = [row for row in rows if row.queries != row.keys]
    if crossing and queries != keys and keys <= FEW_KEYS:
        length, own = math.log(queries), sorted(crossing, key=lambda row: row.queries)
    else:
        length, own = math.log(max(keys, 1)), sorted((r for r in rows if r.queries == r.keys), key=lambda row: row.keys)
    points = [(math.log(row.queries), row.tflops or 0.0) for row in own]
    for (x, low), (next_x, high) in pairwise(points):
        if length <= x:
            return low
        if length < next_x:
            return low + (high - low) * (length - x) / (next_x - x)
    return points[0][1] if length <= points[0][0] else points[-1][1]
