"""Files in forms of their own beside ComfyUI's own loaders: a VACE module, a VAE of other channels, marker tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch
from lowvram_pack.nodes.decode import DecodeVideo
from lowvram_pack.nodes.loaders import NO_MODULE, LoadWanModel
from lowvram_pack.wanvideo.vae.model import WAN21_VAE, WanVAE
from safetensors.torch import save_file
from tiny_models import CONFIGS, core, empty_latent, ours, prompts, sample, weights
from torch import Tensor

import nodes


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def test_a_vace_module_beside_its_base_samples_as_the_whole(models: Path) -> None:
    tensors = weights(CONFIGS["vace"])
    save_file(tensors, models / "whole_vace.safetensors")
    for name, module in (("vace_base", False), ("vace_module", True)):
        part = {key: tensor for key, tensor in tensors.items() if key.startswith("vace") == module}
        save_file(part, models / f"{name}.safetensors")
    generator = torch.Generator().manual_seed(2)
    frames = torch.randn(1, 32, 3, 8, 12, generator=generator)
    cond = dict(vace_frames=[frames], vace_mask=[torch.ones(1, 64, 3, 8, 12)], vace_strength=[1.0])
    model = LoadWanModel.execute("vace_base.safetensors", "fp32", "sdpa", "none", "vace_module.safetensors").result[0]
    got = sample(model, *prompts(**cond), empty_latent())
    assert error(got, sample(core(models / "whole_vace.safetensors"), *prompts(**cond), empty_latent())) < 1e-4
    stamps = {
        LoadWanModel.fingerprint_inputs("vace_base.safetensors", name)
        for name in (NO_MODULE, "vace_module.safetensors")
    }
    assert len(stamps) == 2


def test_a_marker_tensor_changes_nothing(models: Path) -> None:
    path = models / "marked.safetensors"
    save_file({**weights(CONFIGS["t2v"]), "model_type.SkyReels-V2-T2V-14B-540P": torch.zeros(1)}, path)
    assert error(sample(ours(path), *prompts(), empty_latent()), sample(core(path), *prompts(), empty_latent())) < 1e-4


@pytest.mark.parametrize(("decoded", "encoded"), [(12, 3), (4, 4)], ids=["upscale2x", "transparent"])
def test_a_vae_of_other_channels_decodes_as_core_does(tmp_path: Path, decoded: int, encoded: int) -> None:
    """Wan2.1_VAE_upscale2x_imageonly_real_v1 and qwen_image_layered_vae."""
    noise, tensors = torch.randn(2**18, generator=torch.Generator().manual_seed(0)), {}
    for name, tensor in WanVAE(replace(WAN21_VAE, encoder_dim=16, decoder_dim=16), device="meta").state_dict().items():
        shape = list(tensor.shape)
        if name.startswith("decoder.head.2."):
            shape[0] = decoded
        if name == "encoder.conv1.weight":
            shape[1] = encoded
        num = torch.Size(shape).numel()
        values = noise.repeat(num // noise.numel() + 1)[:num].view(shape)
        scale = 0.7 / values[0].numel() ** 0.5 if values.ndim > 1 else 0.05
        tensors[name] = (torch.ones(shape) if "gamma" in name else values * scale).half().contiguous()
    save_file(tensors, tmp_path / "vae.safetensors")
    try:
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(tmp_path / "vae.safetensors")))
    except RuntimeError:
        pytest.skip(f"this ComfyUI does not know VAEs of {decoded} channels")
    latent = {"samples": torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))}
    want = nodes.VAEDecode().decode(vae, latent)[0]
    got = DecodeVideo.execute(latent, vae, 0, 0, False).result[0]
    assert got.shape == want.shape and got.shape[-1] == decoded
    assert error(got, want) < 0.01
    tiled = DecodeVideo.execute(latent, vae, 32, 0, False).result[0]
    assert tiled.shape == want.shape
