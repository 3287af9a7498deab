"""The part of a matrix product that one program of a Triton kernel makes."""

from typing import NamedTuple


class Tile(NamedTuple):
    """The sizes of that part, `[m, n]` in steps of `k`, and how the GPU runs it; operators take it as a tuple."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"
