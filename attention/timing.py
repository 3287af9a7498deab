"""Attention backends timed at a size, and what was fastest there, kept by card, versions and size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..system.kept_choices import KeptChoices
from ..system.kernel_choice import cuda_seconds
from ..system.version import installed_versions
from .backend import AttentionSpec, Backend

PACKAGES = ("flash-attn", "flash-attn-3", "sageattention", "sageattn3", "comfy-kitchen", "triton", "triton-windows")
REPEATS = 3
MOST_HEADS = 4  # a call of so many keeps every core busy at lengths that take long


@dataclass(frozen=True)
class AttentionSize:
    """Self-attention of one pass: tokens of a sample, and its heads."""

    tokens: int
    num_heads: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.num_heads} heads"


def attention_seconds(backend: Backend, spec: AttentionSpec, size: AttentionSize) -> float:
    """How long a call of a few heads takes, after warming up."""
    shape = (1, size.tokens, min(MOST_HEADS, size.num_heads), spec.head_dim)
    generator = torch.Generator(spec.device).manual_seed(0)
    with torch.inference_mode():
        q, k, v = (torch.randn(shape, generator=generator, device=spec.device, dtype=spec.dtype) for _ in range(3))

        def call() -> None:
            backend.attend(q, k, v)

        if spec.device.type == "cuda":
            return cuda_seconds(call, spec.device, repeats=REPEATS)
        return statistics.median(_seconds(call) for _ in range(REPEATS))


def kept_choices(versions: Mapping[str, str]) -> KeptChoices:
    """What was fastest at each size."""
    return KeptChoices("attention", versions)


def timed_work(mode: str, spec: AttentionSpec, size: AttentionSize) -> str:
    """By which a choice is kept."""
    return f"{mode}, {size}, {spec.head_dim} of {spec.dtype}"


def attention_versions() -> dict[str, str]:
    """The versions of all packages that attention may run by."""
    return installed_versions(PACKAGES)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
