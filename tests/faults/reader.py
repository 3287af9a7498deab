"""A reader of files: how a mutated one is made, and what reads it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lowvram_video.families.identify import describe, identify
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.weights.files.open import open_checkpoint

CPU = torch.device("cpu")
SETTINGS = RunSettings(dtype=torch.bfloat16, device=CPU)
SMALL_BYTES = 2**20

Make = Callable[[Path, random.Random], Path]  # (folder, draw) -> the mutated file, or what is opened
Read = Callable[[Path], Any]


class NonFinite(Exception):
    """What is wrong was accepted: numbers that are none, or those of another."""


@dataclass(frozen=True)
class Reader:
    """`make` writes a mutated file into a folder, each of `reads` reads it."""

    make: Make
    reads: tuple[Read, ...]


def mutated(path: Path, mutate: Callable[[bytes, random.Random], bytes]) -> Make:
    """Makes files of this one."""
    raw = path.read_bytes()

    def make(folder: Path, draw: random.Random) -> Path:
        return put(folder / f"m{path.suffix}", mutate(raw, draw))

    return make


def put(path: Path, data: bytes) -> Path:
    """The file, written."""
    path.write_bytes(data)
    return path


def inspect(path: Path) -> None:
    """As the command, and the bytes of all small tensors."""
    checkpoint = open_checkpoint(path)
    describe(identify(checkpoint)).encode()
    for name, info in checkpoint.tensors.items():
        if info.nbytes < SMALL_BYTES:
            checkpoint.read(name)
