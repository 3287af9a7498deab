"""Work of a device that is the same again and again: recorded once, then done with one call.

A step of a strip is hundreds of small operations, for which Python takes longer than a fast GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], None]

WORDS_AT_ONCE = 1 << 20  # whose sum is a number of a fingerprint


class Recorder(Protocol):
    """Records what work does on a device."""

    def record(self, work: Work) -> Work:
        """What does the work again, on the same memory; `work` itself is called, but the device does nothing yet.

        RuntimeError where the device cannot record it.
        """

    def forget(self) -> None:
        """Leave room to others, now that nothing of what was recorded is used any more; the device is waited for."""


class CudaRecorder:
    """CUDA graphs, which share one pool of memory as they run one after the other.

    What the device did before the first leaves its room to them, for which it is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # PyTorch's handle, whose type its versions name otherwise
        self._last: torch.cuda.CUDAGraph | None = None  # for a pool goes with the last graph that is in it
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Work) -> Work:
        if self._pool is None:
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Other threads may use the device meanwhile: one writes the video, one watches its memory.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # of what work ended by, which says why
                    self._end(graph)
                raise
            self._end(graph)
        self._last = graph
        return graph.replay

    def forget(self) -> None:
        self._pool = self._last = None
        torch.cuda.empty_cache()

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # PyTorch (2.11) takes itself for recording ever after, and then neither gives memory back nor reuses what
            # was copied on another stream. Where it got as far as ending that, it says so.
            with suppress(RuntimeError, AttributeError):
                for leave in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                    leave(self._stream.device_index, self._pool)
            self._pool = self._last = None
            raise


def select_recorder(device: torch.device, hip: str | None = torch.version.hip) -> Recorder | None:
    """The recorder of a device, or None where it has none that is known to work, or LOWVRAM_RECORD_STEPS=0.

    The driver's own allocator (cudaMallocAsync, ComfyUI's default) keeps the memory of recorded work outside of what
    budgets are held by and after its end; and what cuDNN times cannot be recorded.
    """
    if device.type != "cuda" or hip is not None or os.environ.get("LOWVRAM_RECORD_STEPS") == "0":
        return None
    if torch.cuda.get_allocator_backend() != "native" or torch.backends.cudnn.benchmark:
        return None
    return CudaRecorder(device)


@functools.cache
def proven_kinds(device: torch.device) -> set[Hashable]:
    """Kinds of work that this process has seen a device do as recorded, bit for bit: tried once, as kernels are."""
    return set()


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Numbers on the device that are equal where all bits of some tensors are, and otherwise only by design.

    Sums of their words of 8 bytes, each times an odd number of its own, so that no bit can change and none can move.
    Dense tensors are read where they lie, some at a time.
    """
    factors = torch.arange(1, 2 * WORDS_AT_ONCE, 2, device=tensors[0].device)
    return torch.cat([_sums(each.contiguous().view(-1).view(torch.uint8), factors) for each in tensors])


def _sums(bits: Tensor, factors: Tensor) -> Tensor:
    whole = len(bits) // 8 * 8
    parts = bits[:whole].view(torch.int64).split(len(factors)) if whole else ()
    return torch.cat([*((part * factors[: len(part)]).sum()[None] for part in parts), bits[whole:].long()])
