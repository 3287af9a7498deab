"""Encoders that run once: their layers read from the file in their turn, and of their token tables single rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ..weights.linear.formats import format_for
from ..weights.linear.kitchen import KitchenFormat


class LayerReader:
    """Hands out the layers of a model on the meta device, each with its weights on `device` for its turn.

    `stem` and a number name the layers in the checkpoint. The next one is read while one works, and what has worked is
    dropped, so that host memory holds two at most and nothing is copied back from the device; with `keep` it stays in
    host memory as stored, for another pass. Calls raise CheckpointError.
    """

    def __init__(self, checkpoint: Checkpoint, stem: str, device: torch.device, keep: bool = False):
        self.checkpoint, self.stem, self.device = checkpoint, stem, device
        self._names = _names_by_layer(checkpoint, stem)
        self._kept: dict[int, dict[str, Tensor]] | None = {} if keep else None

    def __call__(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        with ThreadPoolExecutor(max_workers=1) as reader:

            def read(number: int) -> Future[dict[str, Tensor]] | None:
                return reader.submit(self._read, number) if number in self._names else None

            pending = read(0)
            for number, layer in enumerate(layers):
                assert pending is not None
                weights, pending = pending.result(), read(number + 1)
                try:  # also where the device has room for a part of it
                    layer.load_state_dict({name: each.to(self.device) for name, each in weights.items()}, assign=True)
                    del weights
                    yield layer
                finally:
                    layer.to("meta")

    def _read(self, number: int) -> dict[str, Tensor]:
        """The layer's tensors by their names in it."""
        if self._kept is not None and number in self._kept:
            return self._kept[number]
        prefix = f"{self.stem}.{number}."
        weights = {name.removeprefix(prefix): self.checkpoint.read(name) for name in self._names[number]}
        if self._kept is not None:
            self._kept[number] = weights
        return weights


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
        places = {
            str(row): replace(info, name=str(row), offset=info.offset + row * row_bytes, nbytes=row_bytes)
            for row in wanted.tolist()
        }
        source = Checkpoint(self.checkpoint.path, places, {})
        for name, out in zip(places, rows, strict=True):
            source.read_into(name, out)
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
