"""FlashVSR's public code (OpenImagingLab/FlashVSR) with our files, to be compared with: its pieces and its pipeline.

Of a checkout only `diffsynth/models/wan_video_dit.py`, `diffsynth/pipelines/flashvsr_tiny.py`, `diffsynth/schedulers/`
and `examples/WanVSR/utils/` are read. Beside PyTorch, numpy and einops it imports tqdm and Pillow. What it takes of the
rest of its package is stood in for, as is its block-sparse kernel where `block_sparse_attn` is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.upscale.request import UpscaleFiles
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

PREFIX = "LQ_proj_in."


@dataclass(frozen=True)
class PublicCode:
    """Its modules, and the name of the attention that they got."""

    network: Any
    pipeline: Any
    tools: Any
    decoders: Any
    attention: str

    def transformer(self, files: UpscaleFiles, config: WanConfig) -> Any:
        """Its network with the file's weights."""
        made = self.network.WanModel(
            config.dim, 16, config.ffn_dim, 16, config.text_dim, config.freq_dim, config.eps, (1, 2, 2),
            config.num_heads, config.num_layers,
        )  # fmt: skip
        made.load_state_dict(load_file(files.model))
        return made

    def projection(self, files: UpscaleFiles, causal: bool = False) -> Any:
        """Its projection, of version 1, or with the caches that `causal` 1.1 keeps."""
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(files.projection).items()}
        layers = sum(name.startswith("linear_layers") and name.endswith("weight") for name in weights)
        dim = weights["linear_layers.0.weight"].shape[0]
        made = self.tools.Buffer_LQ4x_Proj(3, dim, layers)
        first, second = weights["conv1.weight"].shape[0], weights["conv2.weight"].shape[0]
        if (first, second) != (made.hidden_dim1, made.hidden_dim2):  # the published widths are in its constructor
            how: dict[str, Any] = {"stride": (2, 1, 1), "padding": (1, 1, 1)}
            made.conv1 = self.tools.CausalConv3d(768, first, (4, 3, 3), **how)
            made.conv2 = self.tools.CausalConv3d(first, second, (4, 3, 3), **how)
            made.norm1, made.norm2 = (self.tools.RMS_norm(width, images=False) for width in (first, second))
            made.linear_layers = nn.ModuleList(nn.Linear(second, dim) for _ in range(layers))
        made.load_state_dict(weights)
        made.clear_cache()
        if causal:
            made.stream_forward = types.MethodType(_stream_causal, made)
        return made

    def decoder(self, files: UpscaleFiles, device: torch.device, dtype: torch.dtype) -> Any:
        """Its decoder."""
        stored = load_file(files.decoder)
        widths = [stored[f"decoder.{index}.weight"].shape[0] for index in (1, 10, 16, 22)]
        made = self.decoders.build_tcdecoder(widths, str(device), dtype, 784)
        made.load_state_dict(stored)
        return made

    def whole(self, files: UpscaleFiles, config: WanConfig, device: torch.device, dtype: torch.dtype) -> Any:
        """Its pipeline, ready to be called."""
        pipe = self.pipeline.FlashVSRTinyPipeline(device=str(device), torch_dtype=dtype)
        pipe.dit = self.transformer(files, config)
        pipe.TCDecoder = self.decoder(files, device, dtype)
        pipe.dit.LQ_proj_in = self.projection(files)
        pipe.dit.to(device, dtype)
        pipe.init_cross_kv(load_file(files.prompt)["context"].to(device, dtype))
        return pipe


def import_public(root: Path, attend: Callable[..., Tensor] | None = None) -> PublicCode:
    """Import its modules under `public_flashvsr_code`.

    `attend` replaces its block-sparse kernel, whose arguments it gets; None: its own, or dense attention without it.
    """
    attention = "block_sparse_attn"
    if attend is not None or not _is_installed(attention):
        stand_in = types.ModuleType(attention)
        vars(stand_in)["block_sparse_attn_func"] = attend or dense_attention
        sys.modules[attention] = stand_in
        attention = "dense (PyTorch)" if attend is None else attend.__name__
    top = "public_flashvsr_code"
    for name in ("", ".models", ".pipelines", ".schedulers"):
        module = types.ModuleType(top + name)
        module.__path__ = [str(root / "diffsynth" / name.removeprefix("."))]
        sys.modules[module.__name__] = module
    for name, needed in (
        (".models.utils", ("hash_state_dict_keys",)),
        (".models.wan_video_vae", ("WanVideoVAE", "RMS_norm", "CausalConv3d", "Upsample")),
    ):
        stub = types.ModuleType(top + name)
        vars(stub).update(dict.fromkeys(needed, object))
        sys.modules[stub.__name__] = stub
    vars(sys.modules[f"{top}.models"])["ModelManager"] = object
    base = types.ModuleType(f"{top}.pipelines.base")
    vars(base)["BasePipeline"] = _BasePipeline
    sys.modules[base.__name__] = base
    network, pipeline = (
        importlib.import_module(f"{top}.{name}") for name in ("models.wan_video_dit", "pipelines.flashvsr_tiny")
    )
    folder = root / "examples/WanVSR/utils"
    tools, decoders = (_load(f"{top}_{name}", folder / f"{name}.py") for name in ("utils", "TCDecoder"))
    return PublicCode(network, pipeline, tools, decoders, attention)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a stand-in of an earlier import
        return False


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """All of `q, k, v [L, H, D]`, whatever the mask says."""
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, *others: Any, **__: object) -> Tensor:
    """What the kernel computes, by one mask of tokens: its sixth argument behind v is that of blocks `[1, H, q, k]`."""
    keep = others[4][0].repeat_interleave(128, 1).repeat_interleave(128, 2)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    shares = scores.masked_fill(~keep, float("-inf")).softmax(-1).nan_to_num(0)
    return torch.einsum("hqk,khd->qhd", shares, v)


class _BasePipeline(nn.Module):
    """What their pipeline takes of its base."""

    def __init__(self, device: str, torch_dtype: torch.dtype) -> None:
        super().__init__()
        self.device, self.torch_dtype = device, torch_dtype

    def check_resize_height_width(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def load_models_to_device(self, names: list[str]) -> None:
        pass

    def generate_noise(self, shape: tuple[int, ...], seed: int, device: str, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)


def _stream_causal(self: Any, clip: Tensor) -> list[Tensor] | None:
    """Version 1.1's `stream_forward`, which the checkout has not: convolutions see what was before the clip."""
    is_first = self.clip_idx == 0
    if is_first:
        clip = torch.cat([clip[:, :, :1].repeat(1, 1, 3, 1, 1), clip], dim=2)
    x = self.pixel_shuffle(clip)
    seen = x[:, :, -2:].clone()
    x = self.act1(self.norm1(self.conv1(x, self.cache["conv1"])))
    self.cache["conv1"] = seen
    seen = x[:, :, -2:].clone()
    if is_first:
        self.cache["conv2"], self.clip_idx = seen, 1
        return None
    x = self.act2(self.norm2(self.conv2(x, self.cache["conv2"])))
    self.cache["conv2"] = seen
    rows = x.flatten(2).transpose(1, 2)
    return [layer(rows) for layer in self.linear_layers]


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
