"""Encoders that run once: their layers read from the file in their turn, and of their token tables single rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo, read_bytes
from ..weights.files.read_ahead import AHEAD_BYTES, read_ahead
from ..weights.linear.formats import format_for
from ..weights.linear.kitchen import KitchenFormat


class LayerReader:
    """Hands out the layers of a model on the meta device, each with its weights on `device` for its turn.

    `stem` and a number name the layers in the checkpoint. What has worked is dropped, and a little is read ahead: host
    memory holds two tensors or so, on a CPU beside the layer that works, and nothing is copied back from the device.
    With `keep` all stay in host memory as stored, for another pass. Calls raise CheckpointError.
    """

    def __init__(self, checkpoint: Checkpoint, stem: str, device: torch.device, keep: bool = False):
        self.checkpoint, self.stem, self.device = checkpoint, stem, device
        self._names = _names_by_layer(checkpoint, stem)
        sizes = (sum(checkpoint.tensors[name].nbytes for name in names) for names in self._names.values())
        self._ahead_bytes = min(AHEAD_BYTES, max(sizes, default=0))
        self._kept: dict[str, Tensor] | None = {} if keep else None

    def __call__(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        with (
            ThreadPoolExecutor(max_workers=1) as reader,
            closing(read_ahead(self._jobs(), reader, self._ahead_bytes)) as tensors,
        ):
            for number, layer in enumerate(layers):
                prefix = f"{self.stem}.{number}."
                try:  # also where the device has room for a part of it
                    weights = {name.removeprefix(prefix): next(tensors).to(self.device) for name in self._names[number]}
                    layer.load_state_dict(weights, assign=True)
                    del weights
                    yield layer
                finally:
                    layer.to("meta")

    def _jobs(self) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        for number in sorted(self._names):
            for name in self._names[number]:
                is_kept = self._kept is not None and name in self._kept
                yield 0 if is_kept else self.checkpoint.tensors[name].nbytes, partial(self._read, name)

    def _read(self, name: str) -> Tensor:
        if self._kept is None:
            return self.checkpoint.read(name)
        if name not in self._kept:
            self._kept[name] = self.checkpoint.read(name)
        return self._kept[name]


def _names_by_layer(checkpoint: Checkpoint, stem: str) -> Mapping[int, list[str]]:
    """Names in the order of the file, which is the fastest way through it."""
    names: dict[int, list[str]] = {}
    for info in sorted(checkpoint.tensors.values(), key=lambda info: (str(info.file), info.offset)):
        if info.name.startswith(stem + "."):
            names.setdefault(int(info.name[len(stem) + 1 :].partition(".")[0]), []).append(info.name)
    return names


@dataclass(frozen=True)
class TokenTable:
    """A table of token embeddings in a file, of which rows are read one by one."""

    checkpoint: Checkpoint
    name: str

    @property
    def num_rows(self) -> int:
        return self.checkpoint.tensors[self.name].shape[0]

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `[*ids.shape, dim]` of `ids`, fp32 on the CPU."""
        wanted, places = ids.cpu().unique(return_inverse=True)
        info = self.checkpoint.tensors[self.name]
        packed = {"weight": self._read_rows(info, wanted)}
        scale = self.checkpoint.tensors.get(_scale_name(self.name))
        if scale is not None:
            scales = self.checkpoint.read(scale.name).reshape(-1, 1)
            packed["weight_scale"] = scales[wanted] if len(scales) == info.shape[0] else scales[0]
        return format_for(info).dequantize(packed, torch.float32)[places]

    def _read_rows(self, info: TensorInfo, wanted: Tensor) -> Tensor:
        row_bytes = info.nbytes // info.shape[0]
        rows = torch.empty(len(wanted), row_bytes, dtype=torch.uint8)
        for row, out in zip(wanted.tolist(), rows, strict=True):
            read_bytes(info.file, info.offset + row * row_bytes, out, info.stamp)
        return rows.view(info.dtype)


def without_table(checkpoint: Checkpoint, name: str) -> tuple[Checkpoint, TokenTable]:
    """A model's tensors, and its token table apart. CheckpointError where no rows can be read of the table."""
    layer = name.removesuffix(".weight")
    beside = {other for other in checkpoint.tensors if other.rpartition(".")[0] == layer}
    info, known = checkpoint.tensors[name], {name, _scale_name(name)}
    if beside - known or isinstance(format_for(info), KitchenFormat):
        raise CheckpointError(
            f"{checkpoint.path}: its token embeddings {name} are stored as {info.quant or info.dtype}; expected plain, "
            "fp8, int8 or GGUF ones; choose the fp8 scaled version of the encoder"
        )
    apart = Checkpoint(checkpoint.path, {name: checkpoint.tensors[name] for name in beside}, checkpoint.metadata)
    return checkpoint.renamed(dict.fromkeys(beside)), TokenTable(apart, name)


def _scale_name(table: str) -> str:
    return f"{table.removesuffix('.weight')}.weight_scale"
