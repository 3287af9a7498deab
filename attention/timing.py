"""Attention backends timed at a size, and what was fastest there, kept by card, versions and size."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..system.atomic_files import write_file
from ..system.bounded_json import JsonError, read_json_object
from ..system.card_profile import card_key, data_folder
from ..system.kernel_choice import cuda_seconds
from .backend import AttentionSpec, Backend

logger = logging.getLogger(__name__)

FORMAT = 1  # of the file
PACKAGES = ("flash-attn", "flash-attn-3", "sageattention", "sageattn3", "comfy-kitchen", "triton", "triton-windows")
REPEATS = 3
MOST_HEADS = 4  # a call of so many keeps every core busy at lengths that take long
MOST_BYTES = 1 << 20  # of the file


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


@dataclass(frozen=True)
class KeptChoices:
    """What was fastest at each size, in a file of the user's data folder. A damaged one is made anew."""

    versions: Mapping[str, str]

    def find(self, mode: str, spec: AttentionSpec, size: AttentionSize) -> str | None:
        """The backend's name; None where it was not timed with this card and these versions."""
        found = self._read().get(self._key(mode, spec, size))
        return found if isinstance(found, str) else None

    def keep(self, mode: str, spec: AttentionSpec, size: AttentionSize, name: str) -> None:
        """Remember it; where the file cannot be written it is timed again by the next process."""
        choices = self._read() | {self._key(mode, spec, size): name}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, json.dumps({"format": FORMAT, "choices": choices}, indent=1).encode())
        except OSError as error:
            logger.info("attention: what was fastest cannot be kept in %s (%s)", self._path, error)

    @property
    def _path(self) -> Path:
        return data_folder() / "attention.json"

    def _read(self) -> dict[str, Any]:
        try:
            data = read_json_object(self._path, MOST_BYTES)
        except (OSError, JsonError):
            return {}
        choices = data.get("choices") if data.get("format") == FORMAT else None
        return choices if isinstance(choices, dict) else {}

    def _key(self, mode: str, spec: AttentionSpec, size: AttentionSize) -> str:
        """The card, its driver and torch, packages, and the size; readable but for the versions."""
        told = {"card": asdict(card_key(spec.device)), "packages": dict(self.versions)}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        return f"{mode}, {size}, {spec.head_dim} of {spec.dtype}, {card_key(spec.device).gpu}, {digest}"


def installed_versions() -> dict[str, str]:
    """The versions of all packages that attention may run by; one that is not there is left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
