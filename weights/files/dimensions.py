"""Dimensions of a model from the names and shapes of a checkpoint's tensors; what does not tell is named."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ...system.plain_text import short
from .checkpoint import Checkpoint, CheckpointError, TensorInfo

# Of ComfyUI, of diffusers' pipelines, of DiffSynth's training; what data-parallel and compiled models are saved with.
PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "pipe.dit.", "dit.", "module.",
    "_orig_mod.", "",
)  # fmt: skip

MOST_DIGITS = 6  # of a number that a file states


def stated_number(text: str) -> int | None:
    """A whole number of few digits that a file states in a text; None for any other text."""
    return int(text) if re.fullmatch(rf"[0-9]{{1,{MOST_DIGITS}}}", text.strip()) else None


def model_prefix(names: Iterable[str], roots: tuple[str, ...]) -> str | None:
    """What stands before a transformer's names in a file; None where no name fits.

    `roots` are the first parts of its names, which tell a prefix from a chance match.
    """
    names = list(names)

    def num_rooted(prefix: str) -> int:
        starts = tuple(prefix + root for root in roots)
        return sum(name.startswith(starts) for name in names)

    prefix = max(PREFIXES, key=num_rooted)
    return prefix if num_rooted(prefix) else None


def with_kernels(checkpoint: Checkpoint, kernels: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """The checkpoint with its convolutions to tokens `[dim, channels, *kernel]`, by layer: files may store them flat.

    (GGUF has four dimensions at most.) A bias tells `dim`; tensors in which such a kernel has no room keep their shape.
    """
    tensors = dict(checkpoint.tensors)
    for layer, kernel in kernels.items():
        weight, bias = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.bias")
        if weight is not None and bias is not None:
            tensors[weight.name] = _with_kernel(weight, math.prod(bias.unpacked_shape), kernel)
    return replace(checkpoint, tensors=tensors)


def _with_kernel(info: TensorInfo, dim: int, kernel: tuple[int, ...]) -> TensorInfo:
    shape = info.unpacked_shape
    channels, rest = divmod(math.prod(shape), max(dim * math.prod(kernel), 1))
    if len(shape) == len(kernel) + 2 or rest or not channels:
        return info
    whole = (dim, channels, *kernel)
    return replace(info, logical_shape=whole) if info.quant else replace(info, shape=whole)


def check_sizes(checkpoint: Checkpoint) -> None:
    """CheckpointError where a tensor has a dimension of nothing: what follows from it would be none either."""
    for info in checkpoint.tensors.values():
        _check_size(checkpoint, info)


def _check_size(checkpoint: Checkpoint, info: TensorInfo) -> None:
    shape = info.unpacked_shape
    if 0 in shape:
        raise CheckpointError(
            f"{info.file}: {short(info.name)} has shape {list(shape)}, which holds nothing; expected a size in "
            "each dimension; the file is damaged: download it again"
        )


@dataclass(frozen=True)
class Dimensions:
    """The shapes of a checkpoint under a model's own names; `title` is the model with its article, for messages."""

    checkpoint: Checkpoint
    title: str

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """A tensor's shape, unpacked, of nothing that is 0; CheckpointError where it lacks or is another."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.checkpoint.file_of(name)}: {self.title} without {name}; expected that tensor to tell its size; "
                "the file is incomplete: download it again"
            )
        shape = info.unpacked_shape
        if len(shape) != num_dims:
            raise CheckpointError(
                f"{self.checkpoint.file_of(name)}: {name} has shape {list(shape)}; expected {num_dims} dimensions; "
                f"it is not {self.title}'s: choose another file"
            )
        _check_size(self.checkpoint, info)
        return shape

    def parts(self, name: str, num_dims: int, size: int) -> int:
        """How many parts of `size` a tensor's first dimension has; CheckpointError where it has not a whole one."""
        shape = self.shape(name, num_dims)
        if shape[0] < size:
            raise CheckpointError(
                f"{self.checkpoint.file_of(name)}: {name} has shape {list(shape)}; expected {size} rows or more; "
                "the file mixes two models: download it again"
            )
        return shape[0] // size

    def num_blocks(self, stem: str) -> int:
        """How many numbers follow `stem` at the start of names; CheckpointError for none, or a gap between them."""
        pattern = re.compile(rf"{re.escape(stem)}\.([0-9]+)\.")
        found = {match[1] for name in self.checkpoint.tensors if (match := pattern.match(name))}
        blocks = {int(number) for number in found if len(number) <= MOST_DIGITS}
        if not blocks:
            raise CheckpointError(
                f"{self.checkpoint.file_of(stem)}: {self.title} without {stem}.0; expected at least that block; "
                "the file is incomplete: download it again"
            )
        if odd := sorted(found - set(map(str, blocks))):  # 007, or of thousands of digits
            raise CheckpointError(
                f"{self.checkpoint.file_of(stem)}: {self.title} with the block {stem}.{short(odd[0])}; expected them "
                "numbered from 0; the file is damaged: download it again"
            )
        absent = next(number for number in range(len(blocks) + 1) if number not in blocks)
        if absent < len(blocks):
            raise CheckpointError(
                f"{self.checkpoint.file_of(stem)}: block {absent} is missing ({stem}.{absent}), though there are "
                f"{len(blocks)} blocks up to {max(blocks)}; expected them numbered from 0; "
                "the file is incomplete: download it again"
            )
        return len(blocks)
