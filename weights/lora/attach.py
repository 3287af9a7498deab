"""LoRAs on a model: beside its linear layers, or merged into its weights as they are read."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..files.checkpoint import CheckpointError, Source, TensorInfo
from ..kernels.low_rank_ops import select_low_rank_ops
from ..linear.formats import format_for, meta_parameter
from ..linear.linear import Linear
from ..linear.low_rank import DOWN, SCALE, UP
from .file import Lora
from .low_rank import LowRankPair
from .merged_source import MergedSource, made_from, refusal
from .sound import check_strengths, read_sound
from .update import Additive, Change

logger = logging.getLogger(__name__)

# "auto": low-rank pairs run beside linear layers, the rest is merged. "side": what would be merged is refused, so that
# strengths are free to change. "merge": everything is merged, which costs nothing per step but rounds to the weights.
LORA_MODES = ("auto", "side", "merge")


# What is no pair of factors in its file runs beside its layer while its rank is at most this share of the weight's
# smaller side: at a larger one the two products cost more than merging is worth.
LARGEST_RANK = 0.25

T = TypeVar("T", bound=Change)


@dataclass(frozen=True)
class Part(Generic[T]):
    """What one LoRA, by its number, has for one tensor."""

    number: int
    what: T


Share = Part[Additive]  # of a layer's low-rank update


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
        check_strengths(strengths, [lora.checkpoint.path for lora in loras])
        self.loras, self.strengths = tuple(loras), tuple(strengths)
        self._model, self._origin, self._dtype = model, source, dtype
        self._shares: dict[str, tuple[Share, ...]] = {}
        self._changes: dict[str, tuple[Part[Change], ...]] = {}
        self._sort(mode)
        self._check_merged(mode)
        for layer in self._shares:
            for leaf in (DOWN, UP):
                info = side_info(source, layer, leaf, self._shares[layer], dtype)
                model.get_submodule(layer).register_parameter(leaf, meta_parameter(info))
        self._scale = torch.empty(0)
        self.place(torch.device("cpu"))
        if self._changes and self.loras:
            logger.info("LoRA: %d tensors are merged as they are read.", len(self._changes))

    @property
    def origin(self) -> Source:
        """What they are put on."""
        return self._origin

    @property
    def are_merged(self) -> bool:
        """Whether anything is merged: then other strengths take another `source()`."""
        return bool(self._changes)

    def source(self) -> LoraSource:
        """The model's tensors with the LoRAs, at the strengths of now."""
        strengths = self.strengths
        # what has no strength keeps its bytes: quantised again it would be another weight
        changes = {
            name: partial(merge, loras=self.loras, strengths=strengths, changes=found)
            for name, found in self._changes.items()
            if any(strengths[change.number] for change in found)
        }
        return LoraSource(self._origin, changes, self.loras, self._shares, self._dtype)

    def adopt(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Have linear layers hold what a source stores for them, where merging changed that; the model is stopped."""
        for name, module in self._model.named_modules():
            if not isinstance(module, Linear):
                continue
            info = tensors.get(f"{name}.weight")
            if info is not None and (info.shape, info.dtype) != (tuple(module.weight.shape), module.weight.dtype):
                module.format = format_for(info)
                module.register_parameter("weight", meta_parameter(info))

    def place(self, device: torch.device) -> None:
        """Have the strengths on the device where the layers run, and what is fastest there beside them."""
        with torch.inference_mode(False):  # changed from outside later
            self._scale = self._scales().to(device)
        if not self._shares:
            return
        ops = select_low_rank_ops(device)  # once for all: while memory is short each call would try them anew
        parts = self._scale.split([sum(share.what.rank for share in shares) for shares in self._shares.values()])
        for layer, part in zip(self._shares, parts, strict=True):
            module = self._model.get_submodule(layer)
            assert isinstance(module, Linear), "sorted so"
            module.register_buffer(SCALE, part, persistent=False)
            module.low_rank_ops = ops

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Other strengths, one per LoRA, from the next product on: new numbers in the same tensor.

        What is merged has them only in a new `source()`.
        """
        if len(strengths) != len(self.loras):
            raise ValueError(f"{len(strengths)} strengths for {len(self.loras)} LoRAs; expected one for each")
        check_strengths(strengths, [lora.checkpoint.path for lora in self.loras])
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
                torch.full((share.what.rank,), share.what.scale * self.strengths[share.number]) for share in shares
            ]
        return torch.cat(values)

    def _sort(self, mode: str) -> None:
        shares: defaultdict[str, list[Share]] = defaultdict(list)
        changes: defaultdict[str, list[Part[Change]]] = defaultdict(list)
        linear = {name: module for name, module in self._model.named_modules() if isinstance(module, Linear)}
        for number, lora in enumerate(self.loras):
            for layer, update in lora.updates.items():
                if layer in linear and isinstance(update, Additive) and runs_beside(update, linear[layer], mode):
                    shares[layer].append(Share(number, update))
                else:
                    changes[f"{layer}.weight"].append(Part(number, update))
            for name, change in lora.changes.items():
                changes[name].append(Part(number, change))
        self._shares = {layer: tuple(found) for layer, found in shares.items()}
        self._changes = {name: tuple(found) for name, found in changes.items()}

    def _check_merged(self, mode: str) -> None:
        for name, changes in self._changes.items():
            path = self.loras[changes[0].number].checkpoint.path
            if mode == "side":
                raise CheckpointError(
                    f"{path}: what it has for {name} can only be merged; expected low-rank pairs of linear layers "
                    "with lora_mode side; choose lora_mode auto"
                )
            if (stored := refusal(self._origin, name)) is not None:
                raise CheckpointError(
                    f"{path}: what it has for {name} must be merged, which cannot be done into {stored}; expected "
                    "weights in bf16, fp16, fp8, int8 or GGUF; use such a file of the model, or leave this LoRA out"
                )


