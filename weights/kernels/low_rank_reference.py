"""The two products of a low-rank update.

Both are bound by memory: one reads x `[rows, in]`, the other reads and writes y `[rows, out]`; what they make and read
besides, `hidden [rows, R]` and the factors, stays in cache. Up to R = 200 or so an H200 multiplies faster than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Gelu = Callable[[Tensor], None]


class LowRankOps(Protocol):
    """Sums in fp32; results in the dtype of `x` or `y`."""

    @property
    def name(self) -> str: ...

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        """`x [rows, in] @ down [R, in].T * scale [R]`: `[rows, R]`; `scale` is fp32."""
        ...

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Gelu | None = None) -> None:
        """`y [rows, out] += hidden [rows, R] @ up [out, R].T`.

        With `gelu_`, which does that in place, GELU (tanh approximation) follows: in the same pass where that can be.
        """
        ...


class TorchLowRankOps:
    """The reference, and what runs without Triton."""

    name = "torch"

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        return (x @ down.t()).mul_(scale)

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Gelu | None = None) -> None:
        y.addmm_(hidden, up.t())
        if gelu_ is not None:
            gelu_(y)


TORCH = TorchLowRankOps()
