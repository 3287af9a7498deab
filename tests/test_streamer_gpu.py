"""Streaming on a real device: the same bits as resident, without host synchronisation or allocations."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lowvram_video.memory.plan.candidates import spread_residents
from lowvram_video.memory.stream.disk_blocks import DiskBlocks
from lowvram_video.memory.stream.host_blocks import HostBlocks
from lowvram_video.memory.stream.layout import layout_block
from lowvram_video.memory.stream.pinned import CudaRegistrar, PinnedBudget
from lowvram_video.memory.stream.ring import DeviceRing, ring_bytes
from lowvram_video.memory.stream.streamer import BlockStreamer
from lowvram_video.memory.stream.streams import Span, TimedStreams
from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH, TOKENS = 1024, 4096
HIDDEN = [4096, 1024, 8192, 2048, 512, 8192, 3072]
MIB = 1 << 20
MODES = ["pinned", "staged", "pageable", "disk"]


@dataclass(frozen=True)
class Info:
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


class FileSource:
    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.path, self.tensors = path, {}
        with path.open("wb") as file:
            file.write(b"header!")
            for name, value in tensors.items():
                info = Info(value.dtype, tuple(value.shape), value.nbytes, path, file.tell())
                self.tensors[name] = info
                file.write(value.reshape(-1).view(torch.uint8).numpy().tobytes())

    def read_into(self, name: str, out: Tensor) -> None:
        with self.path.open("rb") as file:
            file.seek(self.tensors[name].offset)
            assert file.readinto(memoryview(out.numpy())) == out.numel()


class Block(nn.Module):
    """x + relu(x W) W^T / hidden + b, in buffers given once: a pass allocates nothing."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, hidden, dtype=torch.bfloat16, device="meta"))
        self.bias = nn.Parameter(torch.empty(WIDTH, dtype=torch.float32, device="meta"))

    def forward(self, x: Tensor, scratch: Tensor) -> None:
        hidden = scratch[: x.shape[0] * self.weight.shape[1]].view(x.shape[0], -1)
        torch.mm(x, self.weight, out=hidden)
        hidden.relu_().div_(self.weight.shape[1])
        x.addmm_(hidden, self.weight.t())
        x.add_(self.bias)


class Model:
    def __init__(self, path: Path, seed: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.blocks = [Block(hidden) for hidden in HIDDEN]
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"blocks.{index}.{name}": torch.randn(weight.shape, generator=generator).to(weight.dtype)
            for index, block in enumerate(self.blocks)
            for name, weight in block.named_parameters()
        }
        self.source = FileSource(path, tensors)
        self.layouts = [
            layout_block(self.source, f"blocks.{index}", block.state_dict()) for index, block in enumerate(self.blocks)
        ]
        self.sizes = [layout.nbytes for layout in self.layouts]
        self.x = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device=self.device)
        self.start = torch.randn(TOKENS, WIDTH, device=self.device, dtype=torch.bfloat16)
        self.scratch = torch.empty(TOKENS * max(HIDDEN), dtype=torch.bfloat16, device=self.device)

    def host(self, mode: str) -> HostBlocks | DiskBlocks:
        # 44 MiB: three of the smaller blocks and a staging pair for the others
        budget = PinnedBudget(CudaRegistrar(self.device), {"pageable": 0, "staged": 44 * MIB}.get(mode, 1 << 30))
        if mode == "disk":
            return DiskBlocks(self.source, self.layouts, budget, num_buffers=3)
        return HostBlocks(self.source, self.layouts, budget)

    def run(self, stream: BlockStreamer, stop_at: int | None = None) -> None:
        self.x.copy_(self.start)
        for number, block in enumerate(stream(self.blocks)):
            block(self.x, self.scratch)
            if number == stop_at:
                raise RuntimeError("stopped in mid-pass")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path / "model.bin", seed=0)


@pytest.fixture
def expected(model: Model) -> Tensor:
    """The all-resident result."""
    host = model.host("pageable")
    with torch.inference_mode():
        stream = BlockStreamer(model.blocks, host, model.device, resident=range(len(HIDDEN)))
        stream.load()
        model.run(stream)
        result = model.x.clone()
        stream.unload()
    host.release()
    assert result.isfinite().all()
    return result


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_resident", [0, 3])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
@torch.inference_mode()
def test_streamed_equals_resident(model: Model, expected: Tensor, mode: str, num_slots: int, num_resident: int) -> None:
    host = model.host(mode)
    ring = DeviceRing(ring_bytes(model.sizes, num_slots), model.device)
    resident = spread_residents(len(HIDDEN), num_resident)
    stream = BlockStreamer(model.blocks, host, model.device, ring=ring, resident=resident)
    stream.load()
    for _ in range(4):
        model.run(stream)
        assert torch.equal(model.x, expected)
    for stop_at in (0, 2, 5):
        with pytest.raises(RuntimeError, match="stopped in mid-pass"):
            model.run(stream, stop_at)
        model.run(stream)
        assert torch.equal(model.x, expected)
    stream.unload()
    stream.load()
    model.run(stream)
    assert torch.equal(model.x, expected)
    stream.unload()
    host.release()
    assert host.pinned_bytes == 0


