"""The names in LoRA files: which layer of the model a key is about, and which part of its LoRA.

A key is a stem and an ending, `diffusion_model.blocks.0.self_attn.q` and `.lora_A.weight`. The stem is a layer's name
in any of the model's layouts, behind a trainer's prefixes, with dots or with underscores. A layer of another layout may
be several of the model's in one, such as the projections to q, k and v.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# The parts of a LoRA. The last three are added to a weight, a bias and a modulation as they are.
DOWN, UP, ALPHA, MAGNITUDE, DIFF, DIFF_BIAS, DIFF_MODULATION = (
    "down", "up", "alpha", "magnitude", "diff", "diff_b", "diff_m",
)  # fmt: skip

ENDINGS: Mapping[str, str] = {
    ".lora_A.weight": DOWN,
    ".lora_A": DOWN,
    ".lora_down.weight": DOWN,
    ".lora.down.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_B": UP,
    ".lora_up.weight": UP,
    ".lora.up.weight": UP,
    ".alpha": ALPHA,
    ".dora_scale": MAGNITUDE,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".diff": DIFF,
    ".diff_b": DIFF_BIAS,
    ".diff_m": DIFF_MODULATION,
}

# PEFT puts an adapter's name in between: `.lora_A.default.weight`.
_ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.[^.]+\.weight")

# Decompositions that are no low-rank pairs, by how the last part of their keys begins.
FOREIGN_KINDS: Mapping[str, str] = {"hada_": "LoHa", "lokr_": "LoKr"}

# What a difference is added to, after the stem; a stem may also be a tensor's whole name.
DIFFERENCE_LEAVES: Mapping[str, str] = {DIFF: "weight", DIFF_BIAS: "bias", DIFF_MODULATION: "modulation"}


@dataclass(frozen=True)
class LayerPart:
    """A layer of the model (or a tensor), by its official name.

    `rows` are those that it has of a larger layer of the file, in the model's order; none: it is the whole layer.
    """

    layer: str
    rows: tuple[range, ...] = ()


# Every dotted name of a layer or tensor -> its official name, or the layers that it is in one.
Aliases = Mapping[str, str | tuple[LayerPart, ...]]

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "model.")
UNDERSCORED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # "lora_unet__" too


def split_key(key: str) -> tuple[str, str] | None:
    """The stem of a key and the part that it holds; None where the ending is not known."""
    key = _ADAPTER.sub(r"\1.weight", key)
    for ending, part in ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), part
    return None


def foreign_kind(key: str) -> str | None:
    """LoHa or LoKr, where a key is of one."""
    last = key.rpartition(".")[2]
    return next((kind for start, kind in FOREIGN_KINDS.items() if last.startswith(start)), None)


class LayerNames:
    """Finds layers by the stems of keys."""

    def __init__(self, aliases: Aliases):
        self._dotted = aliases
        self._underscored = {alias.replace(".", "_"): name for alias, name in aliases.items()}

    def find(self, stem: str) -> tuple[LayerPart, ...]:
        """What a stem is about; nothing where that is not known."""
        found = self._alias(stem)
        if found is None:
            return ()
        return (LayerPart(found),) if isinstance(found, str) else found

    def _alias(self, stem: str) -> str | tuple[LayerPart, ...] | None:
        found = self._dotted.get(stem)
        while found is None:
            prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), None)
            if prefix is None:
                break
            stem = stem.removeprefix(prefix)
            found = self._dotted.get(stem)
        if found is not None:
            return found
        for prefix in UNDERSCORED_PREFIXES:
            stem = stem.removeprefix(prefix)
        return self._underscored.get(stem.lstrip("_"))
