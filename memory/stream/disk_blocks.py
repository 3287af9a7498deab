"""A model's blocks on disk: for RAM smaller than the model, read afresh in every pass."""

import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...system.direct_reads import PAGE, RawFile
from ...system.host_memory import allocate_extent
from .layout import SMALL_BYTES, BlockLayout, Part, TensorPlace, TensorSource, align
from .pinned import PinnedBudget
from .staging import Fence, Job, Key, Staging

logger = logging.getLogger(__name__)

_MAX_GAP = 1 << 20  # bytes of other tensors worth reading along to keep a run in one piece
_CHUNK = 16 << 20  # bytes that one thread reads at a time


@dataclass(frozen=True)
class _Run:
    """Whole pages of a file that land together in a staging buffer at byte `at`."""

    file: Path
    offset: int
    nbytes: int  # a multiple of the page size
    needed: int  # up to here the file must reach
    at: int


@dataclass(frozen=True)
class _ReadPlan:
    """How one part of one block comes from the disk."""

    runs: tuple[_Run, ...]
    small: tuple[tuple[str, int], ...]  # names of the tensors kept in RAM, and their bytes in the buffer
    pieces: tuple[tuple[int, int, int], ...]  # (byte in the buffer, byte in the part, length)
    nbytes: int


class DiskBlocks:
    """Blocks read ahead from their file into 3 or 4 pinned buffers, in pass order, around and around.

    The same to a streamer as HostBlocks, but it holds only the buffers and the small tensors (below 1 MiB)
    in RAM. Reading runs on threads of its own and past the page cache where the system allows; a read
    error is raised where the block is needed, as WeightReadError naming the file.
    """

    extents: None = None  # there is no copy of the blocks in RAM to compute from

    def __init__(
        self,
        source: TensorSource,
        layouts: Sequence[BlockLayout],
        budget: PinnedBudget | None = None,
        num_buffers: int = 4,
        num_threads: int = 8,
    ) -> None:
        self.layouts = tuple(layouts)
        self._budget = budget
        self._num_buffers = num_buffers
        self._num_threads = num_threads
        self._reader = _Reader(source, self.layouts)
        self._staging: Staging | None = None
        self._plans: dict[Key, _ReadPlan] = {}

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned memory held now."""
        return self._staging.pinned_bytes if self._staging is not None else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held now, pinned or not."""
        staging = self._staging.host_bytes if self._staging is not None else 0
        return staging + self._reader.host_bytes

    def prepare(self, order: Sequence[int], part: Part, in_stages: bool = False) -> None:
        """Blocks `order` will be copied to the device over and over, this part of each: start reading.

        They come whole or stage by stage.
        """
        self.pause()
        self._plans = {
            (index, stage): self._reader.plan(index, start, stop)
            for index in order
            for stage, (start, stop) in enumerate(self.layouts[index].spans(part, in_stages))
        }
        if order:
            nbytes = max(plan.nbytes for plan in self._plans.values())
            # The threads know the reader and the plans but not this object, so dropping it ends them.
            fill = partial(_fill, self._reader, self._plans)
            self._staging = Staging(list(self._plans), nbytes, fill, self._budget, self._num_buffers, self._num_threads)
            if self._budget is not None and self._staging.refusal is not None:
                logger.warning(
                    "weights from disk pass through pageable memory, which is slower: %s", self._staging.refusal
                )
            self._staging.start()

    def available(self, index: int, stage: int = 0) -> bool:
        """Whether `pieces` would return at once."""
        return self._staging is not None and self._staging.available((index, stage))

    def pieces(self, index: int, stage: int = 0) -> list[tuple[Tensor, int]]:
        """The bytes of a block's stage as (host bytes, offset in the stage) pairs; waits for the disk."""
        assert self._staging is not None, "prepare() comes first"
        return _cut(self._staging.take((index, stage)), self._plans[index, stage])

    def sent(self, index: int, fence: Fence) -> None:
        """The copies of `pieces(index)` have been issued; `fence` tells when they are done."""
        if self._staging is not None:
            self._staging.sent(fence)

    def fetch(self, index: int, part: Part, out: Tensor) -> None:
        """Read a part of a block into `out` and wait for it; for what stays on the device."""
        plan = self._reader.plan(index, *self.layouts[index].span(part))
        buffer = allocate_extent(plan.nbytes)
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="lowvram-read") as threads:
            for job in [threads.submit(job) for job in self._reader.jobs(plan, buffer)]:
                job.result()
        for host_bytes, at in _cut(buffer, plan):
            out[at : at + host_bytes.numel()].copy_(host_bytes)

    def pause(self) -> None:
        """Stop the threads and free the buffers until the next `prepare`."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.close()

    def release(self) -> None:
        """Free everything and close the files; calling it again does nothing. Unload the streamer first."""
        self.pause()
        self._reader.close()

    def __del__(self) -> None:
        if hasattr(self, "_staging") and not sys.is_finalizing():
            self.release()


class _Reader:
    """The open files, the small tensors, and how to read a block."""

    def __init__(self, source: TensorSource, layouts: Sequence[BlockLayout]) -> None:
        self._source = source
        self._layouts = layouts
        self._files: dict[Path, RawFile] = {}
        self._small: dict[str, Tensor] = {}
        for layout in layouts:
            for place in layout.places:
                if place.nbytes < SMALL_BYTES:
                    name = f"{layout.prefix}.{place.name}"
                    self._small[name] = torch.empty(place.nbytes, dtype=torch.uint8)
                    source.read_into(name, self._small[name])

    @property
    def host_bytes(self) -> int:
        return sum(tensor.numel() for tensor in self._small.values())

    def plan(self, index: int, start: int, stop: int) -> _ReadPlan:
        layout = self._layouts[index]
        places = layout.places_in(start, stop)
        small = [place for place in places if place.nbytes < SMALL_BYTES]
        large = [place for place in places if place.nbytes >= SMALL_BYTES]
        runs, found = _find_runs(self._source, layout.prefix, large)
        end = runs[-1].at + runs[-1].nbytes if runs else 0
        pieces = [(at, place.offset - start, place.nbytes) for place, at in found]
        copies: list[tuple[str, int]] = []
        for group in _neighbours(small):
            # They lie side by side in the layout, so one copy brings them all, gaps included.
            first, last = group[0].offset, group[-1].offset + group[-1].nbytes
            copies += [(f"{layout.prefix}.{place.name}", end + place.offset - first) for place in group]
            pieces.append((end, first - start, last - first))
            end += last - first
        return _ReadPlan(tuple(runs), tuple(copies), tuple(_merge(pieces)), end)

    def jobs(self, plan: _ReadPlan, buffer: Tensor) -> list[Job]:
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer protocol
        jobs: list[Job] = []
        for run in plan.runs:
            file = self._file(run.file)
            for begin in range(0, run.nbytes, _CHUNK):
                end = min(begin + _CHUNK, run.nbytes)
                needed = min(end, run.needed) - begin
                jobs.append(partial(file.read, view[run.at + begin : run.at + end], run.offset + begin, needed))
        jobs.append(partial(self._copy_small, plan, buffer))
        return jobs

    def close(self) -> None:
        self._small.clear()
        while self._files:
            self._files.popitem()[1].close()

    def _copy_small(self, plan: _ReadPlan, buffer: Tensor) -> None:
        for name, at in plan.small:
            small = self._small[name]
            buffer[at : at + small.numel()].copy_(small)

    def _file(self, path: Path) -> RawFile:
        if path not in self._files:
            self._files[path] = RawFile(path)
        return self._files[path]


def _fill(reader: _Reader, plans: dict[Key, _ReadPlan], key: Key, buffer: Tensor) -> list[Job]:
    return reader.jobs(plans[key], buffer)


def _neighbours(places: Sequence[TensorPlace]) -> Iterator[list[TensorPlace]]:
    """Runs of tensors between which nothing but their alignment lies."""
    group: list[TensorPlace] = []
    for place in places:
        if group and place.offset != group[-1].offset + align(max(group[-1].nbytes, 1)):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _find_runs(
    source: TensorSource, prefix: str, places: Sequence[TensorPlace]
) -> tuple[list[_Run], list[tuple[TensorPlace, int]]]:
    """Page-aligned runs that cover the tensors, and where each tensor then lies in the buffer."""
    infos = {place.name: source.tensors[f"{prefix}.{place.name}"] for place in places}
    runs: list[_Run] = []
    found: list[tuple[TensorPlace, int]] = []
    for place in sorted(places, key=lambda one: (str(infos[one.name].file), infos[one.name].offset)):
        info = infos[place.name]
        stop = info.offset + info.nbytes
        last = runs.pop() if runs else None
        if last is not None and last.file == info.file and info.offset - last.offset - last.needed <= _MAX_GAP:
            needed = max(last.needed, stop - last.offset)
            run = _Run(last.file, last.offset, align(needed, PAGE), needed, last.at)
        else:
            if last is not None:
                runs.append(last)
            offset = info.offset // PAGE * PAGE
            at = last.at + last.nbytes if last is not None else 0
            run = _Run(info.file, offset, align(stop - offset, PAGE), stop - offset, at)
        runs.append(run)
        found.append((place, run.at + info.offset - run.offset))
    return runs, found


def _merge(pieces: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join pieces that are neighbours at both ends: fewer, longer copies."""
    merged: list[tuple[int, int, int]] = []
    for source, target, nbytes in sorted(pieces, key=lambda piece: piece[1]):
        if merged:
            before = merged[-1]
            if before[0] + before[2] == source and before[1] + before[2] == target:
                merged[-1] = before[0], before[1], before[2] + nbytes
                continue
        merged.append((source, target, nbytes))
    return merged


def _cut(buffer: Tensor, plan: _ReadPlan) -> list[tuple[Tensor, int]]:
    return [(buffer[at : at + nbytes], target) for at, target, nbytes in plan.pieces]
