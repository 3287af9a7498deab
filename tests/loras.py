"""LoRA files in every naming for the tiny models, and what they should do to a model."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from lowvram_video.memory.plan.footprint import Limits, WorkSize
from lowvram_video.memory.plan.host_memory import RAM_MARGIN_BYTES
from lowvram_video.memory.stream.ring import DeviceRing
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.lora.file import LoraChoice
from safetensors.torch import load_file, save_file
from torch import Tensor

CPU = torch.device("cpu")
DIM, FFN = 128, 192
UNLIMITED = 1 << 60
Factors = dict[str, tuple[Tensor, Tensor, float | None]]  # layer -> down, up, alpha

ATTENTION = [f"{attn}.{layer}" for attn in ("self_attn", "cross_attn") for layer in "qkvo"]
LAYERS = [f"blocks.{n}.{layer}" for n in range(3) for layer in [*ATTENTION, "ffn.0", "ffn.2"]]

# written out, not taken from the code under test
DIFFUSERS = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip


def diffusers_name(layer: str) -> str:
    blocks, number, inner = layer.split(".", 2)
    return f"{blocks}.{number}.{DIFFUSERS[inner]}"


AB = ("lora_A.weight", "lora_B.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
NAMED = ("lora_A.my_style.weight", "lora_B.my_style.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
DIALECTS: dict[str, tuple[Callable[[str], str], tuple[str, str]]] = {
    "official": (lambda layer: layer, AB),
    "ComfyUI": (lambda layer: f"diffusion_model.{layer}", AB),
    "LightX2V": (lambda layer: f"diffusion_model.{layer}", DOWN_UP),
    "musubi": (lambda layer: f"lora_unet_{layer.replace('.', '_')}", DOWN_UP),
    "two underscores": (lambda layer: f"lora_unet__{layer.replace('.', '_')}", DOWN_UP),
    "diffusers": (lambda layer: f"transformer.{diffusers_name(layer)}", AB),
    "diffusers, old": (lambda layer: f"transformer.{diffusers_name(layer)}", ("lora.down.weight", "lora.up.weight")),
    "diffusers, underscored": (lambda layer: f"lora_unet_{diffusers_name(layer).replace('.', '_')}", DOWN_UP),
    "PEFT": (lambda layer: f"base_model.model.{layer}", AB),
    "PEFT, named": (lambda layer: f"base_model.model.{layer}", DEFAULT),
    "PEFT, of another name": (lambda layer: f"base_model.model.{layer}", NAMED),
    "bare": (lambda layer: f"diffusion_model.{layer}", ("lora_A", "lora_B")),
    "PEFT in ComfyUI": (lambda layer: f"base_model.model.diffusion_model.{layer}", AB),
    "DiffSynth": (lambda layer: f"pipe.dit.{layer}", DEFAULT),
}


def make_factors(seed: int = 0, rank: int = 4, layers: list[str] = LAYERS, alpha: float | None = 2.0) -> Factors:
    """Random factors whose product is as large as a tenth of the tiny models' weights."""
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = {}
    for layer in layers:
        inner, outer = (FFN if layer.endswith("ffn.2") else DIM), (FFN if layer.endswith("ffn.0") else DIM)
        down = torch.randn(rank, inner, generator=generator) * 0.3 / inner**0.5
        factors[layer] = down, torch.randn(outer, rank, generator=generator) * 0.3, alpha
    return factors


def save_lora(path: Path, factors: Factors, dialect: str = "ComfyUI", **more: Tensor) -> Path:
    name, (down_end, up_end) = DIALECTS[dialect]
    tensors: dict[str, Tensor] = {}
    for layer, (down, up, alpha) in factors.items():
        stem = name(layer)
        tensors |= {f"{stem}.{down_end}": down.contiguous(), f"{stem}.{up_end}": up.contiguous()}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file({name: tensor.clone() for name, tensor in {**tensors, **more}.items()}, path)
    return path


def merged_by_hand(weights: Mapping[str, Tensor], factors: Factors, strength: float = 1.0) -> dict[str, Tensor]:
    merged = dict(weights)
    for layer, (down, up, alpha) in factors.items():
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        weight = merged[f"{layer}.weight"]
        merged[f"{layer}.weight"] = (weight.double() + scale * (up.double() @ down.double())).to(weight.dtype)
    return merged


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(1, 16, 2, 4, 6, generator=generator),
        torch.tensor([700.0]),
        torch.randn(1, 512, 32, generator=generator),
    )


INPUTS = inputs()


def start(model: StreamedWan, swap: int = 0, disk: bool = False) -> StreamedWan:
    ram = RAM_MARGIN_BYTES + 7 * model.weights.largest_block_bytes // 2 if disk else None  # too little for 5 blocks
    plan = model.make_plan(WorkSize(5, 32, 48), Limits(UNLIMITED, ram_budget_bytes=ram, blocks_to_swap=swap))
    assert plan.host.from_disk == disk
    model.start(plan, DeviceRing(plan.blocks.ring_bytes, CPU) if swap else None)
    return model


@torch.inference_mode()
def velocity(path: Path, *loras: LoraChoice, settings: RunSettings = RunSettings()) -> Tensor:  # noqa: B008
    model = start(StreamedWan(path, settings, loras=loras))
    result = model(*INPUTS)
    model.release()
    assert all(parameter.is_meta for parameter in model.model.parameters())
    return result


def error_of(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def save_merged(wan: Path, path: Path, factors: Factors, strength: float = 1.0) -> Path:
    save_file(merged_by_hand(load_file(wan), factors, strength), path)
    return path
