"""What a LoRA changes: tensors that it adds to or replaces, and how it changes a layer's weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.lora_keys import MAGNITUDE

Read = Callable[[str], Tensor]  # a tensor of the LoRA's file, by its key


class Change(ABC):
    """What one LoRA does to one tensor of a model."""

    @abstractmethod
    def merge_(self, weight: Tensor, read: Read, strength: float) -> None:
        """Change `weight` fp32 in place; 1 is as the LoRA was trained."""


@dataclass(frozen=True)
class Difference(Change):
    """What is added to a tensor, by its key, times `scale`; its shape may have more or fewer dimensions.

    `rows` are those of the file's tensor that are this one's, in its order (see `LayerPart`).
    """

    key: str
    rows: tuple[range, ...] = ()
    scale: float = 1.0

    def values(self, read: Read) -> Tensor:
        """As stored."""
        return rows_of(read(self.key), self.rows)

    def merge_(self, weight: Tensor, read: Read, strength: float) -> None:
        weight.add_(self.values(read).float().view(weight.shape), alpha=self.scale * strength)


@dataclass(frozen=True)
class Replacement(Change):
    """What takes the place of a tensor, at every strength but 0, as in ComfyUI."""

    key: str
    rows: tuple[range, ...] = ()

    def values(self, read: Read) -> Tensor:
        """As stored."""
        return rows_of(read(self.key), self.rows)

    def merge_(self, weight: Tensor, read: Read, strength: float) -> None:
        if strength:
            weight.copy_(self.values(read).view(weight.shape))


@dataclass(frozen=True)
class Update(Change):
    """A change of a layer's weight `[out, ...]`; `keys` are its parts in the file, by their names in `lora_keys`.

    `scale` is alpha / rank, or what stands for it. `rows` are the layer's of the outputs in the file, in its order
    (see `LayerPart`).
    """

    keys: Mapping[str, str]
    scale: float = 1.0
    rows: tuple[range, ...] = ()

    @property
    def factors_rank(self) -> int:
        """The rank of `up` and `down`, where they are all of it and may run beside the layer; else 0."""
        return 0


@dataclass(frozen=True)
class Additive(Update):
    """An update that is added to the weight: `delta * scale`.

    With a magnitude it is a DoRA: the sum's rows (or columns) get those lengths. Source: arXiv 2402.09353.
    """

    @property
    @abstractmethod
    def rank(self) -> int:
        """Of `up` and `down`; 0 where there are no such factors."""

    @property
    def factors_rank(self) -> int:
        return 0 if MAGNITUDE in self.keys else self.rank

    @abstractmethod
    def up(self, read: Read) -> Tensor:
        """`[out, rank]`, its rows those of this layer."""

    @abstractmethod
    def down(self, read: Read) -> Tensor:
        """`[rank, in]`."""

    def add_(self, flat: Tensor, read: Read, scale: float) -> None:
        """Add all of it, times `scale`, to a weight `[out, in]` fp32."""
        flat.addmm_(self.up(read).float(), self.down(read).float(), alpha=scale)

    def merge_(self, weight: Tensor, read: Read, strength: float) -> None:
        flat = weight.view(weight.shape[0], -1)
        if MAGNITUDE not in self.keys:
            self.add_(flat, read, self.scale * strength)
            return
        changed = flat.clone()
        self.add_(changed, read, self.scale)
        flat.lerp_(decomposed(changed, self.magnitude(read, *flat.shape)), strength)

    def magnitude(self, read: Read, num_rows: int, num_columns: int) -> Tensor:
        """A DoRA's lengths fp32: `[out, 1]`, or `[1, in]`; of a square weight the stored shape tells which."""
        stored = read(self.keys[MAGNITUDE])
        count = stored.numel()
        by_column = count == num_columns and not self.rows and (count != num_rows or stored.shape[:1] == (1,))
        if by_column:
            return stored.reshape(1, -1).float()
        return rows_of(stored.reshape(-1, 1), self.rows).float()


def decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """`weight [out, in]` with rows of the lengths `magnitude [out]` or `[out, 1]`, or columns of `[1, in]`."""
    by_column = magnitude.ndim == 2 and magnitude.shape[0] == 1 and weight.shape[0] != 1
    lengths = weight.norm(dim=0 if by_column else 1, keepdim=True)
    return weight * (magnitude.reshape(lengths.shape) / lengths.clamp_min(torch.finfo(torch.float32).tiny))


def rows_of(tensor: Tensor, rows: Sequence[range]) -> Tensor:
    """Some rows of a tensor, in this order; all of it where none are named."""
    return torch.cat([tensor[part.start : part.stop] for part in rows]) if rows else tensor
