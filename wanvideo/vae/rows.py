"""Which rows of a frame each layer sees and makes where frames are coded in strips, from the top down.

A strip is a number of rows over the whole time. What a layer makes of it ends where its successors need it to, never
further: so a 3x3 convolution makes as many rows as the next one sees, less the one that it cannot know yet, and rows
of its input that the strip below needs again are kept instead of made twice. All of it is arithmetic on row numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

FirstNeeded = Callable[[int], int]


@dataclass(frozen=True)
class Level:
    """Frames between two layers: the rows at which each strip ends, their width, and how many a later step makes."""

    ends: tuple[int, ...]
    width: int
    frames: int

    @property
    def height(self) -> int:
        return self.ends[-1]

    @property
    def begins(self) -> tuple[int, ...]:
        """The rows at which each strip begins."""
        return (0, *self.ends[:-1])


@dataclass(frozen=True)
class Rows:
    """What a layer sees and makes in one strip, in rows.

    Its input is `above` rows that the strip above left and `new` ones; its result is `out` rows. The first row of the
    input lies `offset` rows below the first of the result, in rows of the result. The last `kept` rows of the input
    are left for the strip below. Strips whose rows are equal in all layers do the same work.
    """

    above: int
    new: int
    out: int
    kept: int
    offset: int
    is_top: bool
    is_bottom: bool


@dataclass(frozen=True)
class LayerRows:
    """A layer's input and result, and the first row of its input that each strip of the result is made of."""

    inputs: Level
    outputs: Level
    starts: tuple[int, ...]

    @property
    def num_strips(self) -> int:
        return len(self.starts)

    @property
    def most_kept(self) -> int:
        """Rows that a strip leaves for the next, at most."""
        return max(self.strip(index).kept for index in range(self.num_strips))

    @property
    def counts_out(self) -> tuple[int, ...]:
        """The numbers of rows that strips make, from the least on."""
        return tuple(sorted({self.strip(index).out for index in range(self.num_strips)} - {0}))

    def strip(self, index: int) -> Rows:
        begin, end, start = self.inputs.begins[index], self.inputs.ends[index], self.starts[index]
        out_begin, out_end = self.outputs.begins[index], self.outputs.ends[index]
        kept = end - self.starts[index + 1] if index + 1 < self.num_strips else 0
        at_edges = out_begin == 0, out_end == self.outputs.height
        offset = start * self.outputs.height // self.inputs.height - out_begin
        return Rows(begin - start, end - begin, out_end - out_begin, kept, offset, *at_edges)


@dataclass(frozen=True)
class Seam:
    """Rows that one layer leaves for the strip below: at most so many, of as many frames in a step."""

    channels: int
    rows: int
    width: int
    frames: int

    @property
    def elements(self) -> int:
        """Of one frame."""
        return self.channels * self.rows * self.width


@dataclass(frozen=True)
class Convolution:
    """What a layer convolves but its rows: channels, the kernel's height and width, steps, columns of the input.

    `padding` is of columns, on each side. Of one that `is_kept` the input is remembered.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: int
    width: int
    padding: int
    is_kept: bool = False

    def seen(self, rows: int) -> int:
        """Rows of the input for so many of the result."""
        return (rows - 1) * self.stride + self.kernel[0]

    def frame_bytes(self, rows: int, bytes_per_number: int) -> int:
        """Of the input and the result of so many rows."""
        seen = self.in_channels * self.seen(rows) * self.width
        made = self.out_channels * rows * (self.width // self.stride)
        return bytes_per_number * (seen + made)


@dataclass
class StripPlan:
    """The rows of every layer of a network, found from its last to its first."""

    layers: dict[nn.Module, LayerRows] = field(default_factory=dict)
    seams: dict[nn.Module, Seam] = field(default_factory=dict)
    convolutions: dict[nn.Module, Convolution] = field(default_factory=dict)

    def add(
        self, layer: nn.Module, inputs: Level, outputs: Level, first_needed: FirstNeeded = lambda row: row
    ) -> Level:
        """Note a layer whose result from a row on is made of its input from `first_needed(row)` on."""
        starts = tuple(
            min(first_needed(out), begin) if out else 0
            for out, begin in zip(outputs.begins, inputs.begins, strict=True)
        )
        self.layers[layer] = LayerRows(inputs, outputs, starts)
        return inputs

    def add_seam(self, layer: nn.Module, channels: int) -> None:
        """Note that a layer that was added leaves rows of its input, of so many channels."""
        rows = self.layers[layer]
        self.seams[layer] = Seam(channels, rows.most_kept, rows.inputs.width, rows.inputs.frames)

    @property
    def num_strips(self) -> int:
        return next(iter(self.layers.values())).num_strips


def seen_by_3x3(out: Level) -> Level:
    """The input of a 3x3 convolution that is padded by a row above and below."""
    return Level(tuple(min(out.height, end + 1) for end in out.ends), out.width, out.frames)


def cut_rows(height: int, rows: int) -> tuple[int, ...]:
    """The ends of the fewest strips of at most `rows` rows, evenly high."""
    count = -(-height // max(rows, 1))
    return tuple(height * (index + 1) // count for index in range(count))


def cut_alike(height: int, rows: int, unit: int) -> tuple[int, ...]:
    """The same of strips that are multiples of `unit` and equal but for the last, where `rows` are as many."""
    count = -(-height // max(rows, 1))
    step = -(-height // (count * unit)) * unit
    if step > rows or step * (count - 1) >= height:
        return cut_rows(height, rows)
    return tuple(min(step * (index + 1), height) for index in range(count))
