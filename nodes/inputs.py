"""What several nodes ask for."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from .bridge.patcher import StreamedModelPatcher

LOADERS = "Load Wan Video Model or Load FramePack Model (Low VRAM)"
ADVANCED = {"advanced": True}  # `extra_dict` of a widget that is folded away


def model_input(more: str = "") -> io.Input:
    """A MODEL of our loaders; its tooltip says `more`."""
    return io.Model.Input("model", tooltip=f"A MODEL of {LOADERS}{more}.")


def latent_input() -> io.Input:
    """A LATENT of our models, to be decoded."""
    return io.Latent.Input("samples", tooltip="The latent of a Wan or FramePack model.")


def vae_input() -> io.Input:
    """The VAE of one of our models."""
    return io.Vae.Input(
        "vae",
        tooltip="wan_2.1_vae for Wan 2.1 and 2.2 14B, wan2.2_vae for TI2V 5B, hunyuan_video_vae_bf16 for FramePack.",
    )


def tile_input(
    tooltip: str = "0: whole frames if they fit, else strips of rows, which are as exact. Else the side of tiles in "
    "pixels, which blend into each other; FramePack's video takes tiles by itself.",
) -> io.Input:
    """How large the parts are in which a VAE works."""
    return io.Int.Input("tile_size", default=0, min=0, max=4096, step=32, tooltip=tooltip)


def keep_latent_input(extra_dict: dict[str, Any] | None = None) -> io.Input:
    """Whether a latent is saved before it is decoded (`save_latent`)."""
    return io.Boolean.Input(
        "keep_latent", default=True,
        tooltip="Saves the latent to output/latents before decoding, so that nothing is lost if that fails. Copy it to "
        "the input folder for Load Latent.", extra_dict=extra_dict,
    )  # fmt: skip


def streamed_model(model: Any, node: str) -> StreamedModelPatcher:
    """The MODEL as ours; ValueError for one of ComfyUI's own loaders."""
    if isinstance(model, StreamedModelPatcher):
        return model
    raise ValueError(
        f"{node} works on models of {LOADERS}; this one comes from another loader, whose weights ComfyUI streams by "
        "itself: load the file with one of those, or take this one out"
    )


def check_numbers(**values: float) -> None:
    """ValueError, by the widget's name, for NaN and infinity, which ComfyUI's own check of a range lets by."""
    for name, value in values.items():
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value}: use a number from 0 up")
