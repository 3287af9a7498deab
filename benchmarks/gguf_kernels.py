"""Every GGUF kernel on a Wan 14B weight: GB/s read and written, against a device copy measured in the same run.

python benchmarks/gguf_kernels.py            # all types, bf16, [13824, 5120]
python benchmarks/gguf_kernels.py --sweep    # also other program sizes, to choose `Launch.rows` and `num_warps`
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from lowvram_video.weights.kernels.gguf_launch import LAUNCHES, Launch, dequantize_triton
from lowvram_video.weights.kernels.gguf_reference import BLOCK_TYPES, dequantize_reference, random_blocks
from measure import cold_seconds, save_results
from torch import Tensor

DEVICE = torch.device("cuda", 0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def copy_bandwidth(num_bytes: int, repeats: int) -> float:
    """Bytes read and written per second by a copy that moves `num_bytes` in all."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / cold_seconds(lambda: target.copy_(source), DEVICE, repeats)


def ulps_apart(got: Tensor, want: Tensor) -> int:
    """The most representable values that two tensors of a 16-bit dtype lie apart; 0 or 1 where fp32 is equal or not."""
    if got.dtype == torch.float32:
        return int(not torch.equal(got, want))
    left, right = (x.view(torch.int16).int() for x in (got, want))
    left, right = (torch.where(x < 0, -(x & 0x7FFF), x) for x in (left, right))
    return int((left - right).abs().max())


def measure(quant: str, rows: int, columns: int, dtype: torch.dtype, repeats: int, sweep: bool) -> dict[str, object]:
    block = BLOCK_TYPES[quant]
    num_blocks = rows * columns // block.elements
    # Repeating a few thousand random blocks is as good as that many: what is timed does not depend on the values.
    few = random_blocks(quant, min(num_blocks, 4096), torch.Generator().manual_seed(0)).to(DEVICE)
    packed = few.repeat(-(-num_blocks // few.shape[0]), 1)[:num_blocks].contiguous().view(rows, -1)
    out = torch.empty(rows, columns, dtype=dtype, device=DEVICE)
    dequantize_triton(packed, quant, out)
    part = 512
    want = dequantize_reference(packed[-part:], quant, (part, columns)).to(dtype)
    apart = ulps_apart(out[-part:], want)
    assert apart <= 1, f"{quant}: {apart} ulp from the reference"
    moved = packed.numel() + out.numel() * out.element_size()
    copy = copy_bandwidth(moved, repeats)
    default = LAUNCHES[quant]

    def time_launch(launch: Launch) -> dict[str, object]:
        took = cold_seconds(lambda: dequantize_triton(packed, quant, out, launch), DEVICE, repeats)
        return {
            "rows": launch.rows,
            "num_warps": launch.num_warps,
            "microseconds": round(took * 1e6, 1),
            "gb_per_s": round(moved / took / 1e9),
            "percent_of_copy": round(100 * moved / took / copy, 1),
        }

    result: dict[str, object] = {
        "megabytes": round(moved / 1e6, 1),
        "copy_gb_per_s": round(copy / 1e9),
        "ulps": apart,
        **time_launch(default),
    }
    if sweep:
        others = [
            replace(default, rows=warps * 32 * each, num_warps=warps) for warps in (1, 2, 4, 8) for each in (1, 2, 4)
        ]
        result["sweep"] = sorted((time_launch(launch) for launch in others), key=lambda timed: timed["microseconds"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="13824x5120", help="rows x columns of the weight")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--types", nargs="+", default=list(LAUNCHES), choices=list(LAUNCHES), metavar="TYPE")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--sweep", action="store_true", help="time other program sizes too")
    options = parser.parse_args()
    rows, columns = (int(size) for size in options.shape.split("x"))
    results: dict[str, object] = {"shape": [rows, columns], "dtype": options.dtype}
    print("type    rows warps      us   GB/s  of copy  ulp")
    for quant in options.types:
        result = measure(quant, rows, columns, DTYPES[options.dtype], options.repeats, options.sweep)
        results[quant] = result
        for line in (result, *result.get("sweep", [])[:4]):
            print(
                f"{quant:<7} {line['rows']:>4} {line['num_warps']:>5} {line['microseconds']:>7} {line['gb_per_s']:>6} "
                f"{line['percent_of_copy']:>7}%" + (f"  {line['ulps']:>3}" if "ulps" in line else "")
            )
    print(save_results("gguf_kernels", results))


if __name__ == "__main__":
    main()
