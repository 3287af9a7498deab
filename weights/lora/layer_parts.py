"""The parts that a LoRA file has for one layer, and the update that they are together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..files.checkpoint import Checkpoint, TensorInfo
from ..files.lora_keys import ALPHA, DOWN, GENERALIZED, HADAMARD, KRONECKER, MAGNITUDE, MID, ORTHOGONAL, UP
from .low_rank import Hadamard, Kronecker, LowRankPair
from .scaling import Scaling
from .sound import check_scale, read_sound
from .transform import Generalized, Orthogonal
from .update import Update

Shape = tuple[int, ...]


class UnfitError(Exception):
    """Why parts are no update of their layer; `differs` says that only its size is another."""

    def __init__(self, reason: str, differs: bool = False):
        super().__init__(reason)
        self.differs = differs


@dataclass(frozen=True)
class Found:
    """A key, and the rows of it that are a layer's; in all it should have `num_rows` (0: as many as the layer).

    `module` is the layer as the file's trainer calls it.
    """

    key: str
    module: str
    rows: tuple[range, ...] = ()
    num_rows: int = 0


@dataclass(frozen=True)
class LayerParts:
    """What a file has for one layer: `found` by part. `weight` is the layer's; None where it has none."""

    checkpoint: Checkpoint
    scaling: Scaling | None
    weight: TensorInfo | None
    found: Mapping[str, Found]

    def update(self) -> tuple[Update, tuple[str, ...]] | None:
        """The update, and the parts of which it is made; None where there is none. UnfitError says why not."""
        kind = next((kind for kind in KINDS if not self.found.keys().isdisjoint(kind.parts)), None)
        if kind is None:
            if self.found.keys().isdisjoint((ALPHA, MAGNITUDE)):
                return None
            raise UnfitError("half of a pair")
        parts = tuple(part for part in (*kind.parts, ALPHA, MAGNITUDE) if part in self.found)
        if ALPHA in parts and math.prod(self.shape(ALPHA)) != 1:
            raise UnfitError("its alpha is not one number")
        update = kind.make(self)
        if MAGNITUDE in parts:
            self._check_magnitude(kind)
        return update, parts

    @property
    def wanted(self) -> Shape:
        """`[outputs that the file should have, the weight's other dimensions]`."""
        assert self.weight is not None
        rows, *others = self.weight.unpacked_shape
        return (self.num_rows or rows, *others)

    @property
    def num_rows(self) -> int:
        """Outputs in the file of which the layer's are a part; 0 where the layer is all of it."""
        return next(iter(self.found.values())).num_rows

    def shape(self, part: str) -> Shape:
        return self.checkpoint.tensors[self.found[part].key].shape

    def keys(self, parts: Iterable[str]) -> dict[str, str]:
        return {part: self.found[part].key for part in (*parts, MAGNITUDE) if part in self.found}

    def rows(self) -> tuple[range, ...]:
        return next(iter(self.found.values())).rows

    def need(self, what: str, *parts: str) -> None:
        """UnfitError unless the file has these parts, and the model the layer."""
        if not self.found.keys() >= set(parts):
            raise UnfitError(f"half of a {what}")
        if self.weight is None or len(self.wanted) < 2:
            raise UnfitError("the model has no such layer")

    def alpha(self) -> float | None:
        return float(read_sound(self.checkpoint, self.found[ALPHA].key)) if ALPHA in self.found else None

    def scale(self, rank: int) -> float:
        """alpha / rank; without an alpha it is the rank. A rank of 0: alphas in the file's keys mean nothing."""
        if ALPHA in self.found:
            if not rank:
                return 1.0
            key = self.found[ALPHA].key
            return check_scale(float(read_sound(self.checkpoint, key)) / rank, self.checkpoint, key)
        if self.scaling is None:
            return 1.0
        module = next(iter(self.found.values())).module
        return check_scale(self.scaling.scale(module, rank), self.checkpoint, f"{self.scaling.source} of {module}")

    def check_size(self, num_rows: int, num_columns: int) -> None:
        rows, columns = self.wanted[0], math.prod(self.wanted[1:])
        if (num_rows, num_columns) != (rows, columns):
            how = f"{num_columns} to {num_rows} features, the model has {columns} to {rows}"
            raise UnfitError(how, differs=True)

    def _check_magnitude(self, kind: Kind) -> None:
        if kind.make in (make_generalized, make_orthogonal):
            raise UnfitError("a DoRA of what is no low-rank pair")
        count, allowed = math.prod(self.shape(MAGNITUDE)), (self.wanted[0], math.prod(self.wanted[1:]))
        # of a part of the layer there are no magnitudes per input
        if count not in allowed[: 1 if self.num_rows else 2]:
            raise UnfitError("its magnitudes are neither one per output nor one per input")


# --- kinds -----------------------------------------------------------------------------------------------


def make_pair(parts: LayerParts) -> LowRankPair:
    parts.need("pair", DOWN, UP)
    down, up = parts.shape(DOWN), parts.shape(UP)
    if MID in parts.found:
        mid = parts.shape(MID)
        if len(mid) < 2 or not down or mid[1] != down[0] or mid[0] != math.prod(up[1:]):
            raise UnfitError(f"its factors are {list(up)}, {list(mid)} and {list(down)}, which cannot be multiplied")
        rank, given = mid[0], (up[0], math.prod(down[1:]) * math.prod(mid[2:]))
    else:
        rank, given = (down or (0,))[0], (up[0], math.prod(down[1:])) if down and up else (0, 0)
    parts.check_size(*given)
    if not rank or math.prod(up) != up[0] * rank:
        raise UnfitError(f"its factors are {list(up)} and {list(down)}, which cannot be multiplied")
    return LowRankPair(parts.keys((DOWN, UP, MID)), parts.scale(rank), parts.rows(), rank)


