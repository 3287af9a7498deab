"""The one table of tiles: which sides there are, the largest that fits, and what follows one that did not."""

from __future__ import annotations

from collections.abc import Callable

TILES = tuple(range(1024, 64, -64))  # pixels of a side, largest first


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
