"""What a LoRA file is, for people."""

from __future__ import annotations

from ..files.checkpoint import Checkpoint
from ..files.lora_keys import DOWN, split_key


def describe_lora(checkpoint: Checkpoint) -> str:
    """Its ranks, where it has low-rank pairs."""
    parts = {key: split for key in checkpoint.tensors if (split := split_key(key)) is not None}
    shapes = [checkpoint.tensors[key].shape for key, (_, part) in parts.items() if part == DOWN]
    ranks = {shape[0] for shape in shapes if shape}
    if not ranks:
        return ""
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
