"""Weights and scales that are made together, whichever of a pair is read first."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

from torch import Tensor

from ...system.host_memory import allocate_bytes

KEPT_BYTES = 64 << 20  # of weights whose scale was read first; one is kept however large

Make = Callable[[Tensor], Tensor]  # writes a weight's bytes to what it is given, returns the scale


class MadePairs:
    """Makes each pair once, for any number of threads: a scale that is wanted meanwhile waits for its weight.

    Scales are kept. A weight that was made for its scale's sake is kept until it is read, the latest few of them.
    """

    def __init__(self) -> None:
        self._scales: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # oldest first
        self._lock = threading.Lock()
        self._in_work: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def read_weight(self, layer: str, out: Tensor, make: Make) -> None:
        """Write the layer's weight to `out [bytes]`."""
        with self._working_on(layer):
            with self._lock:
                made = self._weights.pop(layer, None)
            if made is not None:
                out.copy_(made)
            else:
                self._scales[layer] = make(out)

    def read_scale(self, layer: str, out: Tensor, weight_bytes: int, make: Make) -> None:
        """Write the layer's scale to `out [bytes]`."""
        with self._working_on(layer):
            if layer not in self._scales:
                weight = allocate_bytes(weight_bytes)
                self._scales[layer] = make(weight)
                self._keep(layer, weight)
            out.copy_(self._scales[layer].flatten().view(out.dtype))

    def _working_on(self, layer: str) -> threading.Lock:
        with self._lock:
            return self._in_work[layer]

    def _keep(self, layer: str, weight: Tensor) -> None:
        with self._lock:
            self._weights[layer] = weight
            while len(self._weights) > 1 and sum(each.numel() for each in self._weights.values()) > KEPT_BYTES:
                del self._weights[next(iter(self._weights))]
