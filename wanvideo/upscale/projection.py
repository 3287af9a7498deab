"""FlashVSR's view of the small video: what is added to the transformer's tokens, four frames at a time.

Source: OpenImagingLab/FlashVSR, `examples/WanVSR/utils/utils.py` (Buffer_LQ4x_Proj of version 1, Causal_LQ4x_Proj of
1.1); parameter names are theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.layers import parameter
from ...vae.files import VaeFormat
from ...weights.files.checkpoint import Checkpoint, CheckpointError

PIXELS = 16  # the side of the square that is a token
CLIP = 4  # frames of a latent one
KERNEL, STRIDE = (4, 3, 3), (2, 1, 1)
SEEN_BEFORE = 2  # frames that a convolution sees before those of its clip


@dataclass(frozen=True)
class ProjectionConfig:
    """Widths of the two convolutions and of the tokens, and how many layers get tokens of their own."""

    hidden: tuple[int, int] = (2048, 3072)
    dim: int = 1536
    num_layers: int = 1
    name: str = "FlashVSR projection"
    file_name: str = "LQ_proj_in.safetensors"

    def clip_bytes(self, height: int, width: int, itemsize: int) -> int:
        """What a clip takes on its way: padded inputs and results of both convolutions, as cuDNN lays them out too."""
        positions = (height // PIXELS + 2) * (width // PIXELS + 2)
        first = (3 * PIXELS**2) * (CLIP + SEEN_BEFORE) + 2 * self.hidden[0]
        second = self.hidden[0] * (2 + SEEN_BEFORE) + 2 * self.hidden[1]
        return 3 * positions * max(first, second) * itemsize

    def seen_bytes(self, height: int, width: int, itemsize: int) -> int:
        """What both convolutions saw last."""
        positions = (height // PIXELS) * (width // PIXELS)
        return SEEN_BEFORE * positions * (3 * PIXELS**2 + self.hidden[0]) * itemsize


# What a convolution saw last: [1, C, 2, h, w] each; none before the first clip.
Seen = tuple[Tensor, ...]


class LowQualityProjection(nn.Module):
    """Frames to tokens; keeps no state in the module."""

    def __init__(
        self, config: ProjectionConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        first, second = config.hidden
        self.conv1 = nn.Conv3d(3 * PIXELS**2, first, KERNEL, STRIDE, **factory)
        self.norm1 = ChannelNorm(first, **factory)
        self.conv2 = nn.Conv3d(first, second, KERNEL, STRIDE, **factory)
        self.norm2 = ChannelNorm(second, **factory)
        self.linear_layers = nn.ModuleList(nn.Linear(second, config.dim, **factory) for _ in range(config.num_layers))
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def begin(self, frame: Tensor, causal: bool) -> Seen:
        """What is remembered of a video's first frame `[1, 3, 1, H, W]`, which gives no tokens."""
        x = _patches(frame.to(self.dtype).expand(-1, -1, CLIP, -1, -1))
        seen = _last(x)
        return seen, _last(self._convolve(self.conv1, self.norm1, x, None if causal else seen))

    def forward(self, clip: Tensor, seen: Seen, causal: bool) -> tuple[list[Tensor], Seen]:
        """Tokens `[h w, dim]` for each layer of the next frames `[1, 3, 4, H, W]`, and what is remembered now.

        `causal` is version 1.1, whose convolutions see what was before the clip; those of version 1 see its own last
        frames there.
        """
        x = _patches(clip.to(self.dtype))
        first = _last(x)
        x = self._convolve(self.conv1, self.norm1, x, seen[0] if causal else first)
        second = _last(x)
        x = self._convolve(self.conv2, self.norm2, x, seen[1] if causal else second)
        rows = rearrange(x, "1 c t h w -> (t h w) c")
        return [layer(rows) for layer in self.linear_layers], (first, second)

    def _convolve(self, conv: nn.Conv3d, norm: ChannelNorm, x: Tensor, before: Tensor | None) -> Tensor:
        x = torch.cat([before, x], dim=2) if before is not None else F.pad(x, (0, 0, 0, 0, SEEN_BEFORE, 0), "replicate")
        x = F.pad(x, (1, 1, 1, 1, 0, 0), "replicate")
        return F.silu(norm(conv(x)))


class ChannelNorm(nn.Module):
    """Vectors over the channels divided by their root mean square, times `gamma`."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.gamma = parameter(dim, 1, 1, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.gamma.shape[0] ** 0.5) * self.gamma


def _patches(frames: Tensor) -> Tensor:
    pattern = "b c t (h hh) (w ww) -> b (c hh ww) t h w"
    return rearrange(frames, pattern, hh=PIXELS, ww=PIXELS)


def _last(x: Tensor) -> Tensor:
    return x[:, :, -SEEN_BEFORE:].clone()


# --- files ------------------------------------------------------------------------------------------------

PREFIX = "LQ_proj_in."


def infer_config(checkpoint: Checkpoint) -> ProjectionConfig:
    """Its dimensions, from shapes, which are the same in versions 1 and 1.1. CheckpointError where they do not tell."""
    shapes = checkpoint.shapes
    for name, size in (("conv1.weight", 5), ("conv2.weight", 5), ("linear_layers.0.weight", 2)):
        if len(shapes.get(name, ())) != size:
            raise CheckpointError(
                f"{checkpoint.path}: a FlashVSR projection without {name} of {size} dimensions; expected two "
                "convolutions and linear layers; download LQ_proj_in.safetensors again"
            )
    layers = sum(name.startswith("linear_layers.") and name.endswith(".weight") for name in shapes)
    hidden = shapes["conv1.weight"][0], shapes["conv2.weight"][0]
    return ProjectionConfig(hidden, shapes["linear_layers.0.weight"][0], layers)


def _own_names(names: Iterable[str]) -> dict[str, str]:
    return {name: name.removeprefix(PREFIX) for name in names}


PROJECTION_FORMAT = VaeFormat(
    title="FlashVSR's projection of the small video",
    advice="Choose LQ_proj_in.safetensors or Wan2_1_FlashVSR_LQ_proj_model_bf16.safetensors.",
    markers=tuple(
        tuple(prefix + name for name in ("conv1.weight", "norm2.gamma", "linear_layers.0.weight"))
        for prefix in ("", PREFIX)
    ),
    rename=_own_names,
    infer_config=infer_config,
    network=LowQualityProjection,
    decoder=("",),
)
