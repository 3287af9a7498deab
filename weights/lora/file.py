"""LoRA files: what they change in a model, and what of them could not be used."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ..files.open import open_checkpoint
from .names import ALPHA, DIFF, DIFFERENCE_LEAVES, DOWN, MAGNITUDE, UP, Aliases, LayerNames, foreign_kind, split_key

logger = logging.getLogger(__name__)

SHOWN = 4  # names in a message


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file and how strongly it is applied; 1 is as it was trained."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class LowRankPair:
    """One layer's factors by their keys: `up [out, rank] @ down [rank, in] * scale`; `scale` is alpha / rank.

    With a `magnitude` it is a DoRA: the changed weight's rows (or columns) get those lengths. `rows` are the layer's of
    up and magnitude, in its order (see `LayerPart`).
    """

    down: str
    up: str
    rank: int
    scale: float = 1.0
    magnitude: str | None = None
    rows: tuple[range, ...] = ()


@dataclass(frozen=True)
class Difference:
    """What is added to one tensor, by its key; `rows` see `LayerPart`."""

    key: str
    rows: tuple[range, ...] = ()


@dataclass(frozen=True)
class LoraReport:
    """How much of a file is applied; `skipped` says why of each key that is not."""

    path: Path
    num_keys: int
    skipped: Mapping[str, str]

    @property
    def num_applied(self) -> int:
        return self.num_keys - len(self.skipped)

    @property
    def summary(self) -> str:
        """How much, in a line."""
        return f"{self.path.name}: {self.num_applied} of {self.num_keys} keys applied"

    def __str__(self) -> str:
        if not self.skipped:
            return self.summary
        by_reason: defaultdict[str, list[str]] = defaultdict(list)
        for key, reason in self.skipped.items():
            by_reason[reason].append(key)
        return f"{self.summary}; not applied: " + "; ".join(f"{_some(keys)}: {why}" for why, keys in by_reason.items())


@dataclass(frozen=True)
class Lora:
    """An open LoRA: low-rank pairs by layer, whole differences by tensor."""

    checkpoint: Checkpoint
    pairs: Mapping[str, LowRankPair]
    differences: Mapping[str, Difference]
    report: LoraReport

    def up(self, pair: LowRankPair) -> Tensor:
        """`[out, rank]` as stored."""
        return self._rows(pair.up, pair.rows).flatten(1)

    def down(self, pair: LowRankPair) -> Tensor:
        """`[rank, in]` as stored."""
        return self.checkpoint.read(pair.down).flatten(1)

    def magnitude(self, pair: LowRankPair) -> Tensor:
        """One number per output, or per input, of a DoRA."""
        assert pair.magnitude is not None
        by_column = self.checkpoint.tensors[pair.magnitude].shape[:1] == (1,)
        return self._rows(pair.magnitude, () if by_column else pair.rows)

    def difference(self, difference: Difference) -> Tensor:
        """As stored; its shape may have more or fewer dimensions than the tensor's."""
        return self._rows(difference.key, difference.rows)

    def _rows(self, key: str, rows: Sequence[range]) -> Tensor:
        tensor = self.checkpoint.read(key)
        return torch.cat([tensor[part.start : part.stop] for part in rows]) if rows else tensor


def open_lora(path: str | Path, tensors: Mapping[str, TensorInfo], aliases: Aliases) -> Lora:
    """Open a LoRA for a model; reads its header and its alphas.

    `tensors` are the model's by official name. CheckpointError for a file that is no LoRA or one of another model; what
    merely finds no place is in the report.
    """
    checkpoint = open_checkpoint(path)
    sorter = _Sorter(checkpoint, tensors, LayerNames(aliases))
    sorter.check_kind()
    lora = Lora(checkpoint, sorter.pairs(), sorter.differences(), sorter.report())
    sorter.check_model(lora)
    return lora


def open_loras(choices: Sequence[LoraChoice], tensors: Mapping[str, TensorInfo], aliases: Aliases) -> list[Lora]:
    """The chosen LoRAs, opened for one model (see `open_lora`); what of them finds no place is logged."""
    loras = [open_lora(choice.path, tensors, aliases) for choice in choices]
    for lora in loras:
        logger.log(logging.WARNING if lora.report.skipped else logging.INFO, "LoRA %s", lora.report)
    return loras


@dataclass(frozen=True)
class _Found:
    """A key, and the rows of it that are a layer's; in all it should have `num_rows` (0: as many as the layer)."""

    key: str
    rows: tuple[range, ...] = ()
    num_rows: int = 0


