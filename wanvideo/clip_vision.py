"""CLIP's vision model: what Wan 2.1's image-to-video models see of a picture beside its latents.

Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020; parameter names are those of Hugging Face's
`CLIPVisionModel`, without `vision_model.`. Wan reads the tokens before the last layer (Wan2.1 `wan/modules/clip.py`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..transformer.clip_layers import LayerNorm, Layers, LayerSizes, Rows
from ..transformer.layers import parameter
from ..video.pictures import squeezed
from ..weights.files.checkpoint import Checkpoint, CheckpointError
from ..weights.files.dimensions import Dimensions
from ..weights.files.kinds import file_kind
from ..weights.files.open import open_checkpoint
from ..weights.linear.adopt import adopt_tensors, load_tensors
from ..weights.linear.dialects import plain_dialect

TITLE, FILE_NAME = "a CLIP vision model", "clip_vision_h.safetensors"
MARK = "embeddings.class_embedding"
UNUSED = re.compile(r"post_layernorm\..+|.*position_ids")
HEAD_DIMS = {1280: 80}  # ViT-H; those of all others are 64
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures


@dataclass(frozen=True)
class ClipVisionConfig:
    """Dimensions of a CLIP vision model; the defaults are ViT-H's. `num_layers` run: all but the last."""

    dim: int = 1280
    ffn_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 31
    image_size: int = 224
    patch_size: int = 14
    eps: float = 1e-5


class ClipVisionEncoder:
    """A CLIP vision model in a file; it computes in `dtype`.

    Opening reads the header; weights are read for each `encode`. Raises CheckpointError.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.config, self._checkpoint = open_clip_vision(path)
        self._build()  # refuses a file that does not fit before anything runs

    @torch.inference_mode()
    def encode(self, pictures: Tensor) -> Tensor:
        """Tokens `[B, 257, dim]`, fp32 on the CPU, of `pictures [B, 3, H, W]` in -1 ... 1, squeezed to a square."""
        shown = (squeezed(pictures.float().cpu(), self.config.image_size) + 1.0) / 2.0
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        model = load_tensors(self._build(), self._checkpoint, self.device)
        return model(((shown - mean) / std).to(self.device), self.dtype).cpu()

    def _build(self) -> ClipVisionModel:
        with torch.device("meta"):
            model = ClipVisionModel(self.config)
        return adopt_tensors(model, self._checkpoint, TITLE, FILE_NAME)


class ClipVisionModel(nn.Module):
    """A vision transformer with a class token, up to the layer before the last."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        sizes = LayerSizes(config.dim, config.ffn_dim, config.num_heads, config.eps)
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.dim, config.eps)
        self.encoder = Layers(config.num_layers, sizes, F.gelu)

    def forward(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`pixels [B, 3, image_size, image_size]`, normalised -> tokens `[B, 1 + patches, dim]`, fp32."""
        x = self.pre_layrnorm(self.embeddings(pixels), torch.float32)
        for layer in self.encoder.layers:
            x = layer(x, dtype)
        return x


class PatchEmbeddings(nn.Module):
    """A class token and the patches, with their places added."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.class_embedding = parameter(config.dim)
        self.patch_embedding = PatchConvolution(config)
        self.position_embedding = Rows(1 + (config.image_size // config.patch_size) ** 2, config.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        weight = self.patch_embedding.weight.float()
        patches = F.conv2d(pixels.float(), weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        first = self.class_embedding.float().expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight.float()


class PatchConvolution(nn.Module):
    """A convolution whose kernel is its stride, without a bias."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.weight = parameter(config.dim, 3, config.patch_size, config.patch_size)


def open_clip_vision(path: Path) -> tuple[ClipVisionConfig, Checkpoint]:
    """Read the header of a CLIP vision model; Hugging Face's names with any prefix. Raises CheckpointError."""
    checkpoint = open_checkpoint(path)
    prefix = next((name.removesuffix(MARK) for name in checkpoint.tensors if name.endswith(MARK)), None)
    if prefix is None:
        title = file_kind(checkpoint.tensors).title
        layout = " in another layout" if title == TITLE else ""
        raise CheckpointError(
            f"{checkpoint.path}: this is {title}{layout}; expected {TITLE} as Hugging Face names it; choose {FILE_NAME}"
        )
    bare = {name: name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)}
    num_layers = Dimensions(checkpoint.renamed(bare), TITLE).num_blocks("encoder.layers") - 1
    unused = re.compile(rf"{UNUSED.pattern}|encoder\.layers\.{num_layers}\..+")
    names: dict[str, str | None] = dict.fromkeys(checkpoint.tensors)
    names |= {name: ours for name, ours in bare.items() if not unused.fullmatch(ours)}
    checkpoint = plain_dialect(checkpoint.renamed(names), names)
    sizes = Dimensions(checkpoint, TITLE)
    dim, _, patch_size, _ = sizes.shape("embeddings.patch_embedding.weight", 4)
    num_positions = sizes.shape("embeddings.position_embedding.weight", 2)[0]
    config = ClipVisionConfig(
        dim=dim,
        ffn_dim=sizes.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_heads=max(1, dim // HEAD_DIMS.get(dim, 64)),
        num_layers=num_layers,
        image_size=math.isqrt(num_positions - 1) * patch_size,
        patch_size=patch_size,
    )
    return config, checkpoint