def make_hadamard(parts: LayerParts) -> Hadamard:
    parts.need("LoHa", *HADAMARD[:4])
    sizes = []
    for number in "12":
        a, b = (parts.shape(f"hada_w{number}_{end}") for end in "ab")
        core = parts.shape(f"hada_t{number}") if f"hada_t{number}" in parts.found else None
        sizes.append(_product_size(a, b, core))
    if sizes[0] != sizes[1]:
        raise UnfitError(f"its halves are {sizes[0][1]} to {sizes[0][0]} and {sizes[1][1]} to {sizes[1][0]} features")
    parts.check_size(*sizes[0])
    ranks = tuple(parts.shape(f"hada_w{number}_b")[0] for number in "12")
    return Hadamard(parts.keys(HADAMARD), parts.scale(ranks[0]), parts.rows(), (ranks[0], ranks[1]))


def make_kronecker(parts: LayerParts) -> Kronecker:
    parts.need("LoKr")
    sizes, ranks, alpha_rank = [], [], 0
    for number in "12":
        whole = f"lokr_w{number}"
        if whole in parts.found:
            rows, *others = parts.shape(whole) or (0,)
            sizes.append((rows, math.prod(others)))
            ranks.append(min(sizes[-1]) if len(others) == 1 else 0)
            continue
        parts.need("LoKr", f"{whole}_a", f"{whole}_b")
        a, b = parts.shape(f"{whole}_a"), parts.shape(f"{whole}_b")
        core = parts.shape(f"lokr_t{number}") if f"lokr_t{number}" in parts.found else None
        sizes.append(_product_size(a, b, core))
        alpha_rank = b[0]  # of both decomposed it is the second's, as in LyCORIS
        ranks.append(0 if core else b[0])
    parts.check_size(sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1])
    return Kronecker(parts.keys(KRONECKER), parts.scale(alpha_rank), parts.rows(), (ranks[0], ranks[1]))


def make_generalized(parts: LayerParts) -> Generalized:
    parts.need("GLoRA", *GENERALIZED)
    a1, a2, b1, b2 = (parts.shape(part) for part in GENERALIZED)
    if any(len(shape) < 2 or math.prod(shape[2:]) != 1 for shape in (a1, a2, b1, b2)):
        raise UnfitError("a GLoRA with a kernel")
    rows, columns = parts.wanted[0], math.prod(parts.wanted[1:])
    is_new = a1[1] == a2[0] == b1[1] == b2[0]
    is_old = a2[1] == a1[0] == b2[1] == b1[0]
    as_new = is_new and not (is_old and a2[0] == rows == columns)
    if as_new:
        rank, size, inner = a1[1], (b1[0], b2[1]), (a1[0], a2[1])
    elif is_old:
        rank, size, inner = a1[0], (b2[0], b1[1]), (a2[0], a1[1])
    else:
        raise UnfitError("its factors cannot be multiplied")
    parts.check_size(*size)
    if inner != (columns, columns):
        raise UnfitError(f"{inner[0]} to {inner[1]} features, the model has {columns} inputs", differs=True)
    return Generalized(parts.keys(GENERALIZED), parts.scale(rank), parts.rows(), not as_new)


def make_orthogonal(parts: LayerParts) -> Orthogonal:
    parts.need("OFT", "oft_blocks")
    if parts.num_rows:
        raise UnfitError("rotates several layers in one, which are apart in this model")
    blocks = parts.shape("oft_blocks")
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
        raise UnfitError(f"its rotations are {list(blocks)}; expected [(steps,) blocks, size, size]")
    if blocks[-3] * blocks[-2] != parts.wanted[0]:
        raise UnfitError(f"rotates {blocks[-3] * blocks[-2]} outputs, the model has {parts.wanted[0]}", differs=True)
    if "rescale" in parts.found and math.prod(parts.shape("rescale")) != parts.wanted[0]:
        raise UnfitError("its rescale is not one number per output")
    return Orthogonal(parts.keys(ORTHOGONAL), 1.0, (), parts.alpha() or 0.0)


@dataclass(frozen=True)
class Kind:
    """A decomposition: its parts, and what makes an update of them."""

    parts: tuple[str, ...]
    make: Callable[[LayerParts], Update]


KINDS = (
    Kind((DOWN, UP, MID), make_pair),
    Kind(HADAMARD, make_hadamard),
    Kind(KRONECKER, make_kronecker),
    Kind(GENERALIZED, make_generalized),
    Kind(ORTHOGONAL, make_orthogonal),
)


def _product_size(a: Shape, b: Shape, core: Shape | None) -> tuple[int, int]:
    """Rows and columns of `a @ b`, or of a Tucker product around a core."""
    if len(a) < 2 or len(b) < 2:
        raise UnfitError(f"its factors are {list(a)} and {list(b)}, which cannot be multiplied")
    if core is not None:
        if core[:2] != (a[0], b[0]):
            raise UnfitError(f"its factors are {list(core)}, {list(a)} and {list(b)}, which cannot be multiplied")
        return a[1], b[1] * math.prod(core[2:])
    if a[1] != b[0]:
        raise UnfitError(f"its factors are {list(a)} and {list(b)}, which cannot be multiplied")
    return a[0], math.prod(b[1:])
