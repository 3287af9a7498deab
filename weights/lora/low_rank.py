"""Updates that are products of low-rank factors, whatever they are stored as.

A Hadamard product of two low-rank matrices, and a Kronecker product with one, are of low rank themselves: their
factors run beside a layer as a plain LoRA's do. Sources: LoRA, arXiv 2106.09685; LoHa, arXiv 2108.06098; LoKr and the
matrices in the middle of convolutions, LyCORIS (`lycoris/functional`), arXiv 2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.lora_keys import DOWN, MID, UP
from .update import Additive, Read, rows_of


@dataclass(frozen=True)
class LowRankPair(Additive):
    """`up [out, rank] @ down [rank, in]`; a convolution may have its kernel between them, `mid [rank, rank, ...]`."""

    pair_rank: int = 0

    @property
    def rank(self) -> int:
        return self.pair_rank

    def up(self, read: Read) -> Tensor:
        return rows_of(read(self.keys[UP]), self.rows).flatten(1)

    def down(self, read: Read) -> Tensor:
        down = read(self.keys[DOWN])
        if MID not in self.keys:
            return down.flatten(1)
        return torch.einsum("m n ..., n i -> m i ...", read(self.keys[MID]).float(), down.flatten(1).float()).flatten(1)


@dataclass(frozen=True)
class Hadamard(Additive):
    """LoHa: `(w1_a @ w1_b) * (w2_a @ w2_b)`, element by element; of convolutions each with a core `t1`, `t2`."""

    ranks: tuple[int, int] = (0, 0)

    @property
    def rank(self) -> int:
        return 0 if "hada_t1" in self.keys else self.ranks[0] * self.ranks[1]

    def up(self, read: Read) -> Tensor:
        first, second = (read(self.keys[part]).float() for part in ("hada_w1_a", "hada_w2_a"))
        return rows_of(torch.einsum("o r, o s -> o r s", first, second).flatten(1), self.rows)

    def down(self, read: Read) -> Tensor:
        first, second = (read(self.keys[part]).flatten(1).float() for part in ("hada_w1_b", "hada_w2_b"))
        return torch.einsum("r i, s i -> r s i", first, second).flatten(0, 1)

    def add_(self, flat: Tensor, read: Read, scale: float) -> None:
        first, second = (self._half(read, number) for number in "12")
        flat.add_(rows_of(first.mul_(second), self.rows), alpha=scale)

    def _half(self, read: Read, number: str) -> Tensor:
        a, b = (read(self.keys[f"hada_w{number}_{end}"]).float() for end in "ab")
        core = self.keys.get(f"hada_t{number}")
        return a @ b.flatten(1) if core is None else with_core(read(core).float(), a, b).flatten(1)


@dataclass(frozen=True)
class Kronecker(Additive):
    """LoKr: `kron(w1, w2)`, either of which may be a product `a @ b`; `ranks` are theirs, or their smaller sides."""

    ranks: tuple[int, int] = (0, 0)

    @property
    def rank(self) -> int:
        return self.ranks[0] * self.ranks[1]

    def up(self, read: Read) -> Tensor:
        (first, _), (second, _) = (self._factors(read, number) for number in "12")
        return rows_of(torch.kron(first, second), self.rows)

    def down(self, read: Read) -> Tensor:
        (_, first), (_, second) = (self._factors(read, number) for number in "12")
        return torch.kron(first, second)

    def add_(self, flat: Tensor, read: Read, scale: float) -> None:
        first, second = (self._whole(read, number) for number in "12")
        first = first.view(*first.shape, *[1] * (second.ndim - 2))
        product = torch.kron(first, second.contiguous()).reshape(-1, flat.shape[1])
        flat.add_(rows_of(product, self.rows), alpha=scale)

    def _factors(self, read: Read, number: str) -> tuple[Tensor, Tensor]:
        """Two whose product one of the matrices is; the identity beside a whole one."""
        if f"lokr_w{number}" not in self.keys:
            a, b = self._pair(read, number)
            return a, b
        whole = read(self.keys[f"lokr_w{number}"]).float()
        num_rows, num_columns = whole.shape
        if num_rows <= num_columns:
            return torch.eye(num_rows), whole
        return whole, torch.eye(num_columns)

    def _whole(self, read: Read, number: str) -> Tensor:
        if f"lokr_w{number}" in self.keys:
            return read(self.keys[f"lokr_w{number}"]).float()
        a, b = self._pair(read, number)
        core = self.keys.get(f"lokr_t{number}")
        return a @ b if core is None else with_core(read(core).float(), a, b)

    def _pair(self, read: Read, number: str) -> tuple[Tensor, Tensor]:
        a, b = (read(self.keys[f"lokr_w{number}_{end}"]).float() for end in "ab")
        return a, b


def with_core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A Tucker product `[out, in, ...]` of `core [r, s, ...]`, `a [r, out]` and `b [s, in]`."""
    return torch.einsum("i j ..., i p, j r -> p r ...", core, a, b)
