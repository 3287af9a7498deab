"""How many multiprocessors a GPU has, and what they run at a time."""

from __future__ import annotations

import torch

ASSUMED_THREADS = 132 * 2048


def processors_of(device: torch.device) -> int | None:
    """The number of a GPU's multiprocessors; None for a device that is none, or is not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def threads_of(device: torch.device) -> int:
    """How many threads a GPU runs at a time; those of an H200, which has many, for a device that is not here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ASSUMED_THREADS
    card = torch.cuda.get_device_properties(device)
    return int(card.multi_processor_count * card.max_threads_per_multi_processor)
