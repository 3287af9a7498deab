"""How long a call takes on a device: warmed up, the median of several, and few of those that take long."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psutil
import torch

from ..system.device_errors import is_out_of_memory
from ..system.host_memory import available_ram_bytes
from ..system.kernel_choice import brief, cuda_seconds
from ..system.sizes import in_gib
from ..system.triton_errors import triton_errors

R = TypeVar("R")

LONG_SECONDS = 4.0  # a call that takes so long is timed once
MOST_REPEATS = 199  # short calls are repeated until the card's clock is what it is in a run


def median_seconds(call: Callable[[], object], device: torch.device, most: float = 0.6) -> float:
    """Median time of a call after warming up; about `most` seconds are spent on it, at least three calls."""
    call()  # kernels are compiled and loaded
    single = _single(call, device)
    if single > LONG_SECONDS:
        return single
    repeats = max(3, min(MOST_REPEATS, int(most / max(single, 1e-6)))) | 1  # odd
    if device.type == "cuda":
        return cuda_seconds(call, device, repeats=repeats)
    return statistics.median(_single(call, device) for _ in range(repeats))


def _single(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """What the device has free, or RAM on a CPU; what PyTorch keeps for later counts as free."""
    if device.type != "cuda":
        return available_ram_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def memory_bytes(device: torch.device) -> int:
    """The card's memory, or RAM on a CPU."""
    if device.type != "cuda":
        return psutil.virtual_memory().total
    return torch.cuda.get_device_properties(device).total_memory


def attempted(measure: Callable[[], R], needed_bytes: int, device: torch.device) -> R | str:
    """What a measurement that needs so many bytes finds, or why it has no result. What it took is given back.

    It is not begun where they are not free: Windows' driver would take RAM instead, and the time would be of that.
    """
    free = free_bytes(device)
    if needed_bytes > free:
        return f"needs {in_gib(needed_bytes)} of memory, and {in_gib(free)} are free"
    try:
        return measure()
    except triton_errors() as error:
        if is_out_of_memory(error):
            return f"out of memory, with {in_gib(free)} free before"
        return brief(error)
    finally:
        if device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
