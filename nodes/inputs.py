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
