"""Memory outside the GPU: whole pages, and all of it back to the system."""

import mmap
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from lowvram_video.memory.plan.limits import hold_allocator, limits_for
from lowvram_video.memory.plan.rates import Rates
from lowvram_video.memory.stream.pinned import CudaRegistrar, PinnedBudget, PinnedMemory
from lowvram_video.memory.stream.staging import Staging
from lowvram_video.runtime.settings import RunSettings, use_device
from lowvram_video.system import host_memory
from lowvram_video.system.dtypes import half_dtype
from lowvram_video.system.host_memory import (
    PAGES_FROM,
    allocate_bytes,
    allocate_extent,
    available_ram_bytes,
    return_freed_bytes,
    total_ram_bytes,
)
from safetensors.torch import save_file

MIB = 1 << 20

# eight threads read a model again and again, as a run that takes turns with another model does
TURNS = """
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
from lowvram_video.weights.files.open import open_checkpoint

checkpoint = open_checkpoint(sys.argv[1])
sizes = []
for _ in range(12):
    with ThreadPoolExecutor(8) as threads:
        for tensor in threads.map(checkpoint.read, checkpoint.tensors):
            assert tensor.nbytes
    del tensor
    sizes.append(psutil.Process().memory_info().rss)
print(max(sizes[2:]) - sizes[1])
"""


def test_extents_are_whole_zero_based_pages() -> None:
    extent = allocate_extent(5000)
    assert extent.numel() == 2 * mmap.PAGESIZE and extent.data_ptr() % mmap.PAGESIZE == 0
    with pytest.raises(MemoryError, match=r"could not allocate .* GiB of host memory"):
        allocate_extent(1 << 60)


@pytest.mark.parametrize("nbytes", [0, 1, PAGES_FROM - 1, PAGES_FROM, PAGES_FROM + 1])
def test_bytes_are_as_many_as_asked_for(nbytes: int) -> None:
    memory = allocate_bytes(nbytes)
    assert memory.shape == (nbytes,) and memory.dtype == torch.uint8 and memory.is_contiguous()
    assert not memory.is_inference()
    memory.fill_(7)


