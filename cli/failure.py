"""What ends a command, in words that say what to do."""

from __future__ import annotations

from ..system.device_errors import is_out_of_memory


def failure(error: Exception) -> str | None:
    """What to tell the user of an error; None for one that is a fault of the program's."""
    if isinstance(error, MemoryError):
        return str(error) or "out of RAM: close other programs, or give a smaller --ram-budget"
    if isinstance(error, ValueError | OSError):
        return str(error)
    if not is_out_of_memory(error):
        return None
    problem = f"the GPU ran out of memory ({str(error).splitlines()[0]})"
    return f"{problem}: close what else uses it, or make a smaller or shorter video (FramePack: --window)"
