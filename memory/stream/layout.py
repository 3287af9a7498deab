"""Where each tensor of a block lies in one flat extent of bytes, and binding a module to such an extent."""

import enum
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # what cuBLAS, Triton and copy engines like best; also a multiple of every item size
SMALL_BYTES = 1 << 20  # below this a tensor is a bias, a norm or a modulation: cheap to keep in RAM


class LayoutError(ValueError):
    """A checkpoint's tensors and a block's parameters do not fit together."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


class TensorInfo(Protocol):
    """What is known of a stored tensor without reading it."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def file(self) -> Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def stamp(self) -> tuple[int, int] | None: ...  # of the file, when its header was read


class TensorSource(Protocol):
    """A checkpoint: stored tensors by name, readable from several threads at once."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_into(self, name: str, out: Tensor) -> None:
        """Read the tensor's stored bytes into `out`, a 1-D uint8 CPU tensor of exactly its size."""


class Part(enum.Enum):
    """Which of a block's bytes travel: all, those that every pass needs, or only the optional rest."""

    ALL = "all"
    STREAM = "stream"
    OPTIONAL = "optional"


@dataclass(frozen=True)
class TensorPlace:
    """One tensor's place in its block's extent; `name` is local to the block, offsets are in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class BlockLayout:
    """All tensors of one block; those before `stream_bytes` are needed in every pass.

    `stages` are the first byte and the end of what the block computes with first, then, and so on, where it can be
    streamed in such stages: together they are all before `stream_bytes`.
    """

    prefix: str  # full name of a tensor: f"{prefix}.{place.name}"
    places: tuple[TensorPlace, ...]
    nbytes: int
    stream_bytes: int
    stages: tuple[tuple[int, int], ...] = ()

    def span(self, part: Part) -> tuple[int, int]:
        """First byte and end of a part; both are multiples of 256."""
        if part is Part.STREAM:
            return 0, self.stream_bytes
        return (self.stream_bytes if part is Part.OPTIONAL else 0), self.nbytes

    def part_bytes(self, part: Part) -> int:
        """Size of a part in bytes."""
        start, stop = self.span(part)
        return stop - start

    def part_places(self, part: Part) -> tuple[TensorPlace, ...]:
        """The tensors of a part, offsets still counted from the block's first byte."""
        return self.places_in(*self.span(part))

    def places_in(self, start: int, stop: int) -> tuple[TensorPlace, ...]:
        """The tensors that begin in these bytes."""
        return tuple(place for place in self.places if start <= place.offset < stop)

    def spans(self, part: Part, in_stages: bool) -> tuple[tuple[int, int], ...]:
        """First byte and end of what is streamed of a part at a time: all of it, or each of its stages.

        What is optional comes with the stage before it.
        """
        if not in_stages or not self.stages or part is Part.OPTIONAL:
            return (self.span(part),)
        end = self.span(part)[1]
        return tuple((start, end if stop == self.stream_bytes else stop) for start, stop in self.stages)


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Round up to a multiple of `alignment` bytes."""
    return -(-nbytes // alignment) * alignment


def layout_block(
    source: TensorSource,
    prefix: str,
    names: Iterable[str],
    optional_last: Collection[str] = (),
    stages: Sequence[tuple[str, ...]] = (),
) -> BlockLayout:
    """Lay the tensors `<prefix>.<name>` out in one extent, 256-byte aligned.

    Large tensors come first, in file order, so that they can be read in long runs; small ones follow
    together. The same again, at the end, for the names in `optional_last`: they can be left at home.
    `stages` are how the names begin that the block computes with first, then, and so on: each stage lies together, the
    one that has optional tensors last.
    Raises LayoutError when the checkpoint lacks a tensor or its sizes contradict each other.
    """
    infos = {name: _info(source, f"{prefix}.{name}") for name in names}
    stage = {name: _stage_of(name, stages) for name in infos if name not in optional_last}
    last = {_stage_of(name, stages, optional=True) for name in infos if name in optional_last}
    rank = {number: number + len(stages) * (number in last) for number in range(max(1, len(stages)))}

    def order(name: str) -> tuple[int, bool, str, int]:
        info = infos[name]
        position = 2 * len(stages) + 1 if name in optional_last else rank[stage[name]]
        return position, info.nbytes < SMALL_BYTES, str(info.file), info.offset

    places: list[TensorPlace] = []
    spans: dict[int, tuple[int, int]] = {}
    end = stream_bytes = 0
    for name in sorted(infos, key=order):
        info = infos[name]
        places.append(TensorPlace(name, info.dtype, tuple(info.shape), end, info.nbytes))
        # Even an empty tensor takes a place of its own, so that offsets tell the parts apart.
        end += align(max(info.nbytes, 1))
        if name not in optional_last:
            stream_bytes = end
            spans[stage[name]] = spans.get(stage[name], (places[-1].offset, 0))[0], end
    separable = len(spans) == len(stages) > 1 and len(last - {-1}) <= 1
    in_stages = tuple(spans[number] for number in range(len(stages))) if separable else ()
    return BlockLayout(prefix, tuple(places), end, stream_bytes, in_stages)


def in_one_piece(infos: Mapping[str, TensorInfo], pieces: Iterable[Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors on a device in one allocation there: its allocator rounds each one up.

    Their bytes come in host memory, in order, in `pieces` [n] uint8, none of which is of two tensors.
    """
    sizes = [align(info.nbytes) for info in infos.values()]
    places = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
    coming = iter(pieces)
    for info, place in zip(infos.values(), places, strict=True):
        done = 0
        while done < info.nbytes:
            piece = next(coming)
            place[done : done + piece.numel()].copy_(piece)
            done += piece.numel()
            del piece  # before the next one is waited for
    placed = zip(infos.items(), places, strict=True)
    return {name: place[: info.nbytes].view(info.dtype).view(info.shape) for (name, info), place in placed}