@dataclass
class _Sorter:
    """Puts the keys of a file where they belong."""

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]
    names: LayerNames
    found: dict[str, dict[str, _Found]] = field(default_factory=lambda: defaultdict(dict))  # layer -> part of its LoRA
    skipped: dict[str, str] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)  # layer -> how its shapes differ
    num_lora_keys: int = 0

    def __post_init__(self) -> None:
        for key in self.checkpoint.tensors:
            split = split_key(key)
            if split is None:
                kind = foreign_kind(key)
                self.skipped[key] = f"of a {kind}" if kind else "not known as a part of a LoRA"
                continue
            self.num_lora_keys += 1
            stem, part = split
            layers = self.names.find(stem)
            others = [self.found[each.layer][part].key for each in layers if part in self.found[each.layer]]
            if not layers or others:
                self.skipped[key] = f"{others[0]} is the same" if others else "the model has no such layer"
                continue
            num_rows = sum(len(rows) for each in layers for rows in each.rows)
            for each in layers:
                self.found[each.layer][part] = _Found(key, each.rows, num_rows)

    def pairs(self) -> dict[str, LowRankPair]:
        pairs: dict[str, LowRankPair] = {}
        for layer, parts in self.found.items():
            keys = [parts[part].key for part in (DOWN, UP, ALPHA, MAGNITUDE) if part in parts]
            if not keys:
                continue
            reason = self._pair_problem(layer, parts)
            if reason is None:
                pairs[layer] = self._pair(parts)
            else:
                self.skipped |= dict.fromkeys(keys, reason)
        return pairs

    def differences(self) -> dict[str, Difference]:
        differences: dict[str, Difference] = {}
        for layer, parts in self.found.items():
            for part, leaf in DIFFERENCE_LEAVES.items():
                if part not in parts:
                    continue
                name = layer if part == DIFF and layer in self.tensors else f"{layer}.{leaf}"
                found = parts[part]
                reason = self._difference_problem(name, found)
                if reason is None:
                    differences[name] = Difference(found.key, found.rows)
                else:
                    self.skipped[found.key] = reason
        return differences

    def report(self) -> LoraReport:
        return LoraReport(self.checkpoint.path, len(self.checkpoint.tensors), self.skipped)

    def check_kind(self) -> None:
        kinds = {kind for kind in map(foreign_kind, self.checkpoint.tensors) if kind}
        # their alphas are named as a LoRA's are
        if kinds and not any(set(parts) - {ALPHA, MAGNITUDE} for parts in self.found.values()):
            raise CheckpointError(
                f"{self.checkpoint.path}: a {' and '.join(sorted(kinds))}, which is no LoRA of low-rank pairs; "
                "expected names that end in lora_A.weight, lora_down.weight, diff or the like; load it with ComfyUI's "
                "LoRA loaders, or choose a LoRA file"
            )
        if not self.num_lora_keys:
            raise CheckpointError(
                f"{self.checkpoint.path}: no LoRA: none of its {len(self.checkpoint.tensors)} tensors "
                f"({_some(list(self.checkpoint.tensors))}) has a LoRA's name; expected names that end in "
                "lora_A.weight, lora_down.weight, diff or the like; choose a LoRA file"
            )

    def check_model(self, lora: Lora) -> None:
        """CheckpointError unless most of what the file holds fits the model."""
        num_fitting = len(lora.pairs) + len(lora.differences)
        if len(self.misfits) >= max(num_fitting, 1):
            layer, how = next(iter(self.misfits.items()))
            raise CheckpointError(
                f"{self.checkpoint.path}: a LoRA of another model: {len(self.misfits)} of its layers differ in size "
                f"({layer}: {how}); expected one for this model; choose a LoRA that was made for this model's size"
            )
        if not num_fitting:
            raise CheckpointError(
                f"{self.checkpoint.path}: a LoRA of another model: nothing in it fits ({_some(list(self.skipped))}: "
                f"{next(iter(self.skipped.values()))}); expected layers of this model, such as "
                f"{next(iter(self.tensors)).rpartition('.')[0]}; choose a LoRA that was made for this model"
            )

    def _pair(self, parts: Mapping[str, _Found]) -> LowRankPair:
        rank = self._shape(parts[DOWN])[0]
        # without an alpha it is the rank
        scale = 1.0 if ALPHA not in parts else float(self.checkpoint.read(parts[ALPHA].key)) / rank
        magnitude = parts[MAGNITUDE].key if MAGNITUDE in parts else None
        return LowRankPair(parts[DOWN].key, parts[UP].key, rank, scale, magnitude, parts[UP].rows)

    def _pair_problem(self, layer: str, parts: Mapping[str, _Found]) -> str | None:
        if DOWN not in parts or UP not in parts:
            return "half of a pair"
        weight = self.tensors.get(f"{layer}.weight")
        if weight is None:
            return "the model has no such layer"
        shape = weight.logical_shape or weight.shape
        down, up = self._shape(parts[DOWN]), self._shape(parts[UP])
        num_rows = parts[UP].num_rows
        wanted = (num_rows or shape[0], math.prod(shape[1:]))
        given = (up[0], math.prod(down[1:])) if down and up else (0, 0)
        if len(shape) < 2 or wanted != given:
            return self._misfit(layer, f"{given[1]} to {given[0]} features, the model has {wanted[1]} to {wanted[0]}")
        if not down[0] or math.prod(up) != up[0] * down[0]:
            return f"its factors are {list(up)} and {list(down)}, which cannot be multiplied"
        if ALPHA in parts and math.prod(self._shape(parts[ALPHA])) != 1:
            return "its alpha is not one number"
        # of a part of the layer there are no magnitudes per input
        if MAGNITUDE in parts and math.prod(self._shape(parts[MAGNITUDE])) not in wanted[: 1 if num_rows else 2]:
            return "its magnitudes are neither one per output nor one per input"
        return None

    def _difference_problem(self, name: str, found: _Found) -> str | None:
        info = self.tensors.get(name)
        if info is None:
            return f"the model has no {name.rpartition('.')[2]} there"
        shape = info.logical_shape or info.shape
        wanted = (found.num_rows, *shape[1:]) if found.num_rows else shape
        given = self._shape(found)
        if math.prod(wanted) != math.prod(given) or (found.num_rows and given[0] != found.num_rows):
            return self._misfit(name, f"{list(given)}, the model has {list(wanted)}")
        return None

    def _misfit(self, name: str, how: str) -> str:
        self.misfits[name] = how
        return f"another size: {how}"

    def _shape(self, found: _Found) -> tuple[int, ...]:
        return self.checkpoint.tensors[found.key].shape


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