class LoraSource(MergedSource):
    """A model's tensors with LoRAs beside them (`shares`, by layer) or merged into them; reading is thread-safe."""

    def __init__(
        self,
        origin: Source,
        changes: Mapping[str, Callable[[Tensor], Tensor]],
        loras: Sequence[Lora],
        shares: Mapping[str, tuple[Share, ...]],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(origin, changes)
        self._loras, self._shares = loras, shares
        for layer in shares:
            for leaf in (DOWN, UP):
                self.tensors[f"{layer}.{leaf}"] = side_info(origin, layer, leaf, shares[layer], dtype)

    def read_into(self, name: str, out: Tensor) -> None:
        """The tensor's bytes, as `Checkpoint.read_into`."""
        layer, _, leaf = name.rpartition(".")
        if layer in self._shares and leaf in (DOWN, UP):
            self._read_side(layer, leaf, out)
        else:
            super().read_into(name, out)

    @torch.inference_mode()
    def _read_side(self, layer: str, leaf: str, out: Tensor) -> None:
        """The LoRAs' factors, one after the other along the rank."""
        info = self.tensors[f"{layer}.{leaf}"]
        whole = out.view(info.dtype).view(info.shape)
        first = 0
        for share in self._shares[layer]:
            lora, rank = self._loras[share.number], share.what.rank
            read = partial(read_sound, lora.checkpoint)
            factor = share.what.down(read) if leaf == DOWN else share.what.up(read)
            whole.narrow(0 if leaf == DOWN else 1, first, rank).copy_(factor)
            first += rank


def runs_beside(update: Additive, layer: Linear, mode: str) -> bool:
    """Whether an update runs beside its layer, rather than being merged."""
    if mode == "merge" or not update.factors_rank:
        return False
    return mode == "side" or is_small(update, layer.out_features, layer.in_features)


def is_small(update: Additive, num_rows: int, num_columns: int) -> bool:
    """Whether a layer's own product costs more than that of an update's factors; those that a file has always count."""
    return isinstance(update, LowRankPair) or update.factors_rank <= LARGEST_RANK * min(num_rows, num_columns)


def merge(weight: Tensor, loras: Sequence[Lora], strengths: Sequence[float], changes: Sequence[Part[Change]]) -> Tensor:
    """`weight` fp32, in place, with what LoRAs merge into it."""
    for change in changes:
        change.what.merge_(weight, partial(read_sound, loras[change.number].checkpoint), strengths[change.number])
    return weight


def side_info(source: Source, layer: str, leaf: str, shares: Sequence[Share], dtype: torch.dtype) -> TensorInfo:
    """What is known of a layer's `lora_down` or `lora_up`; in files it would lie behind the weight."""
    weight = source.tensors[f"{layer}.weight"]
    rows, columns = weight.unpacked_shape
    rank = sum(share.what.rank for share in shares)
    shape = (rank, columns) if leaf == DOWN else (rows, rank)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return TensorInfo(f"{layer}.{leaf}", dtype, shape, made_from(weight.file), weight.offset, nbytes)
