"""Work of a device that is the same again and again: recorded once, then done with one call.

A step of a strip is hundreds of small operations, for which Python takes longer than a fast GPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

Work = Callable[[], None]


class Recorder(Protocol):
    """Records what work does on a device."""

    def record(self, work: Work) -> Work:
        """What does the work again, on the same memory; `work` itself is called, but the device does nothing yet.

        RuntimeError where the device cannot record it.
        """


class CudaRecorder:
    """CUDA graphs, which share one pool of memory as they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # PyTorch's handle, whose type its versions name otherwise
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Work) -> Work:
        if self._pool is None:
            torch.cuda.empty_cache()  # what the device did so far leaves its room to the pool
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Other threads may use the device meanwhile: one writes the video, one watches its memory.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


def select_recorder(device: torch.device, hip: str | None = torch.version.hip) -> Recorder | None:
    """The recorder of a device, where it has one and LOWVRAM_RECORD_STEPS=1 asks for it; else None.

    On an H200 strips took half the time with it, but it has yet to be compared there, bit for bit, with the calls.
    """
    wanted = os.environ.get("LOWVRAM_RECORD_STEPS") == "1"
    return CudaRecorder(device) if wanted and device.type == "cuda" and hip is None else None


class Replays:
    """Work that comes again under the same key: done, and from its second time on as it was recorded.

    Where recording fails all of it is done call by call from then on.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._recorded: dict[object, Work] = {}

    @property
    def records(self) -> bool:
        return self._recorder is not None

    def do(self, key: object, work: Callable[[], Work]) -> None:
        """Do what `work` gives, which must do the same on the same memory whenever the key is the same."""
        play = self._recorded.get(key)
        if play is None:
            play = self._record(key, work())
        play()

    def _record(self, key: object, work: Work) -> Work:
        if self._recorder is None:
            return work
        try:
            self._recorded[key] = self._recorder.record(work)
        except RuntimeError as error:
            logger.warning("steps of the VAE are not recorded: %s", error)
            self._recorder = None
            self._recorded.clear()  # whoever called them has not noted what they did
            return work
        return self._recorded[key]
