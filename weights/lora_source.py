"""LoRAs on a model: beside its linear layers, or merged into its weights as they are read."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..host_memory import allocate_bytes
from .formats import format_for
from .linear import Linear, WeightFormat
from .lora import Difference, Lora, LowRankPair
from .lora_merge import can_requantize, merge_difference_, merge_pair_, requantize
from .low_rank import DOWN, SCALE, UP
from .low_rank_ops import select_low_rank_ops
from .reader import CheckpointError, TensorInfo

logger = logging.getLogger(__name__)

# "auto": low-rank pairs run beside linear layers, the rest is merged. "side": what would be merged is refused, so that
# strengths are free to change. "merge": everything is merged, which costs nothing per step but rounds to the weights.
LORA_MODES = ("auto", "side", "merge")


class Source(Protocol):
    """A model's stored tensors, such as a Checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_into(self, name: str, out: Tensor) -> None: ...


@dataclass(frozen=True)
class Change:
    """What one LoRA, by its number, merges into one tensor: a pair or a difference."""

    number: int
    what: LowRankPair | Difference


@dataclass(frozen=True)
class Share:
    """One LoRA's part, by its number, of a layer's low-rank update."""

    number: int
    pair: LowRankPair


class AttachedLoras:
    """LoRAs on one model (on the meta device, its formats assigned), which gets their tensors as parameters.

    Beside a linear layer, all its pairs are one: `<layer>.lora_down [R, in]` and `.lora_up [out, R]`, in `dtype`, which
    travel with the layer, and `.lora_scale [R]`, a view of one small tensor that stays on the device. CheckpointError
    where a LoRA would have to be merged and cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        loras: Sequence[Lora],
        strengths: Sequence[float],
        dtype: torch.dtype,
        mode: str = "auto",
    ):
        if mode not in LORA_MODES:
            raise ValueError(f"lora_mode is {mode!r}; expected one of {', '.join(LORA_MODES)}")
        self.loras, self.strengths = tuple(loras), tuple(strengths)
        self._model, self._origin, self._dtype = model, source, dtype
        self._shares: dict[str, tuple[Share, ...]] = {}
        self._changes: dict[str, tuple[Change, ...]] = {}
        self._sort(mode)
        self._check_merged(mode)
        for layer in self._shares:
            for leaf in (DOWN, UP):
                self._register(layer, leaf)
        self._scale = torch.empty(0)
        self.place(torch.device("cpu"))
        if self._changes and self.loras:
            logger.info("LoRA: %d tensors are merged as they are read.", len(self._changes))

    @property
    def are_merged(self) -> bool:
        """Whether anything is merged: then other strengths take another `source()`."""
        return bool(self._changes)

    def source(self) -> LoraSource:
        """The model's tensors with the LoRAs, at the strengths of now."""
        layers = {}
        for name, changes in self._changes.items():
            layer = name.rpartition(".")[0] if name.endswith(".weight") else name
            layers[layer] = MergedTensor(name, self._format(name), changes)
        return LoraSource(self._origin, self.loras, self.strengths, self._shares, self._dtype, layers)

    def place(self, device: torch.device) -> None:
        """Have the strengths on the device where the layers run, and what is fastest there beside them."""
        with torch.inference_mode(False):  # changed from outside later
            self._scale = self._scales().to(device)
        parts = self._scale.split([sum(share.pair.rank for share in shares) for shares in self._shares.values()])
        for layer, part in zip(self._shares, parts, strict=True):
            module = self._model.get_submodule(layer)
            assert isinstance(module, Linear), "sorted so"
            module.register_buffer(SCALE, part, persistent=False)
            module.low_rank_ops = select_low_rank_ops(device)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Other strengths, one per LoRA, from the next product on: new numbers in the same tensor.

        What is merged has them only in a new `source()`.
        """
        if len(strengths) != len(self.loras):
            raise ValueError(f"{len(strengths)} strengths for {len(self.loras)} LoRAs; expected one for each")
        self.strengths = tuple(strengths)
        self._scale.copy_(self._scales())

    def detach(self) -> None:
        """Take the parameters off the model again."""
        for layer in self._shares:
            module = self._model.get_submodule(layer)
            for leaf in (DOWN, UP, SCALE):
                delattr(module, leaf)
        self._shares = {}

    def _scales(self) -> Tensor:
        """fp32, one per rank of every layer in turn."""
        values: list[Tensor] = [torch.empty(0)]
        for shares in self._shares.values():
            values += [
                torch.full((share.pair.rank,), share.pair.scale * self.strengths[share.number]) for share in shares
            ]
        return torch.cat(values)

    def _sort(self, mode: str) -> None:
        shares: defaultdict[str, list[Share]] = defaultdict(list)
        changes: defaultdict[str, list[Change]] = defaultdict(list)
        linear = {name for name, module in self._model.named_modules() if isinstance(module, Linear)}
        for number, lora in enumerate(self.loras):
            for layer, pair in lora.pairs.items():
                if mode != "merge" and pair.magnitude is None and layer in linear:
                    shares[layer].append(Share(number, pair))
                else:
                    changes[f"{layer}.weight"].append(Change(number, pair))
            for name, difference in lora.differences.items():
                changes[name].append(Change(number, difference))
        self._shares = {layer: tuple(found) for layer, found in shares.items()}
        self._changes = {name: tuple(found) for name, found in changes.items()}

    def _check_merged(self, mode: str) -> None:
        for name, changes in self._changes.items():
            path = self.loras[changes[0].number].checkpoint.path
            info = self._origin.tensors[name]
            if mode == "side":
                raise CheckpointError(
                    f"{path}: what it has for {name} can only be merged; expected low-rank pairs of linear layers "
                    "with lora_mode side; choose lora_mode auto"
                )
            if not can_requantize(self._format(name), info.dtype):
                stored = info.quant or str(info.dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"{path}: what it has for {name} must be merged, which cannot be done into {stored}; expected "
                    "weights in bf16, fp16, fp8 or int8; use such a file of the model, or leave this LoRA out"
                )

    def _format(self, name: str) -> WeightFormat:
        layer, _, leaf = name.rpartition(".")
        beside = self._origin.tensors.get(f"{layer}.weight_scale")
        is_scaled = leaf == "weight" and beside is not None
        return format_for(self._origin.tensors[name], {"weight_scale": beside} if is_scaled and beside else {})

    def _register(self, layer: str, leaf: str) -> None:
        info = side_info(self._origin, layer, leaf, self._shares[layer], self._dtype)
        meta = torch.empty(info.shape, dtype=info.dtype, device="meta")
        self._model.get_submodule(layer).register_parameter(leaf, nn.Parameter(meta, requires_grad=False))


@dataclass(frozen=True)
class MergedTensor:
    """A tensor that is merged into, how it is stored, and the changes in their order."""

    name: str
    format: WeightFormat
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class LoraSource:
    """A model's tensors with LoRAs merged into them or beside them; reading is thread-safe.

    `merged` is by layer (or by name, for what is no layer's weight). The bytes of these tensors are in no file as such.
    """

    origin: Source
    loras: Sequence[Lora]
    strengths: Sequence[float]
    shares: Mapping[str, tuple[Share, ...]]
    dtype: torch.dtype
    merged: Mapping[str, MergedTensor]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)  # one weight in fp32 at a time

    def __post_init__(self) -> None:
        self.tensors.update(self.origin.tensors)
        for merged in self.merged.values():
            info = self.tensors[merged.name]
            self.tensors[merged.name] = replace(info, file=made_from(info.file))
        for layer, shares in self.shares.items():
            for leaf in (DOWN, UP):
                self.tensors[f"{layer}.{leaf}"] = side_info(self.origin, layer, leaf, shares, self.dtype)

    @torch.inference_mode()
    def read_into(self, name: str, out: Tensor) -> None:
        """The tensor's bytes, as `Checkpoint.read_into`."""
        layer, _, leaf = name.rpartition(".")
        if layer in self.shares and leaf in (DOWN, UP):
            self._read_side(layer, leaf, out)
        elif layer in self.merged and leaf == "weight_scale":
            self._read_scale(layer, name, out)
        elif layer in self.merged and self.merged[layer].name == name:
            self._read_merged(layer, out)
        elif name in self.merged:
            self._read_merged(name, out)
        else:
            self.origin.read_into(name, out)

    def _read_side(self, layer: str, leaf: str, out: Tensor) -> None:
        """The LoRAs' factors, one after the other along the rank."""
        info = self.tensors[f"{layer}.{leaf}"]
        whole = out.view(info.dtype).view(info.shape)
        first = 0
        for share in self.shares[layer]:
            lora, rank = self.loras[share.number], share.pair.rank
            factor = lora.down(share.pair) if leaf == DOWN else lora.up(share.pair)
            whole.narrow(0 if leaf == DOWN else 1, first, rank).copy_(factor)
            first += rank

    def _read_merged(self, place: str, out: Tensor) -> None:
        merged = self.merged[place]
        info = self.origin.tensors[merged.name]
        self.origin.read_into(merged.name, out)
        if all(self.strengths[change.number] == 0 for change in merged.changes):
            return  # quantised again it would be another weight
        packed = {"weight": out.view(info.dtype).view(info.shape)}
        scale = self.origin.tensors.get(f"{place}.weight_scale")
        if scale is not None:
            raw = allocate_bytes(scale.nbytes)
            self.origin.read_into(f"{place}.weight_scale", raw)
            packed["weight_scale"] = raw.view(scale.dtype).view(scale.shape)
        with self.lock:
            weight = merged.format.dequantize(packed, torch.float32).clone()
            for change in merged.changes:
                lora, strength = self.loras[change.number], self.strengths[change.number]
                if isinstance(change.what, Difference):
                    merge_difference_(weight, lora, change.what, strength)
                else:
                    merge_pair_(weight, lora, change.what, strength)
            num_scales = torch.Size(scale.shape).numel() if scale is not None else 0
            values, scales = requantize(weight, merged.format, info.dtype, num_scales)
            packed["weight"].copy_(values)
            if scales is not None and scale is not None:
                self.scales[place] = scales.to(scale.dtype)

    def _read_scale(self, layer: str, name: str, out: Tensor) -> None:
        if layer not in self.scales:
            weight = allocate_bytes(self.tensors[f"{layer}.weight"].nbytes)
            self._read_merged(layer, weight)
        if layer in self.scales:
            out.copy_(self.scales[layer].view(torch.uint8))
        else:
            self.origin.read_into(name, out)


def side_info(source: Source, layer: str, leaf: str, shares: Sequence[Share], dtype: torch.dtype) -> TensorInfo:
    """What is known of a layer's `lora_down` or `lora_up`; in files it would lie behind the weight."""
    weight = source.tensors[f"{layer}.weight"]
    rows, columns = weight.logical_shape or weight.shape
    rank = sum(share.pair.rank for share in shares)
    shape = (rank, columns) if leaf == DOWN else (rows, rank)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return TensorInfo(f"{layer}.{leaf}", dtype, shape, made_from(weight.file), weight.offset, nbytes)


def made_from(file: Path) -> Path:
    """In place of the file of bytes that are made as they are read, so that nobody looks for them there."""
    return file.with_name(f"{file.name} (with LoRA)")
