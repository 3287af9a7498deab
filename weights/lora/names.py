"""The names in LoRA files: which layer of the model the stem of a key is about (`weights/files/lora_keys.py`).

A stem is a layer's name in any of the model's layouts, behind a trainer's prefixes, with dots or with underscores. A
layer of another layout may be several of the model's in one, such as the projections to q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerPart:
    """A layer of the model (or a tensor), by its official name.

    `rows` are those that it has of a larger layer of the file, in the model's order; none: it is the whole layer.
    """

    layer: str
    rows: tuple[range, ...] = ()


# Every dotted name of a layer or tensor -> its official name, or the layers that it is in one.
Aliases = Mapping[str, str | tuple[LayerPart, ...]]

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "transformer_2.",  # the low-noise expert's in diffusers
    "pipe.dit.",
    "pipe.dit2.",
    "pipe.vace.",
    "dit.",
    "unet.",
    "model.",
    "module.",
)
# "lora_unet__" too
UNDERSCORED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "Hunyuan_video_I2V_lora_", "Hunyuan_video_lora_")
# What PyTorch puts into names while it trains.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def without_prefixes(stem: str) -> str:
    """A stem as its trainer's model calls it."""
    for wrapper in WRAPPERS:
        stem = stem.replace(wrapper, "")
    while (prefix := next((prefix for prefix in PREFIXES if stem.startswith(prefix)), None)) is not None:
        stem = stem.removeprefix(prefix)
    return stem


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
        plain = without_prefixes(stem)
        found = self._dotted.get(plain)
        if found is not None:
            return found
        for prefix in UNDERSCORED_PREFIXES:
            plain = plain.removeprefix(prefix)
        # some files have dots in a part of a name only: lora_unet_blocks_0.self_attn.q
        return self._underscored.get(plain.replace(".", "_").lstrip("_"))
