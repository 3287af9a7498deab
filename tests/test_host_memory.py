"""Memory outside the GPU: whole pages, and all of it back to the system."""

import mmap
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from lowvram_video.host_memory import PAGES_FROM, allocate_bytes, allocate_extent, return_freed_bytes, total_ram_bytes
from safetensors.torch import save_file

MIB = 1 << 20

# eight threads read a model again and again, as a run that takes turns with another model does
TURNS = """
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
from lowvram_video.weights.reader import open_checkpoint

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


def test_the_ram_is_the_machines() -> None:
    assert 0 < total_ram_bytes() <= psutil.virtual_memory().total
