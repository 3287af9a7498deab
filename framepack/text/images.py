"""Pictures as FramePack takes them beside their latents: SigLIP's tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...video.pictures import squeezed
from ...weights.linear.adopt import load_tensors
from .checkpoint import open_siglip


class ImageEncoder:
    """A SigLIP vision model; it computes in `dtype`.

    Opening reads the header; weights are read for each `encode`. Raises CheckpointError.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        self._file = open_siglip(path)
        self._file.build()  # refuses a file that does not fit before anything runs

    @property
    def image_dim(self) -> int:
        """Width of the tokens; 1152 for so400m."""
        return self._file.config.dim

    @torch.inference_mode()
    def encode(self, picture: Tensor) -> Tensor:
        """`picture [1, 3, H, W]` in -1 ... 1, of any size -> the last hidden state `[1, 729, image_dim]`.

        It is fp32, on the CPU. ValueError for another shape.
        """
        if picture.ndim != 4 or picture.shape[:2] != (1, 3):
            raise ValueError(f"picture: expected one of shape [1, 3, height, width], got {list(picture.shape)}")
        pixels = squeezed(picture.float().cpu(), self._file.config.image_size)
        model = load_tensors(self._file.build(), self._file.checkpoint, self.device)
        return model(pixels.to(self.device), self.dtype).cpu()
