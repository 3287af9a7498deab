"""Opening a model file by its type."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ...system.regular_files import is_there
from .checkpoint import Checkpoint, CheckpointError
from .gguf import open_gguf
from .safetensors import model_in_folder, open_index, open_safetensors


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model file by reading its header only.

    `path` is a `.safetensors` file, one of its shards (`x-00001-of-00003.safetensors`), an
    `x.safetensors.index.json`, or a folder that holds one of these. Raises CheckpointError.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = model_in_folder(path)
    if not is_there(path):
        raise CheckpointError(f"{path}: no such file; expected a .safetensors model; check the name and folder")
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise CheckpointError(
            f"{path}: the file type {path.suffix or '(none)'!r} is not known; "
            f"expected {', '.join(OPENERS)}; choose a .safetensors file"
        )
    return opener(path)


def _refuse_pickle(path: Path) -> Checkpoint:
    raise CheckpointError(
        f"{path}: a PyTorch pickle, which can run code when opened; expected safetensors; download the "
        ".safetensors version, or convert it where you trust it: "
        "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)`"
    )


# A new file type is one line here.
OPENERS: Mapping[str, Callable[[Path], Checkpoint]] = {
    ".safetensors": open_safetensors,
    ".sft": open_safetensors,
    ".json": open_index,
    ".gguf": open_gguf,
    ".pth": _refuse_pickle,
    ".pt": _refuse_pickle,
    ".bin": _refuse_pickle,
    ".ckpt": _refuse_pickle,
}
