"""The keys of a LoRA file put where they belong in a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..files.checkpoint import Checkpoint, TensorInfo
from ..files.lora_keys import ALPHA, DIFF, DIFF_BIAS, DIFF_MODULATION, RESHAPE, SET, UP_BIAS, split_key
from .layer_parts import Found, LayerParts, UnfitError
from .names import LayerNames, without_prefixes
from .scaling import Scaling
from .update import Difference, Replacement, Update

SET_BIAS = "set_bias"
# What a change is of, after the stem; a stem may also be a tensor's whole name.
LEAVES: Mapping[str, str] = {
    DIFF: "weight", DIFF_BIAS: "bias", DIFF_MODULATION: "modulation", SET: "weight", SET_BIAS: "bias", UP_BIAS: "bias",
}  # fmt: skip


@dataclass
class SortedKeys:
    """A file's keys sorted: updates by layer, changes by tensor, and why of each other key."""

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]  # the model's
    names: LayerNames
    scaling: Scaling | None
    updates: dict[str, Update] = field(default_factory=dict)
    changes: dict[str, Difference | Replacement] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)  # layer -> how its shapes differ
    wider: dict[str, tuple[int, ...]] = field(default_factory=dict)  # layer -> the shape that it is to have
    used_scaling: bool = False

    def __post_init__(self) -> None:
        for layer, found in self._found().items():
            self._update(layer, found)
            self._changes(layer, found)
            self._reshape(layer, found)

    def _found(self) -> dict[str, dict[str, Found]]:
        """layer -> part of its LoRA"""
        by_layer: defaultdict[str, dict[str, Found]] = defaultdict(dict)
        for key in self.checkpoint.tensors:
            split = split_key(key) or self._split_whole(key)
            if split is None:
                self.skipped[key] = "not known as a part of a LoRA"
                continue
            stem, part = split
            layers = self.names.find(stem)
            others = [by_layer[each.layer][part].key for each in layers if part in by_layer[each.layer]]
            if not layers or others:
                self.skipped[key] = f"{others[0]} is the same" if others else "the model has no such layer"
                continue
            num_rows = sum(len(rows) for each in layers for rows in each.rows)
            for each in layers:
                by_layer[each.layer][part] = Found(key, without_prefixes(stem), each.rows, num_rows)
        return by_layer

    def _split_whole(self, key: str) -> tuple[str, str] | None:
        """Of a tensor that takes the place of the model's, as PEFT stores biases and whole modules that it trained."""
        if ".base_layer." in key or ".original_module." in key:
            return None
        key = key.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        stem, _, leaf = key.rpartition(".")
        if leaf == "weight" and self.names.find(stem):
            return stem, SET
        if leaf == "bias" and self.names.find(stem):
            return stem, SET_BIAS
        return (key, SET) if self.names.find(key) else None

    def _update(self, layer: str, found: Mapping[str, Found]) -> None:
        parts = {part: each for part, each in found.items() if part not in LEAVES and part != RESHAPE}
        if not parts:
            return
        try:
            made = LayerParts(self.checkpoint, self.scaling, self.tensors.get(f"{layer}.weight"), parts).update()
        except UnfitError as error:
            reason = self._misfit(layer, str(error)) if error.differs else str(error)
            self.skipped |= dict.fromkeys((each.key for each in parts.values()), reason)
            return
        if made is not None:
            self.updates[layer], used = made
            self.used_scaling |= ALPHA not in used
            unused = (each.key for part, each in parts.items() if part not in used)
            self.skipped |= dict.fromkeys(unused, "its layer has a LoRA of another kind")

    def _changes(self, layer: str, found: Mapping[str, Found]) -> None:
        for part, leaf in LEAVES.items():
            if part not in found:
                continue
            whole = part in (DIFF, SET) and layer in self.tensors
            name, each = layer if whole else f"{layer}.{leaf}", found[part]
            reason = self._change_problem(layer, name, part, each)
            if reason is not None:
                self.skipped[each.key] = reason
            elif part in (SET, SET_BIAS):
                self.changes[name] = Replacement(each.key, each.rows)
            else:
                scale = self.updates[layer].scale if part == UP_BIAS else 1.0
                self.changes[name] = Difference(each.key, each.rows, scale)

    def _change_problem(self, layer: str, name: str, part: str, found: Found) -> str | None:
        info = self.tensors.get(name)
        if info is None:
            return f"the model has no {name.rpartition('.')[2]} there"
        if name in self.changes:
            return f"{self.changes[name].key} changes the same"
        if part == UP_BIAS and layer not in self.updates:
            return "half of a pair"
        shape = info.unpacked_shape
        wanted: Sequence[int] = (found.num_rows, *shape[1:]) if found.num_rows else shape
        given = self.checkpoint.tensors[found.key].shape
        if math.prod(wanted) != math.prod(given) or (found.num_rows and given[0] != found.num_rows):
            return self._misfit(name, f"{list(given)}, the model has {list(wanted)}")
        return None

    def _reshape(self, layer: str, found: Mapping[str, Found]) -> None:
        if RESHAPE not in found:
            return
        key, info = found[RESHAPE].key, self.tensors.get(f"{layer}.weight")
        if info is None:
            self.skipped[key] = "the model has no such layer"
            return
        shape = tuple(int(size) for size in self.checkpoint.read(key).flatten())
        if shape != info.unpacked_shape:
            self.wider[layer] = shape

    def _misfit(self, name: str, how: str) -> str:
        self.misfits[name] = how
        return f"another size: {how}"