def _stage_of(name: str, stages: Sequence[tuple[str, ...]], optional: bool = False) -> int:
    """The stage that a tensor belongs to; optional ones may belong to none: -1."""
    if not stages:
        return 0
    found = [number for number, beginnings in enumerate(stages) if name.startswith(beginnings)]
    if not found and optional:
        return -1
    if len(found) != 1:
        raise LayoutError(f"the tensor {name!r} belongs to {len(found)} stages of its block; expected one")
    return found[0]


def bind(block: nn.Module, layout: BlockLayout, flat: Tensor, part: Part = Part.ALL) -> None:
    """Make the block's parameters and buffers views of `flat` (uint8, the bytes of `part`).

    Called once per load: from then on new bytes arrive under the same views. Raises LayoutError when the
    block has no such parameter, or one of the same dtype but another shape.
    """
    bind_span(block, layout, flat, *layout.span(part))


def bind_span(block: nn.Module, layout: BlockLayout, flat: Tensor, start: int, stop: int) -> None:
    """The same for the tensors that lie in some bytes of the block, which are `flat`."""
    if flat.dtype != torch.uint8 or flat.ndim != 1 or flat.numel() < stop - start:
        raise LayoutError(
            f"{layout.prefix} needs a flat uint8 tensor of {stop - start} bytes, got {flat.dtype} {tuple(flat.shape)}"
        )
    for place in layout.places_in(start, stop):
        _assign(block, layout, place, view_of(place, flat, start))


def view_of(place: TensorPlace, flat: Tensor, start: int = 0) -> Tensor:
    """A tensor of a block whose bytes from `start` on are `flat`."""
    at = place.offset - start
    return flat[at : at + place.nbytes].view(place.dtype).view(place.shape)


def unbind(block: nn.Module, layout: BlockLayout, part: Part = Part.ALL) -> None:
    """Put the block's tensors back on the meta device, so that they hold no memory."""
    for place in layout.part_places(part):
        _assign(block, layout, place, torch.empty(place.shape, dtype=place.dtype, device="meta"))


def _assign(block: nn.Module, layout: BlockLayout, place: TensorPlace, tensor: Tensor) -> None:
    path, _, leaf = place.name.rpartition(".")
    try:
        module = block.get_submodule(path)
    except AttributeError as error:
        raise LayoutError(f"{layout.prefix} has no module {path!r} for the tensor {place.name!r}") from error
    known = module._parameters.get(leaf, module._buffers.get(leaf))
    if known is not None and known.dtype == place.dtype and known.shape != place.shape:
        raise LayoutError(
            f"{layout.prefix}.{place.name}: the file has shape {place.shape}, the model expects "
            f"{tuple(known.shape)}; the file is of another model size or variant"
        )
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        raise LayoutError(f"{layout.prefix} has no parameter or buffer named {place.name!r}")


def _info(source: TensorSource, name: str) -> TensorInfo:
    info = source.tensors.get(name)
    if info is None:
        raise LayoutError(f"the checkpoint lacks the tensor {name!r}; it is incomplete or of another model")
    expected = math.prod(info.shape) * info.dtype.itemsize
    if info.nbytes != expected:
        raise LayoutError(
            f"{name}: {tuple(info.shape)} of {info.dtype} takes {expected} bytes, the file says {info.nbytes}"
        )
    return info
