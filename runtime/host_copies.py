"""Tensors that a thread looks at or writes, without the device or its caller waiting."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from safetensors import SafetensorError
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_PENDING = 2  # copies that wait for the disk: with more, the run waits


class HostCopy:
    """Copies in host memory of tensors as they are now; whoever wants them waits for the device in `wait`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._copies = {name: _begin_copy(tensor) for name, tensor in tensors.items()}
        self._copied: torch.cuda.Event | None = None
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        if devices:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(devices.pop()))

    @property
    def there(self) -> bool:
        """Whether `wait` returns at once."""
        return self._copied is None or self._copied.query()

    def wait(self) -> dict[str, Tensor]:
        """The copies, once the device has made them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copies


def _begin_copy(tensor: Tensor) -> Tensor:
    """On the tensor's own stream: what is written into it afterwards is not in the copy."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.clone(memory_format=torch.contiguous_format)
    try:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # nothing more can be pinned: the copy then waits for the device
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor, non_blocking=True)


class BackgroundWriter:
    """Does what it is given in order, in a thread; after a failure, which is logged once, nothing more (`fault`)."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self._thread: ThreadPoolExecutor | None = None  # once there is something to do
        self._pending: deque[Future[None]] = deque()

    def submit(self, write: Callable[[], None]) -> None:
        """Have `write` done soon. Waits while much is pending."""
        if self.fault is not None:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="step-record")
        while len(self._pending) >= MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._do, write))

    def flush(self) -> None:
        """Wait until all is done."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """`flush`, and end the thread; calling it again does nothing."""
        self.flush()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()

    def _do(self, write: Callable[[], None]) -> None:
        if self.fault is not None:
            return
        try:
            write()
        except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
            self.fault = error
            logger.warning("no more steps of this run can be kept (%s): it goes on without", error)
