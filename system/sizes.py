"""Bytes in words, for people."""

from __future__ import annotations

GIB = 2**30

_BINARY = (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10))
_DECIMAL = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def in_gib(num_bytes: int) -> str:
    """Bytes in GiB; in MiB or KiB where GiB would say 0.00."""
    return _in_words(num_bytes, _BINARY, 2)


def in_gb(num_bytes: int, decimals: int = 2) -> str:
    """Bytes that travel, in GB with so many decimals; in MB or kB where GB would say nothing but noughts."""
    return _in_words(num_bytes, _DECIMAL, decimals)


def _in_words(num_bytes: int, units: tuple[tuple[str, int], ...], decimals: int) -> str:
    for unit, scale in units:
        figure = f"{num_bytes / scale:.{decimals}f}"
        if float(figure):
            return f"{figure} {unit}"
        decimals = 1
    return f"{num_bytes} B"
