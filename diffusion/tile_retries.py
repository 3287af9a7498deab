"""Work that is done again in smaller and smaller tiles until the device holds it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Tile(NamedTuple):
    """The side of a spatial tile in pixels, and the latent frames of a temporal one; None: the whole time."""

    pixels: int
    latents: int | None = None

    def __str__(self) -> str:
        times = "" if self.latents is None else f", {self.latents} latents of time at once"
        return f"{self.pixels} pixels{times}"


def in_shrinking_tiles(whole: Callable[[], T], tiled: Callable[[Tile], T], tiles: Sequence[Tile], what: str) -> T:
    """What `whole` makes; where the device runs out of memory, what `tiled` makes of the first of `tiles` that fits.

    `tiles` come largest first; `what` is for the log. The device's error is raised where none fits.
    """
    try:
        return whole()
    except torch.cuda.OutOfMemoryError as error:
        problem = error.with_traceback(None)  # the traceback holds the failed pass's tensors
    for tile in tiles:
        torch.cuda.empty_cache()
        logger.warning("out of VRAM while %s: next in tiles of %s", what, tile)
        try:
            return tiled(tile)
        except torch.cuda.OutOfMemoryError as error:
            problem = error.with_traceback(None)
    raise problem
