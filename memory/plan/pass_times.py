"""What a pass takes: by what was measured of the card, or by the rates that the limits have."""

from __future__ import annotations

from .card_times import PassParts, gemm_share, pass_parts
from .footprint import Choice, Limits, ModelFootprint, WorkSize

# Heads of an attention call, and the share of full speed it reaches with fewer, as with few rows (`GEMM_EFFICIENCY`).
FULL_SPEED_HEADS = 8
GROUPED_EFFICIENCY = 0.99
FEW_HEADS_EFFICIENCY = ((4, 0.96), (0, 0.95))  # by heads; fewer than 4 are assumed to cost a little more
# Likewise for the queries of one attention call; measured with cuDNN at 32,760 and 75,600 tokens.
QUERY_EFFICIENCY = ((16384, 0.996), (0, 0.98))
# To unpack keys and values takes as long as attention to them for so many rows (1.5 x TFLOP/s / TB/s: of an H200 214,
# of an RTX 4090 225).
UNPACKING_ROWS = 220


def compute_seconds(model: ModelFootprint, work: WorkSize, choice: Choice, limits: Limits) -> float:
    """Predicted time of one pass when no block has to be waited for."""
    parts = measured_parts(model, work, choice, limits) or _assumed_parts(model, work, choice, limits)
    share = _product_share(model, work, choice)
    heads = model.num_heads // choice.head_groups
    attention_share = 1.0
    if choice.head_groups > 1:
        few = next(share for least, share in FEW_HEADS_EFFICIENCY if heads >= least)
        attention_share = GROUPED_EFFICIENCY if heads >= FULL_SPEED_HEADS else few
    queries = choice.allowed_queries(work)
    if choice.packed_keys:
        attention_share /= 1 + UNPACKING_ROWS / queries
    if queries < work.rows:
        attention_share *= next(share for least, share in QUERY_EFFICIENCY if queries >= least)
    return parts.products / share + parts.attention / attention_share + parts.other


def _product_share(model: ModelFootprint, work: WorkSize, choice: Choice) -> float:
    """The share of full speed of all products; those of attention's queries and output have rows of a span at most."""

    def share(rows: int) -> float:
        return gemm_share(rows) if rows < work.rows else 1.0  # all at once is the best

    of_spans = 4 * model.dim / (6 * model.dim + 2 * model.ffn_dim) if model.streams_queries else 0.0
    span = min(choice.token_chunk, choice.allowed_queries(work))
    return 1 / (of_spans / share(span) + (1 - of_spans) / share(choice.token_chunk))


def measured_parts(model: ModelFootprint, work: WorkSize, choice: Choice, limits: Limits) -> PassParts | None:
    """The parts of a pass by what was measured of the card; None where that does not tell."""
    if limits.card is None:
        return None
    return pass_parts(limits.card, model.pass_work(work, choice.cache_text_kv, limits.fused))


def _assumed_parts(model: ModelFootprint, work: WorkSize, choice: Choice, limits: Limits) -> PassParts:
    products, attention = model.pass_flops(work, choice.cache_text_kv)
    return PassParts(products / (limits.tflops_matmul * 1e12), attention / (limits.tflops_attention * 1e12), 0.0)
