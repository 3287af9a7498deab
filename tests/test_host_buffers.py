"""Extents in host memory: exact bytes, pinning, the cap, and release whatever happens."""

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from lowvram_video.memory.stream.host_blocks import HostBlocks
from lowvram_video.memory.stream.layout import BlockLayout, LayoutError, Part, TensorPlace
from lowvram_video.memory.stream.pinned import PinnedBudget, default_pinned_cap
from lowvram_video.system.host_memory import total_ram_bytes
from torch import Tensor

MIB = 1 << 20
SIZES = [3 * MIB + 17, 5000, 2 * MIB, 1, 4 * MIB + 4096]


@dataclass(frozen=True)
class Info:
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


@dataclass
class Source:
    """Block i has two tensors, filled with 2 i and 2 i + 1."""

    sizes: list[int]
    before_read: Callable[[str], None] = lambda name: None
    shift: int = 0
    tensors: dict[str, Info] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, size in enumerate(self.sizes):
            for name, nbytes in (("a", size), ("b", 7)):
                self.tensors[f"blocks.{index}.{name}"] = Info(torch.uint8, (nbytes,), nbytes, Path("m.bin"), 0)

    def layouts(self) -> list[BlockLayout]:
        layouts = []
        for index, size in enumerate(self.sizes):
            second = -(-size // 256) * 256
            places = (TensorPlace("a", torch.uint8, (size,), 0, size), TensorPlace("b", torch.uint8, (7,), second, 7))
            layouts.append(BlockLayout(f"blocks.{index}", places, second + 256, second))
        return layouts

    def value(self, name: str) -> int:
        return (2 * int(name.split(".")[1]) + name.endswith("b") + self.shift) % 256

    def read_into(self, name: str, out: Tensor) -> None:
        self.before_read(name)
        assert out.numel() == self.tensors[name].nbytes
        out.fill_(self.value(name))


class FakeRegistrar:
    """Refuses from the n-th extent on; remembers what is pinned."""

    def __init__(self, refuse_from: int | None = None) -> None:
        self.refuse_from = refuse_from
        self.pinned: dict[int, int] = {}
        self.asked = 0

    def pin(self, extent: Tensor) -> bool:
        assert extent.data_ptr() % mmap.PAGESIZE == 0 and extent.numel() % mmap.PAGESIZE == 0
        self.asked += 1
        if self.refuse_from is not None and self.asked > self.refuse_from:
            return False
        self.pinned[extent.data_ptr()] = extent.numel()
        return True

    def unpin(self, extent: Tensor) -> None:
        assert self.pinned.pop(extent.data_ptr()) == extent.numel()


class Fence:
    def __init__(self) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def bytes_are_right(host: HostBlocks, source: Source) -> bool:
    return all(
        bool(
            (extent[place.offset : place.offset + place.nbytes] == source.value(f"{layout.prefix}.{place.name}")).all()
        )
        for layout, extent in zip(host.layouts, host.extents, strict=True)
        for place in layout.places
    )


@pytest.mark.parametrize("num_threads", [1, 4])
def test_bytes_are_exact_pinned_and_counted(num_threads: int) -> None:
    source, registrar = Source(SIZES), FakeRegistrar()
    budget = PinnedBudget(registrar, 1 << 30)
    host = HostBlocks(source, source.layouts(), budget, num_threads=num_threads)
    assert bytes_are_right(host, source)
    assert [extent.numel() for extent in host.extents] == [layout.nbytes for layout in host.layouts]
    exact = sum(layout.nbytes for layout in host.layouts)
    assert host.pinned_bytes == budget.pinned_bytes == sum(registrar.pinned.values()) == host.host_bytes
    print(f"pinned {host.pinned_bytes} bytes for {exact}: {host.pinned_bytes / exact:.4f}")
    assert exact <= host.pinned_bytes < exact + len(SIZES) * mmap.PAGESIZE
    host.prepare(range(len(SIZES)), Part.STREAM)
    assert all(host.available(index) for index in range(len(SIZES)))
    [(piece, at)] = host.pieces(2)
    assert at == 0 and piece.data_ptr() == host.extents[2].data_ptr() and piece.numel() == 2 * MIB
    out = torch.empty(256, dtype=torch.uint8)
    host.fetch(3, Part.OPTIONAL, out)
    assert bool((out[:7] == source.value("blocks.3.b")).all())
    host.release()
    host.release()
    assert registrar.pinned == {} and host.host_bytes == host.pinned_bytes == budget.pinned_bytes == 0


def test_dropping_the_blocks_unpins_them() -> None:
    source, registrar = Source(SIZES), FakeRegistrar()
    host = HostBlocks(source, source.layouts(), PinnedBudget(registrar, 1 << 30))
    assert registrar.pinned
    del host
    assert registrar.pinned == {}


def test_only_the_streamed_blocks_are_pinned_and_later_ones_on_demand() -> None:
    source, registrar = Source(SIZES), FakeRegistrar()
    host = HostBlocks(source, source.layouts(), PinnedBudget(registrar, 1 << 30), pin=[0, 2])
    assert len(registrar.pinned) == 2
    host.prepare([0, 2, 4], Part.ALL)
    assert len(registrar.pinned) == 3 and host._staging is None
    host.release()


@pytest.mark.parametrize("refuse_from", [0, 2, 4])
def test_a_refused_extent_stays_pageable_and_is_told_once(refuse_from: int, caplog: pytest.LogCaptureFixture) -> None:
    source, registrar = Source(SIZES), FakeRegistrar(refuse_from)
    budget = PinnedBudget(registrar, 1 << 30)
    host = HostBlocks(source, source.layouts(), budget, num_threads=2)
    assert bytes_are_right(host, source)
    assert len(registrar.pinned) == refuse_from and host.pinned_bytes == budget.pinned_bytes
    assert sum("the system refused" in record.message for record in caplog.records) == 1
    host.prepare(range(len(SIZES)), Part.ALL)  # no pinned staging to be had either: straight from the extents
    assert host._staging is None and host.pieces(4)[0][0].data_ptr() == host.extents[4].data_ptr()
    host.release()
    assert registrar.pinned == {}


def test_what_was_refused_is_pinned_once_there_is_room() -> None:
    source, registrar = Source([MIB] * 8), FakeRegistrar()
    budget = PinnedBudget(registrar, 2 * MIB)
    host = HostBlocks(source, source.layouts(), budget)
    host.prepare(range(8), Part.ALL)
    assert host.pinned_bytes <= 2 * MIB
    budget.cap_bytes = 1 << 30
    host.retry_pinning()
    host.prepare(range(8), Part.ALL)
    assert host._staging is None and len(registrar.pinned) == 8
    host.release()


def test_beyond_the_cap_blocks_pass_through_a_pinned_pair(caplog: pytest.LogCaptureFixture) -> None:
    sizes = [MIB] * 8
    source, registrar = Source(sizes), FakeRegistrar()
    cap = 6 * MIB
    budget = PinnedBudget(registrar, cap)
    host = HostBlocks(source, source.layouts(), budget)
    assert "the cap of" in caplog.text and host.pinned_bytes <= cap
    num_pinned = len(registrar.pinned)
    assert num_pinned == 3  # two more fit into what the cap leaves: the staging pair
    host.prepare(range(8), Part.ALL)
    assert len(registrar.pinned) == num_pinned + 2 and host.pinned_bytes == budget.pinned_bytes <= cap
    fences = []
    for _ in range(3):
        for index in range(8):
            [(piece, _)] = host.pieces(index)
            assert bool((piece[:MIB] == source.value(f"blocks.{index}.a")).all())
            assert piece.data_ptr() in registrar.pinned
            fences.append(Fence())
            host.sent(index, fences[-1])
    host.pause()
    # Before a staging buffer was written again, somebody waited for the copy out of it.
    staged = [fence for number, fence in enumerate(fences) if number % 8 >= num_pinned]
    assert all(fence.waited for fence in staged) and not any(fence.waited for fence in fences if fence not in staged)
    assert len(registrar.pinned) == num_pinned
    host.release()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk gone"), MemoryError])
def test_trouble_while_reading_releases_everything(error: type[BaseException] | BaseException) -> None:
    registrar = FakeRegistrar()

    def fail(name: str) -> None:
        if name == "blocks.3.b":
            raise error

    source = Source(SIZES, fail)
    budget = PinnedBudget(registrar, 1 << 30)
    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        HostBlocks(source, source.layouts(), budget, num_threads=2)
    assert registrar.pinned == {} and budget.pinned_bytes == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lowvram-")]


def test_check_gives_up_reading_soon() -> None:
    reads, registrar = [], FakeRegistrar()
    done = threading.Event()

    def slow(name: str) -> None:
        reads.append(name)
        done.wait(0.15)

    def check() -> None:
        raise KeyboardInterrupt

    source = Source([1000] * 50, slow)
    with pytest.raises(KeyboardInterrupt):
        HostBlocks(source, source.layouts(), PinnedBudget(registrar, 1 << 30), num_threads=2, check=check)
    assert len(reads) < 10 and registrar.pinned == {}


def test_refill_reads_another_model_into_the_same_memory() -> None:
    first, second = Source(SIZES), Source(SIZES, shift=100)
    registrar = FakeRegistrar()
    host = HostBlocks(first, first.layouts(), PinnedBudget(registrar, 1 << 30))
    before, addresses = dict(registrar.pinned), [extent.data_ptr() for extent in host.extents]
    host.refill(second)
    assert bytes_are_right(host, second)
    assert registrar.pinned == before and addresses == [extent.data_ptr() for extent in host.extents]
    with pytest.raises(LayoutError, match=r"blocks\.1\.a: expected torch.uint8 \(5000,\)"):
        host.refill(Source([SIZES[0], 6000, *SIZES[2:]]))
    host.release()


def test_memory_is_held_once_and_goes_back() -> None:
    sizes = [8 * MIB] * 8
    process = psutil.Process()
    source = Source(sizes)
    before = process.memory_info().rss
    host = HostBlocks(source, source.layouts(), num_threads=2)
    held = process.memory_info().rss - before
    host.release()
    after = process.memory_info().rss - before
    print(f"64 MiB of weights: {held / MIB:.1f} MiB more RSS, {after / MIB:.1f} MiB after release")
    assert held < 1.1 * sum(sizes) and after < 0.1 * sum(sizes)


def test_the_default_cap_is_a_share_of_ram() -> None:
    assert 0.3 * total_ram_bytes() < default_pinned_cap() < 0.9 * total_ram_bytes()
