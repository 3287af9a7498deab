"""Sizes of grids and blocks of Triton kernels, as a launch needs them.

Triton's own functions of these names are for its compiler too: on the host each takes as long as a view of a tensor,
and a block of a transformer asks for some twenty.
"""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """How many of so many are needed for all."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << (count - 1).bit_length()