@pytest.mark.parametrize("mode", ["pinned", "staged", "disk"])
@torch.inference_mode()
def test_passes_neither_synchronise_nor_allocate(model: Model, expected: Tensor, mode: str) -> None:
    host = model.host(mode)
    ring = DeviceRing(ring_bytes(model.sizes, 2), model.device)
    stream = BlockStreamer(model.blocks, host, model.device, ring=ring)
    stream.load()
    model.run(stream)
    with no_synchronisation():
        before = torch.cuda.memory_stats()
        for _ in range(3):
            model.run(stream)
        after = torch.cuda.memory_stats()
    calls = {key: after[key] - before[key] for key in ("allocation.all.allocated", "segment.all.allocated")}
    print(f"{mode}: allocator calls in three passes: {calls}")
    assert not any(calls.values())
    assert torch.equal(model.x, expected)
    stream.unload()
    host.release()


@torch.inference_mode()
def test_extents_are_pinned_exactly(model: Model) -> None:
    host = model.host("pinned")
    assert isinstance(host, HostBlocks) and all(extent.is_pinned() for extent in host.extents)
    print(f"pinned {host.pinned_bytes} bytes for {sum(model.sizes)}: {host.pinned_bytes / sum(model.sizes):.4f}")
    assert host.pinned_bytes <= 1.01 * sum(model.sizes)
    host.release()
    torch.zeros(1, device=model.device).add_(1)  # no error is left behind


@torch.inference_mode()
def test_refused_pinning_leaves_no_error_behind(model: Model) -> None:
    host = model.host("pinned")
    assert isinstance(host, HostBlocks)
    registrar = CudaRegistrar(model.device)
    assert not registrar.pin(host._areas[0])  # pinned already: the driver refuses
    torch.zeros(1, device=model.device).add_(1)
    torch.cuda.synchronize()
    host.release()


@torch.inference_mode()
def test_two_models_share_one_ring(tmp_path: Path) -> None:
    models = [Model(tmp_path / f"expert{seed}.bin", seed) for seed in (1, 2)]
    models[1].start = models[0].start
    ring = DeviceRing(ring_bytes(models[0].sizes, 2), models[0].device)
    streams = []
    for mode, one in zip(("pinned", "disk"), models, strict=True):
        streams.append(BlockStreamer(one.blocks, one.host(mode), one.device, ring=ring))
        streams[-1].load()
    results: list[list[Tensor]] = [[], []]
    for which in (0, 1, 1, 0, 1, 0, 0):
        models[which].run(streams[which])
        results[which].append(models[which].x.clone())
    for passes in results:
        assert all(torch.equal(passes[0], other) for other in passes[1:])
    assert not torch.equal(results[0][0], results[1][0])
    for stream in streams:
        stream.unload()


@torch.inference_mode()
def test_on_another_stream_than_the_default(model: Model, expected: Tensor) -> None:
    host = model.host("pinned")
    stream = BlockStreamer(model.blocks, host, model.device, ring=DeviceRing(ring_bytes(model.sizes, 2), model.device))
    stream.load()
    compute = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(compute):
        for _ in range(3):
            model.run(stream)
    torch.cuda.synchronize()
    assert torch.equal(model.x, expected)
    stream.unload()
    host.release()


@torch.inference_mode()
def test_spans_show_copies_behind_compute(model: Model) -> None:
    host = model.host("pinned")
    spans: list[Span] = []
    streams = TimedStreams(model.device, spans.extend)
    ring = DeviceRing(ring_bytes(model.sizes, 2), model.device, streams)
    stream = BlockStreamer(model.blocks, host, model.device, ring=ring)
    stream.load()
    model.run(stream)
    streams.synchronize()
    spans.clear()
    began = time.perf_counter()
    for _ in range(2):
        model.run(stream)
    streams.synchronize()
    ended = time.perf_counter()
    copies = [span for span in spans if span.kind == "copy"]
    compute = [span for span in spans if span.kind == "compute"]
    stall = sum(1e3 * (span.end - span.begin) for span in spans if span.kind == "stall")
    busy = sum(1e3 * (span.end - span.begin) for span in copies)
    print(
        f"{sum(span.nbytes for span in copies) / busy / 1e6:.1f} GB/s, stalled {stall:.2f} of {busy:.2f} ms of copies"
    )
    assert [span.place for span in compute] == 2 * list(range(len(HIDDEN)))
    # on the host's clock; what was prefetched in the pass before may have ended meanwhile
    assert all(began - 1 < span.begin <= span.end <= ended + 1e-3 for span in spans)
    assert all(began - 1e-3 < span.begin for span in compute)
    assert 0 < sum(span.nbytes for span in copies) <= 2 * sum(model.sizes)  # the ring may still hold a block
    stream.unload()
    host.release()
