"""A tiny file under the name of every download of the example workflows, and a picture and a video to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from lowvram_video.framepack.checkpoint import ROPE_AXES_KEY
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.vae.model import HUNYUAN_VAE, HunyuanVAE
from lowvram_video.framepack.vae.model import VAEConfig as HunyuanVAEConfig
from lowvram_video.video.writer import VideoWriter
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WAN22_VAE, WanVAE
from lowvram_video.wanvideo.vae.model import VAEConfig as WanVAEConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..quantizers import write_gguf
from ..tiny import randomize
from ..tiny_flashvsr import save_flashvsr
from ..tiny_framepack import make_tensors
from . import model_files as files
from .graph import ModelFile

TINY = WanConfig("t2v", dim=128, ffn_dim=192, num_heads=1, num_layers=2)
I2V = replace(TINY, model_type="i2v", in_channels=36)
CONFIGS: dict[ModelFile, WanConfig] = {
    files.T2V_SMALL: TINY,
    files.T2V_HIGH: TINY,
    files.T2V_LOW: TINY,
    files.I2V_480P: replace(I2V, image_dim=1280),
    files.I2V_HIGH: I2V,
    files.I2V_LOW: I2V,
    files.FLF2V: replace(I2V, model_type="flf2v", image_dim=1280, image_pos_tokens=514),
    files.VACE_SMALL: replace(TINY, model_type="vace", vace_layers=1, vace_channels=96),
    files.TI2V: replace(TINY, model_type="ti2v", in_channels=48, out_channels=48),
}
LORAS = (
    files.T2V_LORA_HIGH,
    files.T2V_LORA_LOW,
    files.I2V_LORA_HIGH,
    files.I2V_LORA_LOW,
)
# what the encoders make keeps its size; all else is small
FRAMEPACK = FramePackConfig(
    num_heads=4, head_dim=16, num_layers=2, num_single_layers=2, num_refiner_layers=1, rope_axes=(4, 6, 6)
)
FRAMEPACK_GGUF = replace(FRAMEPACK, num_heads=16)  # rows of 256, as packed types want


# of VAEs that core builds in their full size alone: their tiny ones have a folder of their own, see stand_ins/vae.py
TINY_VAES = "tiny_vae"
TINY_WAN22 = replace(WAN22_VAE, encoder_dim=8, decoder_dim=8)
TINY_HUNYUAN = replace(HUNYUAN_VAE, block_out_channels=(32, 64, 64, 64), layers_per_block=1)
EMPTY = {"empty": torch.zeros(1)}
# of no workflow: large enough that one kept by each prompt would show in the server's memory
PLAIN = replace(TINY, dim=256, ffn_dim=384, num_heads=2, num_layers=4)
PLAIN_VAE_CONFIG = replace(WAN21_VAE, encoder_dim=16, decoder_dim=16)
PLAIN_MODEL = ModelFile("plain_t2v.safetensors", "", "diffusion_models")
PLAIN_VAE = ModelFile("plain_vae.safetensors", "", "vae")


def make_models(folder: Path, full_size: bool) -> None:
    """ComfyUI's models folder with a tiny file for every download of the workflows, and two VAEs in `full_size`."""
    for number, (file, config) in enumerate(CONFIGS.items()):
        tensors = dict(randomize(WanModel(config), number).state_dict())
        _save(folder, file, _as_named(file.name, tensors))
    for file in LORAS:
        _save(folder, file, _lora())
    vae = randomize(WanVAE(replace(WAN21_VAE, encoder_dim=8, decoder_dim=8)))
    _save(folder, files.VAE_21, dict(vae.state_dict()))
    _save(folder, PLAIN_MODEL, dict(randomize(WanModel(PLAIN)).state_dict()))
    _save(folder, PLAIN_VAE, dict(randomize(WanVAE(PLAIN_VAE_CONFIG)).state_dict()))
    _save_fixed_vaes(folder, full_size)
    _save_framepack(folder)
    save_flashvsr(folder / files.FLASHVSR.directory)
    # the loaders of these are replaced, but their menus are checked
    for file in (files.TEXT_ENCODER, files.CLIP_VISION, files.LLAVA, files.CLIP_L, files.SIGCLIP):
        _save(folder, file, EMPTY)


