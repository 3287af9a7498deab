"""The files of one Wan model, and what tells one run of them from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..weights.files.fingerprint import fingerprint
from ..weights.lora.file import LoraChoice
from ..weights.lora.fingerprint import lora_fingerprint
from .request import WanRequest
from .streamed import StreamedWan

PATHS = ("image", "end_image", "control", "reference", "control_fps")  # of a request, whose pictures count instead


@dataclass(frozen=True)
class WanFiles:
    """The checkpoint files of one model; `model_low` is the low-noise expert of Wan 2.2 A14B.

    `loras` are those of the model, `loras_low` those of the low-noise expert; likewise `vace_module` and
    `vace_module_low`, files of VACE's blocks. `clip_vision` is for models that read CLIP's features of pictures;
    `decoder` is a tiny one that makes a draft in place of the VAE's.
    """

    model: Path
    text_encoder: Path
    vae: Path
    model_low: Path | None = None
    loras: tuple[LoraChoice, ...] = ()
    loras_low: tuple[LoraChoice, ...] = ()
    vace_module: Path | None = None
    vace_module_low: Path | None = None
    clip_vision: Path | None = None
    decoder: Path | None = None


def run_settings(
    files: WanFiles, models: Sequence[StreamedWan], request: WanRequest, pictures: Sequence[Tensor | None]
) -> dict[str, Any]:
    """All that the latents of a completed request depend on: JSON values, and the pictures as they were read.

    CheckpointError where a file cannot be read.
    """
    asked = {name: value for name, value in asdict(request).items() if name not in PATHS}
    loras = [files.loras, files.loras_low]
    return {
        "family": "wan",
        "request": asked,
        "pictures": list(pictures),
        "models": [
            {
                "fingerprint": fingerprint(model.checkpoint.path),
                "loras": [[lora_fingerprint(lora.path), lora.strength] for lora in choices],
                "arithmetic": model.arithmetic,
                **({"vace_module": fingerprint(model.vace_module)} if model.vace_module else {}),
            }
            for model, choices in zip(models, loras, strict=False)
        ],
        "text_encoder": fingerprint(files.text_encoder),
        "vae": fingerprint(files.vae) if any(picture is not None for picture in pictures) else None,
        "clip_vision": None if files.clip_vision is None else fingerprint(files.clip_vision),
    }
