"""ComfyUI's weight patches: plain LoRAs run beside linear layers, others are merged into weights as they are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.weight_adapter
from torch import Tensor, nn

from ...weights.files.checkpoint import Checkpoint
from ...weights.files.lora_keys import DOWN, UP
from ...weights.linear.linear import Linear
from ...weights.lora.file import Lora
from ...weights.lora.low_rank import LowRankPair
from ...weights.lora.merged_source import Change, MergedSource, refusal
from ...weights.lora.report import LoraReport
from ...weights.lora.sound import check_strengths

logger = logging.getLogger(__name__)

PREFIX = "diffusion_model."  # of our parameters' names in ComfyUI's model
IN_MEMORY = Path("a LoRA loaded by ComfyUI")


@dataclass(frozen=True)
class LowRankPatch:
    """A weight patch that is a plain LoRA: `weight += up [out, rank] @ down [rank, in] * scale * strength`."""

    up: Tensor
    down: Tensor
    scale: float
    strength: float


@dataclass(frozen=True)
class SortedPatches:
    """A ModelPatcher's patches: `low_rank` by layer, each a LoRA of its own with its own strength; `merged` by key."""

    low_rank: Sequence[tuple[str, LowRankPatch]] = ()
    merged: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def strengths(self) -> list[float]:
        return [patch.strength for _, patch in self.low_rank]

    def loras(self) -> list[Lora]:
        """Those that run beside layers."""
        loras = []
        for layer, patch in self.low_rank:
            factors = PatchFactors(IN_MEMORY, {}, {}, patch.up, patch.down)
            pair = LowRankPair({DOWN: DOWN, UP: UP}, patch.scale, (), patch.down.shape[0])
            loras.append(Lora(factors, {layer: pair}, {}, LoraReport(IN_MEMORY, 1, {})))
        return loras

    def same_but_strengths(self, other: SortedPatches) -> bool:
        """Whether nothing need be read for one after the other; ComfyUI's loaders keep the tensors of their file."""
        return (
            not (self.merged or other.merged)
            and len(self.low_rank) == len(other.low_rank)
            and all(
                layer == other_layer
                and patch.up is known.up
                and patch.down is known.down
                and patch.scale == known.scale
                for (layer, patch), (other_layer, known) in zip(self.low_rank, other.low_rank, strict=True)
            )
        )


@dataclass(frozen=True)
class PatchFactors(Checkpoint):
    """A LoRA's factors of one layer, which ComfyUI holds in memory."""

    up: Tensor
    down: Tensor

    def read(self, name: str) -> Tensor:
        return self.up if name == UP else self.down


def sort_patches(patches: Mapping[str, Sequence[Any]], model: nn.Module) -> SortedPatches:
    """Patches of a model by what is done with them; those of one weight stay together, as their order may matter."""
    linear = {
        f"{PREFIX}{name}.weight": (name, module) for name, module in model.named_modules() if isinstance(module, Linear)
    }
    plain: list[tuple[str, LowRankPatch]] = []
    merged: dict[str, Sequence[Any]] = {}
    for key, found in patches.items():
        check_strengths([number for patch in found for number in _strengths(patch)], [key] * 2 * len(found))
        layer, module = linear.get(key, ("", None))
        low_rank = [patch for each in found if (patch := low_rank_patch(each)) is not None]
        if module is not None and len(low_rank) == len(found) and all(_fits(patch, module) for patch in low_rank):
            plain += [(layer, patch) for patch in low_rank]
        else:
            merged[key] = list(found)
    return SortedPatches(plain, merged)


def _strengths(patch: Any) -> tuple[float, float]:
    """Of the patch, and of the weight that it changes."""
    strength, _, strength_model, *_ = patch
    return strength, strength_model


def low_rank_patch(patch: Any) -> LowRankPatch | None:
    """What a ModelPatcher's patch is, where it is a plain LoRA of a whole matrix."""
    strength, value, strength_model, offset, function = patch
    if not isinstance(value, comfy.weight_adapter.LoRAAdapter):  # LoHa, LoKr, OFT, a difference ...
        return None
    up, down, alpha, middle, magnitude, reshape = value.weights
    parts = (offset, function, middle, magnitude, reshape)
    if strength_model != 1.0 or any(part is not None for part in parts) or up.ndim != 2 or down.ndim != 2:
        return None
    return LowRankPatch(up, down, 1.0 if alpha is None else alpha / down.shape[0], strength)


def _fits(patch: LowRankPatch, layer: Linear) -> bool:
    (out, rank), (same_rank, inner) = patch.up.shape, patch.down.shape
    return rank == same_rank and (out, inner) == (layer.out_features, layer.in_features)


def patched_source(checkpoint: Checkpoint, patches: Mapping[str, Sequence[Any]]) -> MergedSource:
    """A checkpoint's tensors with patches of a ModelPatcher (by ComfyUI's key) merged; the file stays as it is.

    ValueError where a patched weight cannot be merged into.
    """
    changes: dict[str, Change] = {}
    for key, found in patches.items():
        name = key.removeprefix(PREFIX)
        if name not in checkpoint.tensors:
            continue
        if (stored := refusal(checkpoint, name)) is not None:
            raise ValueError(
                f"{checkpoint.path.name} stores {name} as {stored}, into which this LoRA (LoHa, LoKr, DoRA or a "
                "difference) cannot be merged: use a plain LoRA, or this model in bf16, fp16, fp8, int8 or GGUF"
            )
        changes[name] = partial(_patch, patches=list(found), key=key)
    rounded = any(checkpoint.tensors[name].dtype.itemsize == 1 for name in changes)
    logger.info(
        "%s: %d weights have patches that can only be merged (such as LoHa, LoKr, DoRA, differences)%s.",
        checkpoint.path.name,
        len(changes),
        "; they are rounded to 8 bits again" if rounded else "",
    )
    return MergedSource(checkpoint, changes)


def _patch(weight: Tensor, patches: list[Any], key: str) -> Tensor:
    return comfy.lora.calculate_weight(patches, weight.float(), key).float()


def patch_identity(patches: Mapping[str, Sequence[Any]]) -> list[Any]:
    """What a result depends on of a ModelPatcher's patches, as JSON values and tensors."""
    return [[key, [_plain(part) for patch in found for part in patch]] for key, found in sorted(patches.items())]


def _plain(value: Any) -> Any:
    if isinstance(value, (Tensor, str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return [type(value).__name__, _plain(getattr(value, "weights", None))]  # an adapter of ComfyUI's
