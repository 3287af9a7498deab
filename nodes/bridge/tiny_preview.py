"""Previews by a tiny decoder where its file is there: decoded small, in the memory that is left between two passes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image
from torch import Tensor

from ...system.device_errors import is_out_of_memory
from ...system.sizes import in_gib
from ...vae.tiny_files import TINY_FORMAT, takes_raw_latents
from ...vae.tiny_pictures import Opened, bytes_needed, in_ram, small_latent, tiny_pictures
from ...weights.files.checkpoint import CheckpointError
from . import host

logger = logging.getLogger(__name__)

FOLDER = "vae_approx"
INSTEAD = "previews are sums of the latent's channels instead"


class TinyPreview:
    """Pictures of latents by the decoder of one file, which waits in RAM: nothing of it stays on the device.

    `room` says how many bytes of the latent's device may be used now; `dtype` is what it computes in there.
    """

    def __init__(self, path: Path, latent_format: Any, dtype: torch.dtype, room: Callable[[torch.device], int]):
        self.path, self._format, self._dtype, self._room = path, latent_format, dtype, room
        self._opened: Opened | None = None

    def __call__(self, latent: Tensor) -> list[Image.Image]:
        """Pictures of the first latent of `[B, C, T, h, w]`; none where there can be none, once it was logged why."""
        try:
            if self._opened is None:
                self._opened = in_ram(TINY_FORMAT.open_file(self.path))
            return self._pictures(self._opened, latent)
        except (OSError, CheckpointError) as error:
            logger.warning("%s; %s", error, INSTEAD)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("no VRAM for previews by %s (%s); %s", self.path.name, error, INSTEAD)
        return []

    def _pictures(self, opened: Opened, latent: Tensor) -> list[Image.Image]:
        small = small_latent(latent[:1], opened.config, latent_preview.MAX_PREVIEW_RESOLUTION)
        needed, room = bytes_needed(opened, small, self._dtype), self._room(latent.device)
        if needed > room:
            free = f"{in_gib(needed)} of VRAM, and {in_gib(max(0, room))} is free"
            logger.warning("previews by %s would take %s; %s", self.path.name, free, INSTEAD)
            return []
        scaled = self._format.process_out(small) if takes_raw_latents(opened) else small
        return tiny_pictures(opened, scaled, self._dtype)


def tiny_preview(latent_format: Any, dtype: torch.dtype, room: Callable[[torch.device], int]) -> TinyPreview | None:
    """By the file in ComfyUI's `models/vae_approx` for this kind of latents; None where there is none.

    None too where ComfyUI was asked for the other kind (`--preview-method latent2rgb`).
    """
    if args.preview_method == LatentPreviewMethod.Latent2RGB:
        return None
    path = _decoder_file(getattr(latent_format, "taesd_decoder_name", None))
    return None if path is None else TinyPreview(path, latent_format, dtype, room)


def _decoder_file(name: str | None) -> Path | None:
    """The file that ComfyUI would take, or the one without "light"; of those with either name safetensors first."""
    if not name:
        return None
    files = sorted(folder_paths.get_filename_list(FOLDER), key=lambda file: not file.endswith(".safetensors"))
    for wanted in (name, name.removeprefix("light")):
        found = next((file for file in files if file.startswith(wanted)), None)
        path = None if found is None else folder_paths.get_full_path(FOLDER, found)
        if path is not None:
            return Path(path)
    return None


def room_beside(device: torch.device, vram_left: int | None) -> int:
    """Bytes of a device that are free between two passes; `vram_left` is what a budget by hand leaves of them."""
    if device.type != "cuda":
        return host.free_ram()
    free = host.free_vram(device) - host.reserved_vram()
    return free if vram_left is None else min(free, vram_left)
