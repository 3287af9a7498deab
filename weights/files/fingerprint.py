"""Whether a model file is the one that it was: by its header, its size, its time and samples of its bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .checkpoint import CheckpointError, TensorInfo, unreadable
from .open import open_checkpoint

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(path: Path) -> str:
    """SHA-256, in hex, of a checkpoint's tensors by name, form and place, of the first bytes of 64 of them, and of its
    files' sizes and times of change to the nanosecond: files of gigabytes are not read for it.

    A file that was moved or renamed is the same; one that was written anew is another, also where its samples are
    equal. CheckpointError where the file cannot be read.
    """
    tensors = open_checkpoint(path).tensors
    digest = hashlib.sha256()
    for name, info in sorted(tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.quant} {info.offset} {info.nbytes}\n".encode())
    by_place = sorted(tensors.values(), key=lambda info: (str(info.file), info.offset))
    try:
        for file in sorted({info.file for info in tensors.values()}):
            stat = file.stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
        for info in by_place[:: max(1, len(by_place) // NUM_SAMPLES)]:
            digest.update(_first_bytes(info))
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    return digest.hexdigest()


def _first_bytes(info: TensorInfo) -> bytes:
    with info.file.open("rb") as file:
        file.seek(info.offset)
        return file.read(min(info.nbytes, SAMPLE_BYTES))
