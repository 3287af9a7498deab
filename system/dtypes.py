"""The 16-bit numbers that a device computes in."""

from __future__ import annotations

import torch

FP16_ENDS = "fp16, whose numbers end at 65504"  # why something is infinite, in words


def half_dtype(device: torch.device) -> torch.dtype:
    """bf16, or fp16 on a GPU without it (before compute capability 8.0: RTX 20, GTX 16)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16
