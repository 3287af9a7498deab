"""ComfyUI-LowVRAM-Video: Wan video on small graphics cards."""

from __future__ import annotations

from typing import Any

from .system.log_text import log_plainly

log_plainly(__name__)

WEB_DIRECTORY = "./web"  # ComfyUI serves the nodes' help pages, web/docs/<node id>.md, from here


async def comfy_entrypoint() -> Any:
    """ComfyUI's entry to the nodes; the engine and the command line never come this way."""
    from .nodes import LowVRAMExtension

    return LowVRAMExtension()
