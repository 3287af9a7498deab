"""A model's weights outside its blocks: on its device during runs, or brought there in each pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from ..memory.stream.layout import TensorInfo, in_one_piece
from ..memory.stream.transient_weights import TransientWeights
from ..system.host_memory import allocate_bytes
from ..transformer.transformer import HereAlready, Transformer
from ..weights.files.checkpoint import read_bytes
from ..weights.files.read_ahead import read_ahead
from .host_weights import HostWeights, WeightParts

NUM_READERS = 8  # threads
PIECE_BYTES = 4 << 20


class FixedWeights:
    """What of a model on the meta device is neither streamed nor resident blocks; nothing is loaded at first."""

    def __init__(self, model: Transformer, weights: HostWeights, parts: WeightParts, device: torch.device):
        self._model, self._weights, self._parts, self._device = model, weights, parts, device
        self.transient: TransientWeights | None = None  # where they are brought in each pass

    @property
    def pinned_bytes(self) -> int:
        return 0 if self.transient is None else self.transient.pinned_bytes

    @property
    def host_bytes(self) -> int:
        return 0 if self.transient is None else self.transient.host_bytes

    @property
    def per_run_names(self) -> list[str]:
        """Those that are needed once per run."""
        return [name for name in self._weights.fixed_names() if name.startswith(self._parts.per_run)]

    def load_for_passes(self, brought: bool) -> None:
        """Load what passes need; with `brought`, some of it stays in host memory and is brought in each pass."""
        away = self._parts.transient if brought and self._device.type != "cpu" else ()
        if away:
            self.keep_away(away)
        names = self._weights.fixed_names()
        self.load([name for name in names if not name.startswith(away + self._parts.per_run)])

    def keep_away(self, names: Sequence[str]) -> None:
        """Bring these modules in each pass."""
        modules = {name: module for name in names if (module := getattr(self._model, name)) is not None}
        self.transient = TransientWeights(self._weights.source, modules, self._device, self._weights.budget)
        self._model.bring = self.transient

    def load(self, names: Sequence[str]) -> None:
        """Read parameters to the device; on their way there host memory has a few pieces of them."""
        with ThreadPoolExecutor(NUM_READERS) as readers:
            if self._device.type == "cpu":
                self._place(dict(zip(names, readers.map(self._weights.read_tensor, names), strict=True)))
                return
            infos = {name: self._weights.source.tensors[name] for name in names}
            self._place(in_one_piece(infos, read_ahead(self._pieces(infos), readers), self._device))

    def _pieces(self, infos: Mapping[str, TensorInfo]) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """The sizes of pieces of these tensors, and what reads them: whole ones of what is made as it is read."""
        for name, info in infos.items():
            # as blocks on the disk: a small one may be made too, such as the scale of a merged weight
            if info.nbytes <= PIECE_BYTES or not info.file.is_file():
                yield info.nbytes, partial(self._read_whole, name)
                continue
            for start in range(0, info.nbytes, PIECE_BYTES):
                nbytes = min(PIECE_BYTES, info.nbytes - start)
                yield nbytes, partial(_read_piece, info, start, nbytes)

    def _read_whole(self, name: str) -> Tensor:
        return self._weights.read_tensor(name).flatten().view(torch.uint8)

    def unload(self, names: Sequence[str] | None = None) -> None:
        """Give the memory of these, or of all and of what is brought, back; calling it again does nothing."""
        if names is None:
            self._model.bring = HereAlready()
            transient, self.transient = self.transient, None
            if transient is not None:
                transient.release()
        gone = self._weights.fixed_names() if names is None else names
        infos = {name: self._weights.source.tensors[name] for name in gone}
        self._place({name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in infos.items()})

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(tensors, strict=False, assign=True)


def _read_piece(info: TensorInfo, start: int, nbytes: int) -> Tensor:
    piece = allocate_bytes(nbytes)
    read_bytes(info.file, info.offset + start, piece, info.stamp)
    return piece
