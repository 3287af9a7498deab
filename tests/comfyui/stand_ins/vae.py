"""VAEs of ComfyUI's own classes, narrower than VAELoader builds them: it has one size for these."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.ldm.wan.vae2_2
import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor

FOLDER = "tiny_vae"  # beside the folders of models


class LoadTinyVAE(io.ComfyNode):
    """In place of VAELoader, for HunyuanVideo's VAE and Wan 2.2's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestTinyVAE", inputs=[io.String.Input("vae_name", default="")], outputs=[io.Vae.Output()]
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        tensors = comfy.utils.load_torch_file(str(Path(folder_paths.models_dir) / FOLDER / vae_name))
        is_wan = "decoder.middle.0.residual.0.gamma" in tensors
        return io.NodeOutput(_wan22(tensors) if is_wan else _hunyuan(tensors))


def _hunyuan(tensors: dict[str, Tensor]) -> Any:
    vae = comfy.sd.VAE(sd=tensors, config={"params": {"ddconfig": _layers(32, [1, 2, 2, 2], 16), "embed_dim": 16}})
    return _of_video(vae, 16, 8)


def _wan22(tensors: dict[str, Tensor]) -> Any:
    """The network replaces that of the smallest VAE that can be built by a configuration."""
    dim, dec_dim = (tensors[f"{side}.conv1.weight"].shape[0] for side in ("encoder", "decoder"))
    network = comfy.ldm.wan.vae2_2.WanVAE(
        dim=dim, dec_dim=dec_dim // 4, z_dim=48, temperal_downsample=[False, True, True]
    ).eval()
    vae = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": _layers(32, [1], 4), "embed_dim": 4}})
    network.load_state_dict(tensors)
    vae.first_stage_model = network.to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(network, vae.patcher.load_device, vae.patcher.offload_device)
    return _of_video(vae, 48, 16)


def _layers(width: int, multiples: list[int], latent_channels: int) -> dict[str, Any]:
    return {
        "double_z": True,
        "z_channels": latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": width,
        "ch_mult": multiples,
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
        "conv3d": True,
        "time_compress": 4,
    }


def _of_video(vae: Any, latent_channels: int, stride: int) -> Any:
    """A VAE with what ComfyUI's own detection sets for videos of four frames per latent."""
    vae.latent_channels, vae.latent_dim = latent_channels, 3
    vae.upscale_ratio = (lambda length: max(0, length * 4 - 3), stride, stride)
    vae.downscale_ratio = (lambda length: max(0, math.floor((length + 3) / 4)), stride, stride)
    vae.upscale_index_formula = vae.downscale_index_formula = (4, stride, stride)
    vae.memory_used_encode = vae.memory_used_decode = lambda shape, dtype: 2**20
    return vae
