"""What PyTorch takes for the sum of many rows on a GPU.

Where there are few columns and many rows, several blocks of threads share a column's sum, and each leaves what it has
in memory, by far more of it than the sums need. Source: PyTorch, `aten/src/ATen/native/cuda/Reduce.cuh`
(`setReduceConfig`, `global_memory_size`), as of 2.11; measured in `benchmarks/results/workspaces_h200_2026-11-30.json`.
"""

from __future__ import annotations

from .grids import cdiv

SUM_BYTES = 4  # each in fp32
COLUMNS_TOGETHER = 4  # of a thread, which reads so many at a time
BLOCK_THREADS, WARP = 512 // COLUMNS_TOGETHER, 32
FEWEST_ROWS, MOST_ROWS = 16, 256  # of a thread, before others share its column


def sum_buffer_bytes(rows: int, columns: int, threads: int) -> int:
    """Bytes beside the sum (or mean) over the rows of `[rows, columns]`, whole rows in order, of 2 or 4 bytes each.

    `threads` is what the GPU runs at a time (`processors.threads_of`).
    """
    groups = max(1, columns // COLUMNS_TOGETHER)
    most_wide, most_high = (min(BLOCK_THREADS, 1 << (size.bit_length() - 1)) for size in (groups, max(1, rows)))
    height = min(most_high, BLOCK_THREADS // min(most_wide, WARP))
    width = min(most_wide, BLOCK_THREADS // height)
    each = cdiv(rows, height)  # of the rows, for a thread
    blocks, room = cdiv(groups, width), threads // (width * height)
    if rows < min(height * FEWEST_ROWS, MOST_ROWS) or each < MOST_ROWS or blocks > room:
        return 0
    sharing = max(min(cdiv(room, blocks), cdiv(each, FEWEST_ROWS)), cdiv(each, MOST_ROWS))
    return SUM_BYTES * columns * sharing * width * COLUMNS_TOGETHER if sharing > 1 else 0
