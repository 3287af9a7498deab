"""Full-size Wan checkpoints with random weights, for measuring: speed and memory depend on shapes and dtypes alone.

python benchmarks/synthetic.py 14b fp8 /tmp/wan14b_fp8.safetensors
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from lowvram_video.wanvideo.config import WanConfig
from lowvram_video.wanvideo.model import WanModel

CONFIGS: Mapping[str, WanConfig] = {
    "1.3b": WanConfig("t2v", 1536, 8960, 12, 30),
    "14b": WanConfig("t2v", 5120, 13824, 40, 40),
    "14b-i2v": WanConfig("i2v", 5120, 13824, 40, 40, in_channels=36, image_dim=1280),
    "5b": WanConfig("ti2v", 3072, 14336, 24, 30, in_channels=48, out_channels=48),
}
DTYPES = {"bf16": (torch.bfloat16, "BF16"), "fp8": (torch.float8_e4m3fn, "F8_E4M3")}


def write_checkpoint(path: Path, config: WanConfig, dtype: str, device: str, num_blocks: int | None = None) -> int:
    """Write a safetensors file in the official layout; linear weights of the blocks in `dtype`, the rest in bf16.

    Tensors are made one at a time, so any size fits. Returns the file's bytes.
    """
    tensors = {}
    for name, tensor in WanModel(config, device="meta").state_dict().items():
        if num_blocks is not None and name.startswith("blocks.") and int(name.split(".")[1]) >= num_blocks:
            continue
        quantised = name.startswith("blocks.") and tensor.ndim == 2
        stored, label = DTYPES[dtype if quantised else "bf16"]
        tensors[name] = (tuple(tensor.shape), stored, label)
    header, end = {}, 0
    for name, (shape, stored, label) in tensors.items():
        size = torch.Size(shape).numel() * stored.itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    generator = torch.Generator(device).manual_seed(0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, (shape, stored, _) in tensors.items():
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            if len(shape) > 1 and "modulation" not in name:
                values *= 0.7 / torch.Size(shape[1:]).numel() ** 0.5
            elif "norm" in name and name.endswith("weight"):
                values = 1 + 0.05 * values
            else:
                values *= 0.02
            file.write(values.to(stored).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return len(raw) + 8 + end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(CONFIGS))
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    began = time.monotonic()
    size = write_checkpoint(options.path, CONFIGS[options.model], options.dtype, options.device)
    print(f"{options.path}: {size / 2**30:.2f} GiB in {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
