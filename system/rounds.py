"""How many rows go through a device at a time, as it computes them in tiles, and tiles in rounds of its processors."""

from __future__ import annotations

TILE_ROWS = 256
# Queries of a head that one processor of a GPU attends for at a time, in FlashAttention, cuDNN and SageAttention; and
# how many more it could attend for in the time that another part takes, where keys and values are unpacked for each.
QUERY_TILE, PART_QUERIES = 128, 256


def even_step(count: int, most: int) -> int:
    """So many rows at a time, at most `most`, that parts of `count` are about even.

    Products are computed in tiles of up to 256 rows: a tile that is begun costs as much as a whole one.
    """
    if not count:
        return most
    num_parts = -(-count // most)
    return min(most, -(-count // num_parts // TILE_ROWS) * TILE_ROWS)


def most_queries(count: int, most: int) -> int:
    """The most that `query_step` takes of `count` queries on whatever device: an eighth more than of even parts."""
    even = min(count, even_step(count, most))
    return min(count, most, max(even, even * 9 // 8 // QUERY_TILE * QUERY_TILE))


def query_step(count: int, most: int, num_heads: int, processors: int | None) -> int:
    """So many queries at a time, at most `most_queries`, that a GPU of so many processors attends for `count` soonest.

    Each processor takes a tile of one head's queries through all keys: a round of all processors in which some have
    none takes as long as a full one. None for a device that has no such processors: parts are about even.
    """
    if processors is None or count <= most:
        return min(count, even_step(count, most))

    def rounds(queries: int) -> int:
        return -(-(-(-queries // QUERY_TILE) * num_heads) // processors)

    def cost(step: int) -> tuple[int, int]:
        whole, rest = divmod(count, step)
        parts = -(-count // step)
        return (whole * rounds(step) + rounds(rest)) * QUERY_TILE * processors + parts * PART_QUERIES * num_heads, step

    largest = most_queries(count, most)
    least = max(QUERY_TILE, min(most // 2, largest) // QUERY_TILE * QUERY_TILE)
    return min((*range(least, largest + 1, QUERY_TILE), even_step(count, most)), key=cost)