def make_inputs(folder: Path) -> None:
    """The picture that ComfyUI ships as its example, and a video of five frames that brighten."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.linear_gradient("L").convert("RGB")
    picture.save(folder / "example.png")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(256, 256, 3)
    with VideoWriter(folder / "example.mp4", 30) as video:
        video.write(torch.stack([pixels // 5 * (frame + 1) for frame in range(5)]))


def _save(folder: Path, file: ModelFile, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, _place(folder, file), metadata)


def _place(folder: Path, file: ModelFile) -> Path:
    (folder / file.directory).mkdir(parents=True, exist_ok=True)
    return folder / file.directory / file.name


def _as_named(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored as the file's name says: fp16, fp8, or fp8 with a scale per layer."""
    if "fp8" not in name:
        return {key: tensor.half() for key, tensor in tensors.items()}
    stored: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not (key.startswith("blocks.") and key.endswith("weight") and tensor.ndim == 2):
            stored[key] = tensor.half()
            continue
        scale = tensor.abs().max() / 448 if "scaled" in name else torch.ones(())
        stored[key] = (tensor / scale).to(torch.float8_e4m3fn)
        if "scaled" in name:
            stored[key.replace(".weight", ".scale_weight")] = scale.float()
    if "scaled" in name:
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return stored


def _lora(rank: int = 4) -> dict[str, Tensor]:
    layer, generator = "diffusion_model.blocks.1.self_attn.q", torch.Generator().manual_seed(0)
    return {
        f"{layer}.lora_down.weight": torch.randn(rank, TINY.dim, generator=generator) / TINY.dim**0.5,
        f"{layer}.lora_up.weight": torch.randn(TINY.dim, rank, generator=generator) * 0.5,
        f"{layer}.alpha": torch.tensor(float(rank)),
    }


def _save_fixed_vaes(folder: Path, full_size: bool) -> None:
    """The VAEs that core builds in their full size: tiny ones for the stand-in, and what the menus show."""
    for file, tiny, full in (
        (files.VAE_22, _wan_vae(TINY_WAN22), _wan_vae(WAN22_VAE)),
        (files.HUNYUAN_VAE, _hunyuan_vae(TINY_HUNYUAN), _hunyuan_vae(HUNYUAN_VAE)),
    ):
        _save(folder, replace(file, directory=TINY_VAES), _any_size(tiny))
        _save(folder, file, _any_size(full) if full_size else EMPTY)


def _wan_vae(config: WanVAEConfig) -> dict[str, Tensor]:
    return dict(WanVAE(config, device="meta").state_dict())


def _hunyuan_vae(config: HunyuanVAEConfig) -> dict[str, Tensor]:
    return _as_comfyui(HunyuanVAE(config, device="meta").state_dict())


def _any_size(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Random fp16, the same numbers again and again to be quick."""
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    made = {}
    for name, tensor in tensors.items():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
        is_norm = "gamma" in name or (name.endswith("weight") and tensor.ndim == 1)
        values = torch.ones(1).half() if is_norm else (noise * (0.7 / fan_in**0.5)).half()
        times = tensor.numel() // values.numel() + 1
        made[name] = values.repeat(times)[: tensor.numel()].view(tensor.shape).contiguous()
    return made


# --- FramePack -------------------------------------------------------------------------------------------


def _save_framepack(folder: Path) -> None:
    for seed, file in enumerate((files.FRAMEPACK, files.FRAMEPACK_F1)):
        tensors = {name: _as_kijai(name, tensor) for name, tensor in make_tensors(FRAMEPACK, seed).items()}
        _save(folder, file, tensors, _axes(FRAMEPACK))
    packed = {name: (tensor, _gguf_type(tensor)) for name, tensor in make_tensors(FRAMEPACK_GGUF).items()}
    write_gguf(_place(folder, files.FRAMEPACK_GGUF), packed, "hyvid", _axes(FRAMEPACK_GGUF))


def _axes(config: FramePackConfig) -> dict[str, str]:
    return {ROPE_AXES_KEY: ",".join(map(str, config.rope_axes))}


def _as_kijai(name: str, tensor: Tensor) -> Tensor:
    """The matrices of blocks in fp8 but for modulation."""
    is_fp8 = "transformer_blocks." in name and "norm" not in name and tensor.ndim == 2
    return tensor.to(torch.float8_e4m3fn if is_fp8 else torch.bfloat16)


def _gguf_type(tensor: Tensor) -> str:
    if tensor.ndim != 2:
        return "F32" if tensor.ndim == 1 else "F16"
    return "Q4_K" if tensor.shape[1] % 256 == 0 else "Q8_0"


def _as_comfyui(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A HunyuanVideo VAE with diffusers' names as Comfy-Org's file has it."""
    changes = {
        **{f"encoder.down_blocks.{stage}.": f"encoder.down.{stage}." for stage in range(4)},
        **{f"decoder.up_blocks.{stage}.": f"decoder.up.{3 - stage}." for stage in range(4)},
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "mid_block.attentions.0.": "mid.attn_1.",
        ".resnets.": ".block.",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_out.0": "proj_out",
        **{f"attn_1.to_{letter}.": f"attn_1.{letter}." for letter in "qkv"},
    }
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in changes.items():
            name = name.replace(old, new)
        is_matrix = "attn_1" in name and tensor.ndim == 2
        renamed[name] = tensor[:, :, None, None, None] if is_matrix else tensor
    return renamed
