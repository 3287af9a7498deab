"""Full-size Wan and FramePack checkpoints with random weights: speed and memory depend on shapes and dtypes alone.

python benchmarks/synthetic.py 14b fp8 /tmp/wan14b_fp8.safetensors
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from lowvram_video.framepack.checkpoint import ROPE_AXES_KEY
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import FramePackModel
from lowvram_video.wanvideo.checkpoint import NUM_HEADS_KEY
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.text.encoder import UMT5Config, UMT5Encoder
from lowvram_video.weights.kernels.gguf_reference import random_blocks
from safetensors.torch import save_file

Config = WanConfig | FramePackConfig

CONFIGS: Mapping[str, Config] = {
    "1.3b": WanConfig("t2v", 1536, 8960, 12, 30),
    "14b": WanConfig("t2v", 5120, 13824, 40, 40),
    "14b-i2v": WanConfig("i2v", 5120, 13824, 40, 40, in_channels=36, image_dim=1280),
    "5b": WanConfig("ti2v", 3072, 14336, 24, 30, in_channels=48, out_channels=48),
    "framepack": FramePackConfig(),
}
IN_BLOCK = re.compile(r"^(?:single_)?(?:transformer_)?blocks\.(\d+)\.")
DTYPES = {"bf16": (torch.bfloat16, "BF16"), "fp8": (torch.float8_e4m3fn, "F8_E4M3")}


def tensors_of(config: Config) -> dict[str, torch.Tensor]:
    """The model's tensors on the meta device, by their names in files."""
    model = WanModel if isinstance(config, WanConfig) else FramePackModel
    return dict(model(config, device="meta").state_dict())


def block_number(name: str) -> int | None:
    """The number of the block that a tensor belongs to, if any."""
    match = IN_BLOCK.match(name)
    return None if match is None else int(match[1])


def write_checkpoint(path: Path, config: Config, dtype: str, device: str, num_blocks: int | None = None) -> int:
    """Write a safetensors file in the official layout; linear weights of the blocks in `dtype`, the rest in bf16.

    Tensors are made one at a time, so any size fits. Returns the file's bytes.
    """
    tensors = {}
    for name, tensor in tensors_of(config).items():
        number = block_number(name)
        if num_blocks is not None and number is not None and number >= num_blocks:
            continue
        quantised = number is not None and tensor.ndim == 2
        tensors[name] = (tuple(tensor.shape), dtype if quantised else "bf16")
    if isinstance(config, WanConfig):  # what shapes tell of the published models' heads alone
        return write_random(path, tensors, device, {NUM_HEADS_KEY: str(config.num_heads)})
    return write_random(path, tensors, device, {ROPE_AXES_KEY: ",".join(map(str, config.rope_axes))})


def write_text_encoder(path: Path, config: UMT5Config, device: str) -> int:
    """Write a umt5 as fp8 files of it are: the products of its layers in fp8, the rest in bf16. Returns the bytes."""
    tensors = {"shared.weight": ((config.vocab_size, config.dim), "bf16")}
    for name, tensor in UMT5Encoder(config, "meta").state_dict().items():
        quantised = tensor.ndim == 2 and "bias" not in name
        tensors[name] = (tuple(tensor.shape), "fp8" if quantised else "bf16")
    return write_random(path, tensors, device)


def write_random(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    device: str,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a safetensors file of `{name: (shape, one of DTYPES)}`, values by what the names say. Returns the bytes."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        stored, label = DTYPES[dtype]
        size = torch.Size(shape).numel() * stored.itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    generator = torch.Generator(device).manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, (shape, dtype) in tensors.items():
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            if len(shape) > 1 and "modulation" not in name:
                values *= 0.7 / torch.Size(shape[1:]).numel() ** 0.5
            elif "norm" in name and name.endswith("weight"):
                values = 1 + 0.05 * values
            else:
                values *= 0.02
            stored = values.to(DTYPES[dtype][0]).cpu().contiguous()
            file.write(stored.flatten().view(torch.uint8).numpy().data)
    return len(raw) + 8 + end


def write_gguf(path: Path, config: Config, quant: str, device: str) -> int:
    """Write a GGUF file whose block weights hold random valid bytes of a type, the rest F32. Returns the file's bytes.

    One matrix of each shape is made and written again for every layer of that shape.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[quant]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "wan")
    made: dict[tuple[int, ...], np.ndarray] = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors_of(config).items():
        shape = tuple(tensor.shape)
        if block_number(name) is not None and tensor.ndim == 2:
            if shape not in made:
                blocks = random_blocks(quant, shape[0] * shape[1] // elements, generator)
                made[shape] = blocks.reshape(shape[0], shape[1] // elements * nbytes).numpy()
            writer.add_tensor(name, made[shape], raw_dtype=kind)
        else:
            fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 and "modulation" not in name else 0
            values = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
            values *= 0.7 / fan_in**0.5 if fan_in else 0.02
            writer.add_tensor(name, values.add_("norm" in name and name.endswith("weight")).cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size


def write_lora(path: Path, config: Config, rank: int, seed: int = 0) -> int:
    """Write a LoRA of all linear layers of the blocks, bf16. Returns the file's bytes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in tensors_of(config).items():
        if block_number(name) is None or tensor.ndim != 2:
            continue
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        out_features, in_features = tensor.shape
        down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        up = torch.randn(out_features, rank, generator=generator) * 0.02
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = down.bfloat16(), up.bfloat16()
    save_file(tensors, path)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(CONFIGS))
    parser.add_argument("dtype", help="bf16, fp8, a GGUF type such as Q4_K, or lora64 for a LoRA of rank 64")
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    began = time.monotonic()
    config = CONFIGS[options.model]
    if options.dtype in DTYPES:
        size = write_checkpoint(options.path, config, options.dtype, options.device)
    elif options.dtype.startswith("lora"):
        size = write_lora(options.path, config, int(options.dtype.removeprefix("lora")), seed=len(options.path.name))
    else:
        size = write_gguf(options.path, config, options.dtype, options.device)
    print(f"{options.path}: {size / 2**30:.2f} GiB in {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
