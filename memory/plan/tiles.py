"""The one table of tiles and strips: which there are, the largest that fits, and what follows one that did not."""

from __future__ import annotations

from collections.abc import Callable

TILES = tuple(range(1024, 64, -64))  # pixels of a side, largest first
LEAST_ROWS = 16  # of a strip; thinner ones hardly take less


def fitting_tile(side: int, needed: Callable[[int], int], free_bytes: int) -> int | None:
    """The largest tile of a picture with sides up to `side` whose `needed(tile)` bytes are free.

    0 is the whole picture; None: not even the smallest fits.
    """
    sizes = (0, *(tile for tile in TILES if tile < side))
    return next((tile for tile in sizes if needed(tile) <= free_bytes), None)


def smaller_tiles(side: int) -> tuple[int, ...]:
    """What to try in turn after tiles (or whole pictures) of `side` did not fit: each takes about half of the last."""
    sizes: list[int] = []
    while side > TILES[-1]:
        side = next((tile for tile in TILES if 4 * tile <= 3 * side), TILES[-1])
        sizes.append(side)
    return tuple(sizes)


def strip_rows(height: int) -> tuple[int, ...]:
    """Rows of the strips that a picture may be cut into, the fewest strips first: multiples of 8, but for the last."""
    thickest = [-(-height // (8 * count)) * 8 for count in range(2, height // LEAST_ROWS + 1)]
    return tuple(dict.fromkeys(rows for rows in thickest if rows < height)) or (max(height // 2, 1),)


def thinner_strips(rows: int) -> tuple[int, ...]:
    """What to try in turn after strips of so many rows (or whole pictures of that height) did not fit: half as many."""
    thinner: list[int] = []
    while rows > LEAST_ROWS:
        rows = max(-(-rows // 16) * 8, LEAST_ROWS)
        thinner.append(rows)
    return tuple(thinner)
