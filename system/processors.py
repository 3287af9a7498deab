"""How many multiprocessors a GPU has."""

from __future__ import annotations

import torch


def processors_of(device: torch.device) -> int | None:
    """The number of a GPU's multiprocessors; None for a device that is none, or is not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
