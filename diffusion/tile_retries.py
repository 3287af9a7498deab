"""Work that is done again in smaller and smaller tiles until the device holds it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


def in_shrinking_tiles(whole: Callable[[], T], tiled: Callable[[int], T], tiles: Sequence[int], what: str) -> T:
    """What `whole` makes; where the device runs out of memory, what `tiled` makes of the first of `tiles` that fits.

    `tiles` are pixels, largest first; `what` is for the log. The device's error is raised where none fits.
    """
    try:
        return whole()
    except torch.cuda.OutOfMemoryError as error:
        problem = error.with_traceback(None)  # the traceback holds the failed pass's tensors
    for tile in tiles:
        torch.cuda.empty_cache()
        logger.warning("out of VRAM while %s: next in tiles of %d pixels", what, tile)
        try:
            return tiled(tile)
        except torch.cuda.OutOfMemoryError as error:
            problem = error.with_traceback(None)
    raise problem
