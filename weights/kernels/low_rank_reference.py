"""The two products of a low-rank update.

Both are bound by memory: one reads x `[rows, in]`, the other reads and writes y `[rows, out]`; what they make and read
besides, `hidden [rows, R]` and the factors, stays in cache. Up to R = 200 or so an H200 multiplies faster than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class LowRankOps(Protocol):
    """Sums in fp32; results in the dtype of `x` or `y`."""

    @property
    def name(self) -> str: ...

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        """`x [rows, in] @ down [R, in].T * scale [R]`: `[rows, R]`; `scale` is fp32."""
        ...

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor) -> None:
        """`y [rows, out] += hidden [rows, R] @ up [out, R].T`."""
        ...

    def add_up_gelu_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Callable[[Tensor], None]) -> None:
        """The same, then GELU (tanh approximation), in one pass over y where it can be; `gelu_` is the other pass."""
        ...


class TorchLowRankOps:
    """The reference, and what runs without Triton."""

    name = "torch"

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        return (x @ down.t()).mul_(scale)

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor) -> None:
        y.addmm_(hidden, up.t())

    def add_up_gelu_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Callable[[Tensor], None]) -> None:
        self.add_up_(y, hidden, up)
        gelu_(y)


TORCH = TorchLowRankOps()