def test_models_read_in_turn_leave_nothing_behind(tmp_path: Path) -> None:
    # sizes of Wan 1.3B's time projection and text embedding: below what C's allocator gives pages of its own
    sizes = [27 * MIB, 12 * MIB, 5 * MIB, 5 * MIB, 3 * MIB]
    path = tmp_path / "model.safetensors"
    save_file({f"t{index}": torch.zeros(size, dtype=torch.uint8) for index, size in enumerate(sizes)}, path)
    ran = subprocess.run([sys.executable, "-c", TURNS, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    growth = int(ran.stdout) / MIB
    print(f"eleven more turns of 52 MiB: {growth:.1f} MiB more RSS")
    assert growth < 8  # with C's allocator: 79 to 117


@pytest.mark.skipif(sys.platform != "linux", reason="where C's allocator is glibc's")
def test_freed_memory_goes_back() -> None:
    pieces = [torch.zeros(MIB // 16, dtype=torch.uint8) for _ in range(1024)]  # 64 KiB each: from the heap
    last = torch.zeros(MIB // 16, dtype=torch.uint8)  # in use above them, so the heap cannot shrink by itself
    held = psutil.Process().memory_info().rss
    pieces.clear()
    return_freed_bytes()
    freed = (held - psutil.Process().memory_info().rss) / MIB
    print(f"{freed:.0f} of 64 MiB went back")
    assert freed > 48 and last.sum() == 0


def test_what_pytorch_keeps_of_pinned_memory_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's own name where it has one, else by that of older ones; nothing where there is neither or no GPU."""
    called: list[str] = []
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    monkeypatch.delattr(torch._C, "_host_emptyCache", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return_freed_bytes()
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: called.append("older"), raising=False)
    return_freed_bytes()
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: called.append("newer"), raising=False)
    return_freed_bytes()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    return_freed_bytes()
    assert called == ["older", "newer"]


class Onlooker:
    """Pins nothing, and sees how much RAM the process has by then."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def pin(self, extent: torch.Tensor) -> bool:
        self.seen.append(psutil.Process().memory_info().rss)
        return True

    def unpin(self, extent: torch.Tensor) -> None:
        return


def test_new_memory_has_its_pages_before_it_is_pinned() -> None:
    onlooker, before = Onlooker(), psutil.Process().memory_info().rss
    memory = PinnedMemory(PinnedBudget(onlooker))
    extent = memory.allocate(64 * MIB)
    buffers = Staging([0], 64 * MIB, lambda *_: [], PinnedBudget(onlooker), num_buffers=1, num_threads=1)
    assert [round((seen - before) / (64 * MIB)) for seen in onlooker.seen] == [1, 2] and not extent.any()
    buffers.close()
    before = psutil.Process().memory_info().rss
    PinnedMemory(PinnedBudget(onlooker, cap_bytes=0)).allocate(64 * MIB)  # what is not pinned may never be written
    assert psutil.Process().memory_info().rss - before < 32 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_memory_goes_back() -> None:
    torch.zeros(1, device="cuda")
    return_freed_bytes()
    before = psutil.Process().memory_info().rss
    pinned = torch.zeros(65 * MIB, dtype=torch.uint8, pin_memory=True)
    held = psutil.Process().memory_info().rss
    del pinned
    return_freed_bytes()
    left = psutil.Process().memory_info().rss
    assert held - before > 60 * MIB and left - before < 8 * MIB


def test_the_ram_is_the_machines() -> None:
    assert 0 < total_ram_bytes() <= psutil.virtual_memory().total


def container(root: Path, version: int, limit: str, used: int, cached: int) -> None:
    """The files of a control group, as the kernel writes them."""
    folder, names = root, ("memory.max", "memory.current")
    stat = f"anon 1\ninactive_file {cached}\nactive_file 0\n"
    if version == 1:
        folder, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        stat = f"inactive_file 1\ntotal_inactive_file {cached // 2}\ntotal_active_file {cached // 2}\n"
    folder.mkdir(exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(f"{text}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="has no control groups")
@pytest.mark.parametrize(
    ("version", "limit", "total", "available"),
    [
        (2, "2147483648", 2 << 30, (2 << 30) - 400 * MIB),
        (1, "2147483648", 2 << 30, (2 << 30) - 400 * MIB),
        (2, "max", None, 3 << 30),
        (1, "9223372036854771712", None, 3 << 30),
    ],
)
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, limit: str, total: int | None, available: int
) -> None:
    container(tmp_path, version, limit, used=500 * MIB, cached=100 * MIB)
    machine = SimpleNamespace(total=16 << 30, available=3 << 30)
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert total_ram_bytes() == (total or 16 << 30)
    assert available_ram_bytes() == available
    machine.available = machine.total
    assert available_ram_bytes() == (available if total else 16 << 30)


def test_what_is_available_is_part_of_the_whole() -> None:
    assert 0 < available_ram_bytes() <= total_ram_bytes()


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_gpus_without_bf16_compute_in_fp16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert half_dtype(torch.device("cuda", 0)) == dtype
    assert RunSettings(device=torch.device("cuda", 0)).compute_dtype == dtype
    assert half_dtype(torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(("asked", "planned"), [(4.0, 4.0), (24.0, 12.0)])
def test_a_vram_budget_ends_at_the_card(monkeypatch: pytest.MonkeyPatch, asked: float, planned: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (3 << 30, 12 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("lowvram_video.memory.plan.limits.measure_rates", lambda *_: Rates(1.0, 1.0, 1.0))
    assert limits_for(torch.device("cuda", 0), vram_budget_gib=asked).vram_budget_bytes == planned * (1 << 30)


class FakeCuda:
    """CUDA with two devices, as far as pinning goes; notes on which of them each call was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = threading.local()  # each thread has its own current device, 0 at first
        self.calls: list[tuple[str, int]] = []
        monkeypatch.setattr(torch.cuda, "current_device", self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)

    def current(self) -> int:
        return getattr(self.now, "index", 0)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.now.index = self.current(), device.index
        try:
            yield
        finally:
            self.now.index = before

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", self.current()))
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", self.current()))
        return 0


@pytest.mark.parametrize("name", ["cuda:1", "cuda"])
def test_threads_pin_for_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.now.index = 1
    registrar, extent = CudaRegistrar(torch.device(name)), allocate_extent(100)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(registrar.pin, extent).result()
        threads.submit(registrar.unpin, extent).result()
    assert cuda.calls == [("register", 1), ("unregister", 1)]


def test_a_device_chosen_by_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [str(use_device(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    assert chosen == [torch.device("cuda", 1)]
    with pytest.raises(ValueError, match=r"device 'cuda:2' does not exist: this machine has 2 GPU"):
        use_device("cuda:2")


@pytest.mark.parametrize(("name", "number"), [("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
@pytest.mark.parametrize(("allowed", "share"), [(None, 1.0), (2 << 30, 0.25), (16 << 30, 1.0)])
def test_pytorchs_allocator_is_held_by_the_gpus_number(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, allowed: int | None, share: float
) -> None:
    """torch 2.11 refuses a device without one there, as `torch.device("cuda")` is."""
    held: list[tuple[float, object]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: held.append(given))
    hold_allocator(torch.device(name), allowed)
    assert held == [(share, number)]


def test_one_function_alone_holds_pytorchs_allocator() -> None:
    root = Path(__file__).parents[1]
    calls = [
        path.relative_to(root).as_posix()
        for folder in ("memory", "runtime", "nodes", "card", "cli", "doctor", "vae", "benchmarks")
        for path in (root / folder).rglob("*.py")
        if "set_per_process_memory_fraction(" in path.read_text(encoding="utf-8")
    ]
    assert calls == ["memory/plan/limits.py"]
