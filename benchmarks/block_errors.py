"""What each stored form and product does to random Wan blocks: the error of the velocity, relative to bf16 weights'.

python benchmarks/block_errors.py

Four blocks of width 1024 with random weights, in fp32 arithmetic on the CPU, so that only the forms differ. GGUF files
are made by the plain quantisers of tests/: llama.cpp's search for better scales would only help.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from lowvram_video.memory.plan.footprint import Limits, WorkSize
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import save_results
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.quantizers import write_gguf

CONFIG = WanConfig("t2v", dim=1024, ffn_dim=4096, num_heads=8, num_layers=4)
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")
UNLIMITED = 1 << 60


def random_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, like in WanModel(CONFIG, device="meta").state_dict().items():
        values = torch.randn(like.shape, generator=generator)
        if like.ndim > 1 and "modulation" not in name:
            values *= 0.7 / like[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        tensors[name] = values.bfloat16()
    return tensors


@torch.inference_mode()
def velocity(path: Path, quantization: str = "none") -> Tensor:
    model = StreamedWan(path, RunSettings(quantization=quantization))
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 16, 3, 16, 16, generator=generator)
    text = torch.randn(1, 512, CONFIG.text_dim, generator=generator)
    model.start(model.make_plan(WorkSize(9, 128, 128), Limits(UNLIMITED)))
    out = model(latent, torch.tensor([600.0]), text)
    model.release()
    return out


def main() -> None:
    tensors = random_tensors()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "bf16.safetensors"
        save_file(tensors, plain)
        exact = velocity(plain)
        errors = {}
        for name in ("fp8", "fp8_fast", "int8"):
            errors[name] = velocity(plain, name)
        for quant in GGUF_TYPES:
            stored = {
                name: (values.float(), quant if name.startswith("blocks.") and values.ndim == 2 else "F32")
                for name, values in tensors.items()
            }
            errors[quant] = velocity(write_gguf(Path(folder) / f"{quant}.gguf", stored))
    relative = {name: float((got - exact).norm() / exact.norm()) for name, got in errors.items()}
    for name, error in relative.items():
        print(f"{name:<10}{100 * error:>7.2f} %")
    print(save_results("block_errors", {"errors": relative}))


if __name__ == "__main__":
    main()
