"""The order of copies and compute, checked by simulating both streams under an adversarial scheduler."""

import gc
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.memory.plan.candidates import spread_residents
from lowvram_video.memory.stream.disk_blocks import DiskBlocks
from lowvram_video.memory.stream.host_blocks import HostBlocks
from lowvram_video.memory.stream.layout import LayoutError, Part, layout_block
from lowvram_video.memory.stream.ring import DeviceRing, ring_bytes
from lowvram_video.memory.stream.streamer import BlockStreamer, StreamerError
from lowvram_video.memory.stream.streams import BlockEvents, Pair, Streams
from torch import Tensor, nn

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Info:
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


class Source:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.values = tensors
        self.tensors = {
            name: Info(value.dtype, tuple(value.shape), value.nbytes, Path("model.bin"), 0)
            for name, value in tensors.items()
        }

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.values[name])


class Block(nn.Module):
    """A block of `size` bytes that every pass needs and 10 that can stay at home."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.extra = nn.Parameter(torch.empty(10, dtype=torch.uint8, device="meta"), requires_grad=False)


class StagedBlock(Block):
    """A block that computes with `weight`, then with `second` and `extra`, then with `third`."""

    stages = (("weight",), ("second", "extra"), ("third",))

    def __init__(self, size: int) -> None:
        super().__init__(size)
        for name, share in (("second", 2), ("third", 5)):
            tensor = torch.empty(size // share + 1, dtype=torch.uint8, device="meta")
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))


class Model:
    """Blocks of the given sizes, each filled with its own number, in RAM."""

    def __init__(self, sizes: Sequence[int], first_value: int = 1, kind: type[Block] = Block) -> None:
        self.blocks = [kind(size) for size in sizes]
        self.values = {block: first_value + index for index, block in enumerate(self.blocks)}
        tensors = {}
        for index, block in enumerate(self.blocks):
            for name, weight in block.named_parameters():
                tensors[f"blocks.{index}.{name}"] = torch.full(weight.shape, first_value + index, dtype=torch.uint8)
        self.source = Source(tensors)
        named = {f"blocks.{index}": block for index, block in enumerate(self.blocks)}
        stages = getattr(kind, "stages", ())
        self.layouts = [
            layout_block(self.source, name, block.state_dict(), {"extra"}, stages) for name, block in named.items()
        ]
        self.host = HostBlocks(self.source, self.layouts, num_threads=1)


class Event:
    """recorded: how often the host asked; done: how often the device got there."""

    def __init__(self) -> None:
        self.recorded = self.done = 0

    def synchronize(self) -> None:
        raise AssertionError("the host must not wait in a pass")


class SimulatedStreams(Streams):
    """Two queues that run only when the scheduler lets them, each in order, joined by events alone."""

    def __init__(self, prefer_copy: Callable[[], bool]) -> None:
        self.prefer_copy = prefer_copy
        self.copies: deque[tuple] = deque()
        self.compute: deque[tuple] = deque()
        self.num_events = self.num_copies = 0
        self.interrupt_in: int | None = None

    def events(self, place: int) -> BlockEvents:
        self.num_events += 1
        return BlockEvents(place, Event(), Event())

    def copy(self, pairs: Iterable[Pair], after: Sequence[BlockEvents], events: BlockEvents) -> None:
        self.num_copies += 1
        for other in after:
            self._tick()
            self.copies.append(("wait", other.free, other.free.recorded))
        for device_bytes, host_bytes in pairs:
            self._tick()
            self.copies.append(("run", lambda out=device_bytes, host=host_bytes: out.copy_(host)))
        self._tick()
        self._record(self.copies, events.ready)
        self._tick()

    def wait_ready(self, events: BlockEvents) -> None:
        self._tick()
        self.compute.append(("wait", events.ready, events.ready.recorded))
        self._tick()

    def record_free(self, events: BlockEvents) -> None:
        self._tick()
        self._record(self.compute, events.free)
        self._tick()

    def after_compute(self, events: BlockEvents) -> None:
        self._tick()
        self.copies.append(("wait", events.free, events.free.recorded))
        self._tick()

    def synchronize(self) -> None:
        self.run(until_idle=True)

    def use(self, check: Callable[[], None]) -> None:
        """A kernel: looks at its weights when it starts and when it ends."""
        self.compute.append(("run", check))
        self.compute.append(("run", check))
        self.run(until_idle=False)

    def run(self, until_idle: bool) -> None:
        """Let streams run: to the end, or as far as the scheduler feels like."""
        while True:
            order = [self.copies, self.compute] if self.prefer_copy() else [self.compute, self.copies]
            if not until_idle and self.prefer_copy():
                return
            if not any(self._step(lane) for lane in order):
                assert not until_idle or not (self.copies or self.compute), "the streams wait for each other forever"
                return

    def _record(self, lane: deque, event: Event) -> None:
        event.recorded += 1
        lane.append(("record", event, event.recorded))

    def _step(self, lane: deque) -> bool:
        if not lane:
            return False
        kind, *rest = lane[0]
        if kind == "wait" and rest[0].done < rest[1]:
            return False
        lane.popleft()
        if kind == "run":
            rest[0]()
        elif kind == "record":
            rest[0].done = rest[1]
        return True

    def _tick(self) -> None:
        """Ctrl-C may strike before and after every single operation."""
        if self.interrupt_in is not None:
            self.interrupt_in -= 1
            if self.interrupt_in < 0:
                self.interrupt_in = None
                raise KeyboardInterrupt


def check_bytes(model: Model, block: Block, name: str = "weight") -> Callable[[], None]:
    weight, value = getattr(block, name), model.values[block]

    def check() -> None:
        assert bool((weight == value).all()), f"block {value} computed with foreign bytes"

    return check


def schedulers(seed: int) -> Callable[[], bool]:
    """Copies as early as allowed, as late as allowed, or at random."""
    if seed == 0:
        return lambda: True
    if seed == 1:
        return lambda: False
    rng = random.Random(seed)
    return lambda: rng.random() < 0.5


class Unready:
    """A source that now and then has nothing to send yet, as a disk would."""

    def __init__(self, host: HostBlocks, rng: random.Random) -> None:
        self._host, self._rng = host, rng

    def __getattr__(self, name: str) -> object:
        return getattr(self._host, name)

    def available(self, index: int, stage: int = 0) -> bool:
        return self._rng.random() < 0.7


@dataclass(frozen=True)
class Pass:
    model: int
    stop_at: int | None  # the block at which the pass ends early …
    how: str  # … by an exception, closing, leaking the iterator, or an interrupt after so many operations
    blocks: tuple[int, ...] | None  # only some of the blocks


SIZES = st.lists(st.integers(1, 2000), min_size=1, max_size=9)
PASSES = st.lists(
    st.builds(
        Pass,
        st.integers(0, 1),
        st.none() | st.integers(0, 8),
        st.sampled_from(["raise", "close", "leak", "interrupt"]),
        st.none() | st.sets(st.integers(0, 8)).map(lambda chosen: tuple(sorted(chosen))),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=400, deadline=None)
@given(
    st.tuples(SIZES, SIZES),
    st.integers(1, 4),
    st.integers(0, 9),
    st.sampled_from([Part.ALL, Part.STREAM]),
    PASSES,
    st.integers(0, 10_000),
)
def test_no_schedule_of_the_streams_breaks_a_pass(
    sizes: tuple[list[int], list[int]],
    num_slots: int,
    num_resident: int,
    part: Part,
    passes: list[Pass],
    seed: int,
) -> None:
    models = [Model(sizes[0]), Model(sizes[1], first_value=100)]
    streams = SimulatedStreams(schedulers(seed))
    nbytes = max(ring_bytes([layout.part_bytes(part) for layout in model.layouts], num_slots) for model in models)
    ring = DeviceRing(nbytes, CPU, streams)
    streamers = []
    for model in models:
        resident = spread_residents(len(model.blocks), min(num_resident, len(model.blocks)))
        source = Unready(model.host, random.Random(seed)) if seed % 3 == 0 else model.host
        streamers.append(BlockStreamer(model.blocks, source, CPU, ring=ring, resident=resident, part=part))
        streamers[-1].load()
    num_events = streams.num_events
    weights = [[(id(b.weight), b.weight.data_ptr()) for b in model.blocks] for model in models]
    leaked = []
    for one in passes:
        model, stream = models[one.model], streamers[one.model]
        blocks = [b for i, b in enumerate(model.blocks) if one.blocks is None or i in one.blocks]
        iterator = stream(blocks)
        if one.how == "interrupt" and one.stop_at is not None:
            streams.interrupt_in = 5 * one.stop_at
        seen = []
        try:
            for number, block in enumerate(iterator):
                streams.use(check_bytes(model, block))
                seen.append(block)
                if number == one.stop_at and one.how == "raise":
                    raise RuntimeError("out of memory, say")
                if number == one.stop_at and one.how in ("close", "leak"):
                    break
        except (KeyboardInterrupt, RuntimeError):
            pass
        if one.how == "leak":
            leaked.append(iterator)
        elif one.how == "close":
            iterator.close()
        streams.interrupt_in = None
        if one.stop_at is None:
            assert seen == blocks
    # A clean pass of each at the end, then whatever is still queued.
    for model, stream in zip(models, streamers, strict=True):
        for block in stream(model.blocks):
            streams.use(check_bytes(model, block))
    streams.synchronize()
    assert streams.num_events == num_events
    assert weights == [[(id(b.weight), b.weight.data_ptr()) for b in model.blocks] for model in models]
    for iterator in leaked:
        iterator.close()
    for model, stream in zip(models, streamers, strict=True):
        stream.unload()
        assert all(block.weight.is_meta for block in model.blocks)
        model.host.release()
    assert ring._flat is None


@settings(max_examples=200, deadline=None)
@given(
    SIZES,
    st.integers(1, 4),
    st.integers(0, 9),
    st.sampled_from([Part.ALL, Part.STREAM]),
    st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=40),
    st.integers(0, 10_000),
)
def test_no_order_of_stages_breaks_a_pass(
    sizes: list[int], num_slots: int, num_resident: int, part: Part, orders: list[list[int]], seed: int
) -> None:
    """Blocks that compute in stages: in order, in any other, only some of them, again and again."""
    model, streams = Model(sizes, kind=StagedBlock), SimulatedStreams(schedulers(seed))
    spans = [layout.spans(part, in_stages=True) for layout in model.layouts]
    nbytes = ring_bytes([stop - start for each in spans for start, stop in each], num_slots)
    resident = spread_residents(len(model.blocks), min(num_resident, len(model.blocks)))
    source = Unready(model.host, random.Random(seed)) if seed % 3 == 0 else model.host
    ring = DeviceRing(nbytes, CPU, streams)
    stream = BlockStreamer(model.blocks, source, CPU, ring=ring, resident=resident, part=part, in_stages=True)
    stream.load()
    rng = random.Random(seed)
    for _ in range(3):
        for block in stream(model.blocks):
            streams.use(check_bytes(model, block))
            for stage in rng.choice(orders):
                stream.arrive(block, stage)
                names = [name for name in StagedBlock.stages[stage] if not getattr(block, name).is_meta]
                for name in names:
                    streams.use(check_bytes(model, block, name))
    streams.synchronize()
    stream.unload()
    assert all(block.third.is_meta for block in model.blocks)


def test_stages_stream_in_the_order_of_a_pass_and_each_once() -> None:
    model, streams = Model([300] * 4, kind=StagedBlock), SimulatedStreams(lambda: False)
    ring = DeviceRing(2 * 512, CPU, streams)
    stream = BlockStreamer(model.blocks, model.host, CPU, ring=ring, part=Part.STREAM, in_stages=True)
    stream.load()
    copied = []
    for block in stream(model.blocks):
        for stage, (name, *_) in enumerate(StagedBlock.stages):
            stream.arrive(block, stage)
            copied.append(streams.num_copies)
            streams.use(check_bytes(model, block, name))
    # while a stage computes, the next is on its way (but for the very first), at the end the next pass's first;
    # as many are ahead as the ring has room for, and none is copied twice
    assert copied[0] == 1 and all(place + 2 <= copies <= place + 3 for place, copies in enumerate(copied[1:], 1))
    with pytest.raises(StreamerError, match="is not in use"):
        stream.arrive(model.blocks[0], 1)


def test_prefetch_runs_past_the_end_of_the_pass() -> None:
    model, streams = Model([300] * 6), SimulatedStreams(lambda: False)
    ring = DeviceRing(2 * 512, CPU, streams)
    stream = BlockStreamer(model.blocks, model.host, CPU, ring=ring, part=Part.STREAM)
    stream.load()
    copied = []
    for _ in range(2):
        for group in (model.blocks[:2], model.blocks[2:]):
            for block in stream(group):
                copied.append(streams.num_copies)
                streams.use(check_bytes(model, block))
    streams.synchronize()
    # While block n computes, n + 1 is on its way (but for the very first), at the end of a pass the next pass's first.
    assert copied == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_what_the_ring_still_holds_is_not_copied_again() -> None:
    model, streams = Model([300] * 4), SimulatedStreams(lambda: True)
    ring = DeviceRing(1 << 20, CPU, streams)
    stream = BlockStreamer(model.blocks, model.host, CPU, ring=ring, part=Part.STREAM)
    stream.load()
    for _ in range(3):
        for block in stream(model.blocks):
            streams.use(check_bytes(model, block))
    streams.synchronize()
    assert streams.num_copies == 4


def test_optional_part_streams_through_the_same_ring() -> None:
    model = Model([300, 700, 500])
    ring = DeviceRing(2 * 1024, CPU)
    streamers = {part: BlockStreamer(model.blocks, model.host, CPU, ring=ring, part=part)
                 for part in (Part.OPTIONAL, Part.STREAM)}  # fmt: skip
    for stream in streamers.values():
        stream.load()
    for _ in range(2):
        for block in streamers[Part.OPTIONAL](model.blocks):
            assert bool((block.extra == model.values[block]).all())
        for block in streamers[Part.STREAM](model.blocks):
            check_bytes(model, block)()
    streamers[Part.OPTIONAL].unload()
    assert all(block.extra.is_meta and not block.weight.is_meta for block in model.blocks)


def test_on_a_cpu_blocks_are_used_where_they_are() -> None:
    model = Model([300, 700])
    stream = BlockStreamer(model.blocks, model.host, CPU)
    stream.load()
    seen = list(stream(model.blocks))
    assert seen == model.blocks
    for block, extent in zip(model.blocks, model.host.extents, strict=True):
        assert block.weight.data_ptr() == extent.data_ptr()
        check_bytes(model, block)()


def test_between_blocks_can_end_a_pass() -> None:
    model = Model([300] * 4)
    left = [2]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    stream = BlockStreamer(model.blocks, model.host, CPU, ring=DeviceRing(1024, CPU), between_blocks=check)
    stream.load()
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(stream(model.blocks))
    stream.between_blocks = None
    for block in stream(model.blocks):
        check_bytes(model, block)()


def test_misuse_is_refused_in_words() -> None:
    model = Model([300] * 2)
    with pytest.raises(ValueError, match="2 of 2 blocks are streamed: give a ring"):
        BlockStreamer(model.blocks, model.host, torch.device("meta"))
    with pytest.raises(LayoutError, match="describes 2 blocks, the model has 1"):
        BlockStreamer(model.blocks[:1], model.host, CPU)
    stream = BlockStreamer(model.blocks, model.host, CPU, ring=DeviceRing(4096, CPU))
    with pytest.raises(StreamerError, match=r"call load\(\) first"):
        next(stream(model.blocks))
    stream.load()
    with pytest.raises(ValueError, match="none of the streamer's blocks"):
        next(stream([nn.Linear(1, 1)]))
    old = stream(model.blocks)
    next(old)
    list(stream(model.blocks))
    with pytest.raises(StreamerError, match="another pass has begun"):
        next(old)
    stream.unload()
    stream.unload()
    stream.load()
    for block in stream(model.blocks):
        check_bytes(model, block)()


class FileSource:
    """Random tensors in a real file, not aligned to anything, in an order of its own."""

    def __init__(self, path: Path, sizes: dict[str, int]) -> None:
        self.path, self.tensors = path, {}
        generator = torch.Generator().manual_seed(7)
        with path.open("wb") as file:
            for name, size in sizes.items():
                file.write(b"x" * random.Random(name).randrange(1, 5000))
                self.tensors[name] = Info(torch.uint8, (size,), size, path, file.tell())
                file.write(torch.randint(0, 255, (size,), dtype=torch.uint8, generator=generator).numpy().tobytes())

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.read(name))

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(info.offset)
            return torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch.uint8)


MIB = 1 << 20
DISK_SIZES = [MIB + 1, 2 * MIB, 3 * MIB + 4097, MIB - 1, 5 * MIB]


def disk_model(tmp_path: Path, kind: type[Block] = Block) -> tuple[list[Block], FileSource, DiskBlocks]:
    blocks = [kind(size) for size in DISK_SIZES]
    sizes = {f"blocks.{i}.{name}": w.numel() for i, block in enumerate(blocks) for name, w in block.named_parameters()}
    source = FileSource(tmp_path / "model.bin", sizes)
    stages = getattr(kind, "stages", ())
    layouts = [
        layout_block(source, f"blocks.{i}", block.state_dict(), {"extra"}, stages) for i, block in enumerate(blocks)
    ]
    return blocks, source, DiskBlocks(source, layouts, num_buffers=3, num_threads=3)


def io_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lowvram-")]


def test_residents_are_one_allocation(tmp_path: Path) -> None:
    """An allocator of a GPU rounds each one up by as much as 2 MiB."""
    blocks, _, disk = disk_model(tmp_path)
    ring = DeviceRing(ring_bytes([layout.nbytes for layout in disk.layouts], 2), CPU)
    stream = BlockStreamer(blocks, disk, CPU, ring=ring, resident=(0, 2, 4))
    stream.load()
    held = {next(blocks[index].parameters()).untyped_storage().data_ptr() for index in (0, 2, 4)}
    stream.unload()
    assert len(held) == 1


@pytest.mark.parametrize("resident", [(), (1,), (0, 4)])
@pytest.mark.parametrize("part", [Part.ALL, Part.STREAM])
def test_disk_blocks_bring_the_files_bytes_in_every_pass(tmp_path: Path, resident: tuple[int, ...], part: Part) -> None:
    blocks, source, disk = disk_model(tmp_path)
    ring = DeviceRing(ring_bytes([layout.part_bytes(part) for layout in disk.layouts], 2), CPU)
    stream = BlockStreamer(blocks, disk, CPU, ring=ring, resident=resident, part=part)
    stream.load()

    def run(stop_at: int | None = None) -> None:
        for index, block in enumerate(stream(blocks)):
            for name, weight in block.named_parameters():
                if not weight.is_meta:
                    assert torch.equal(weight, source.read(f"blocks.{index}.{name}")), f"block {index}"
            if index == stop_at:
                raise KeyboardInterrupt

    for _ in range(3):
        run()
    for stop_at in (0, 3, 1):
        with pytest.raises(KeyboardInterrupt):
            run(stop_at)
        run()
    held = disk.host_bytes
    direct = next(iter(disk._reader._files.values())).direct
    print(f"disk: {held / MIB:.1f} MiB held of {sum(DISK_SIZES) / MIB:.1f}, direct reads {direct}")
    assert held < 3 * (max(DISK_SIZES) + 16384) + 2 * MIB
    stream.unload()
    assert io_threads() == [] and disk.host_bytes < 2 * MIB
    disk.release()
    disk.release()


@pytest.mark.parametrize("part", [Part.ALL, Part.STREAM])
def test_disk_blocks_come_in_stages(tmp_path: Path, part: Part) -> None:
    blocks, source, disk = disk_model(tmp_path, StagedBlock)
    sizes = [stop - start for layout in disk.layouts for start, stop in layout.spans(part, in_stages=True)]
    stream = BlockStreamer(blocks, disk, CPU, ring=DeviceRing(2 * max(sizes) + 512, CPU), part=part, in_stages=True)
    stream.load()
    for _ in range(2):
        for index, block in enumerate(stream(blocks)):
            for stage, names in enumerate(StagedBlock.stages):
                stream.arrive(block, stage)
                for name in names:
                    weight = getattr(block, name)
                    assert weight.is_meta or torch.equal(weight, source.read(f"blocks.{index}.{name}"))
    stream.unload()
    disk.release()


def test_disk_errors_name_the_file_and_pass(tmp_path: Path) -> None:
    blocks, source, disk = disk_model(tmp_path)
    ring = DeviceRing(ring_bytes([layout.nbytes for layout in disk.layouts], 1), CPU)
    stream = BlockStreamer(blocks, disk, CPU, ring=ring)
    stream.load()
    whole = source.path.read_bytes()
    with source.path.open("r+b") as file:
        file.truncate(source.tensors["blocks.2.weight"].offset + 5)
    seen = []
    with pytest.raises(OSError, match=r"it was cut off or replaced: download it again.*model\.bin"):
        seen.extend(stream(blocks))
    assert len(seen) == 2
    source.path.write_bytes(whole)  # the same file again, repaired
    for index, block in enumerate(stream(blocks)):
        assert torch.equal(block.weight, source.read(f"blocks.{index}.weight"))
    stream.unload()
    assert io_threads() == []


def test_forgotten_disk_blocks_stop_their_threads(tmp_path: Path) -> None:
    blocks, _, disk = disk_model(tmp_path)
    stream = BlockStreamer(blocks, disk, CPU, ring=DeviceRing(12 * MIB, CPU))
    stream.load()
    next(stream(blocks))
    assert io_threads()
    del stream, disk
    gc.collect()
    assert io_threads() == []
