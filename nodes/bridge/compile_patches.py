"""Core's and KJNodes' torch.compile of a MODEL, as our own settings.

They would have the whole network traced, its planning and reading too. What they set is heard: our blocks are compiled
one by one, as Torch Compile Settings (Low VRAM) does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...compilation.settings import BACKENDS, CompileSettings

COMPILE_KEY = "torch.compile"  # of their wrapper around `apply_model`
OPTION = "torch_compile_kwargs"


def compile_settings(model_options: Mapping[str, Any]) -> CompileSettings | None:
    """Our settings for what a node set; None where none did. ValueError for a backend that we do not know."""
    given = model_options.get(OPTION)
    if given is None:
        return None
    backend = given.get("backend")
    if backend not in BACKENDS:
        raise ValueError(
            f"a node compiles this model with the backend {backend!r}, which is not supported by the LowVRAM loader: "
            f"use Torch Compile Settings (Low VRAM), with {', '.join(BACKENDS)}"
        )
    settings = CompileSettings(
        backend=backend,
        fullgraph=bool(given.get("fullgraph", False)),
        mode=given.get("mode") or "default",
        dynamic=given.get("dynamic"),
    )
    settings.check()
    return settings
