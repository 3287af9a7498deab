"""Full-size models of which there is a file's header and nothing behind it, and how they are run in dry passes."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lowvram_video.benchmarks.synthetic import CONFIGS, Config, block_number, tensors_of, write_lora
from lowvram_video.memory.plan.footprint import GIB, Limits
from lowvram_video.memory.stream.layout import align
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.footprint import WanWork, wan_work
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.lora.file import LoraChoice

from .dry_pass import DryAttention, use_gpu_kernels

DTYPES = {"bf16": (torch.bfloat16, "BF16"), "fp8": (torch.float8_e4m3fn, "F8_E4M3")}
# An H200's rates: plans then keep as many blocks and cache the text where a short clip is bound by its copies.
RATES = {"tflops_matmul": 800.0, "tflops_attention": 570.0, "h2d_gbps": 55.0}


@dataclass(frozen=True)
class Case:
    """A model and how it runs, one that an H200 ran out of memory with where its `budget_gib` has two decimals."""

    name: str
    stored: str
    size: tuple[int, int, int]
    budget_gib: float
    quantization: str = "none"
    attention: DryAttention = DryAttention()  # noqa: RUF009 - has no state
    rank: int = 0
    steered: str = ""  # by what

    def __str__(self) -> str:
        width, height, frames = self.size
        words = [self.name, self.stored, self.quantization, self.attention.name, f"{width}x{height}x{frames}"]
        more = ["lora"] if self.rank else []
        return "-".join([*words, *more, *filter(None, [self.steered]), f"{self.budget_gib:g}"])

    @property
    def limits(self) -> Limits:
        return Limits(int(self.budget_gib * GIB), attention=self.attention.workspace, **RATES)

    def work(self, config: WanConfig) -> WanWork:
        work, seen = wan_work(config, self.size), self.steered == "seen"
        return replace(work, nag=self.steered == "guided", seen_queries=seen, all_queries=seen)


def opened(case: Case, folder: Path) -> StreamedWan:
    """The model of a case, its file in a folder where it is made if it is not there."""
    config = CONFIGS[case.name]
    assert isinstance(config, WanConfig)
    path = folder / f"{case.name}_{case.stored}.{'gguf' if case.stored.startswith('Q') else 'safetensors'}"
    if not path.exists():
        write_header(path, config, case.stored)
    loras = []
    if case.rank:
        loras = [LoraChoice(folder / f"{case.name}_lora.safetensors")]
        write_lora(loras[0].path, config, case.rank)
    read_as = case.quantization if case.stored == "bf16" else "none"
    device = torch.device("cpu")
    model = StreamedWan(path, RunSettings(device, torch.bfloat16, quantization=read_as), loras=loras)
    busy = [module for block in model.blocks for module in block.busy_modules()]
    model.quantization = select_compute(model.model, busy, case.quantization, device)
    use_gpu_kernels(model, case.attention)
    return model


def write_header(path: Path, config: Config, stored: str) -> None:
    """A file of a model whose blocks' products are stored as bf16, fp8 or a GGUF type; behind its header is a hole."""
    if stored in DTYPES:
        _write_safetensors(path, config, stored)
    else:
        _write_gguf(path, config, stored)


def _write_safetensors(path: Path, config: Config, stored: str) -> None:
    header, end = {}, 0
    for name, tensor in tensors_of(config).items():
        product = block_number(name) is not None and tensor.ndim == 2
        dtype, label = DTYPES[stored if product else "bf16"]
        size = tensor.numel() * dtype.itemsize
        header[name] = {"dtype": label, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


def _write_gguf(path: Path, config: WanConfig, stored: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[stored]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer, end = gguf.GGUFWriter(path, "wan"), 0
    for name, tensor in tensors_of(config).items():
        product = block_number(name) is not None and tensor.ndim == 2
        shape = (tensor.shape[0], tensor.shape[1] // elements * nbytes) if product else tuple(tensor.shape)
        dtype = np.dtype(np.uint8 if product else np.float32)
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, size, raw_dtype=kind if product else None)
        end += align(size, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(align(path.stat().st_size, 32) + end)
