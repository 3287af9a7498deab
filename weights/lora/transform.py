"""Updates that depend on the weight which they change. They can only be merged.

Sources: GLoRA, arXiv 2306.07967; OFT, arXiv 2306.07280; BOFT, arXiv 2311.06243; how they are stored: LyCORIS
(`lycoris/modules`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .update import Read, Update, rows_of

EPSILON = 1e-8


@dataclass(frozen=True)
class Generalized(Update):
    """GLoRA: `weight @ a1 @ a2 + b1 @ b2` is added; older files have each pair the other way round (`is_old`)."""

    is_old: bool = False

    def merge_(self, weight: Tensor, read: Read, strength: float) -> None:
        flat = weight.view(weight.shape[0], -1)
        a1, a2, b1, b2 = (read(self.keys[part]).flatten(1).float() for part in ("a1", "a2", "b1", "b2"))
        if self.is_old:
            a1, a2, b1, b2 = a2, a1, b2, b1
        flat.add_(flat @ a1 @ a2 + rows_of(b1, self.rows) @ b2, alpha=self.scale * strength)


@dataclass(frozen=True)
class Orthogonal(Update):
    """OFT: blocks of rows are rotated; BOFT: so are those of a butterfly's shuffles, one after the other.

    `constraint` is the alpha of these files: the largest norm of what the rotations are made of; 0 for none.
    """

    constraint: float = 0.0

    def merge_(self, weight: Tensor, read: Read, strength: float) -> None:
        rotations = self._rotations(read(self.keys["oft_blocks"]).float())
        rescale = read(self.keys["rescale"]).float().reshape(-1, 1) if "rescale" in self.keys else None
        flat = weight.view(weight.shape[0], -1)
        # of OFT the change is scaled, of BOFT each of its turns, as their authors' programs do it
        changed = _turned(flat, rotations) if rotations.ndim == 3 else _shuffled(flat, rotations, strength)
        if rescale is not None:
            changed = changed * (rescale if rotations.ndim == 3 else torch.lerp(torch.ones(1), rescale, strength))
        if rotations.ndim == 3:
            flat.lerp_(changed, strength)
        else:
            flat.copy_(changed)

    def _rotations(self, blocks: Tensor) -> Tensor:
        """Cayley's: `(1 + q) / (1 - q)` of skew-symmetric matrices, `[..., size, size]`."""
        skew = blocks - blocks.transpose(-1, -2)
        norm = skew.norm() + EPSILON
        if 0 < self.constraint < norm:
            skew *= self.constraint / norm
        one = torch.eye(blocks.shape[-1])
        return (one + skew) @ (one - skew).inverse()


def _turned(flat: Tensor, rotations: Tensor) -> Tensor:
    """`flat [out, in]` by `rotations [blocks, size, size]`."""
    num_blocks, size, _ = rotations.shape
    return torch.einsum("k n m, k n c -> k m c", rotations, flat.view(num_blocks, size, -1)).flatten(0, 1)


def _shuffled(flat: Tensor, rotations: Tensor, strength: float) -> Tensor:
    """`flat [out, in]` by `rotations [steps, blocks, size, size]`, each so much of the way."""
    size = rotations.shape[-1]
    for step, turns in enumerate(torch.lerp(torch.eye(size), rotations, strength)):
        stride = 2**step * (size // 2)
        shuffled = flat.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        turned = torch.einsum("b i j, b j c -> b i c", turns, shuffled).flatten(0, 1)
        flat = turned.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    return flat
