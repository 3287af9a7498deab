"""Whether ComfyUI's weight patches fit the tensors that they are for, told by shapes before anything is merged."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import comfy.weight_adapter
from torch import Tensor

from ...weights.files.checkpoint import Checkpoint
from .patches import PREFIX, SortedPatches

logger = logging.getLogger(__name__)

SHOWN = 3  # names in a message
Shape = tuple[int, ...]


def fitting(sorted_patches: SortedPatches, checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """Those that are to be merged and fit, by ComfyUI's key; as in ComfyUI the others are left out, and logged.

    ValueError, which says what does not fit, where it is at least half of all, and where a patch makes a layer wider.
    """
    fit: dict[str, list[Any]] = {}
    misfits: dict[str, str] = {}
    for key, found in sorted_patches.merged.items():
        name = key.removeprefix(PREFIX)
        info = checkpoint.tensors.get(name)
        if info is None:
            continue
        shape = info.unpacked_shape
        reasons = [_misfit(name, patch, shape) for patch in found]
        first = next((reason for reason in reasons if reason is not None), None)
        if first is not None:
            misfits[name] = first
        kept = [patch for patch, reason in zip(found, reasons, strict=True) if reason is None]
        if kept:
            fit[key] = kept
    if not misfits:
        return fit
    some = "; ".join(f"{name}: {reason}" for name, reason in list(misfits.items())[:SHOWN])
    if len(misfits) >= len(fit) + len(sorted_patches.low_rank):
        raise ValueError(
            f"{checkpoint.path.name}: a LoRA of another model: {len(misfits)} of its layers differ in size ({some}); "
            "expected one for this model; choose a LoRA that was made for this model's size"
        )
    logger.warning("%s: %d weights keep no LoRA, whose sizes differ: %s", checkpoint.path.name, len(misfits), some)
    return fit


def _misfit(name: str, patch: Any, shape: Shape) -> str | None:
    """How a patch differs from its tensor; None where it fits, or is one of a kind that is not known here."""
    _, value, _, offset, function = patch
    if offset is not None or function is not None:
        return None
    if isinstance(value, comfy.weight_adapter.LoRAAdapter):
        return _pair_misfit(name, value.weights, shape)
    if isinstance(value, comfy.weight_adapter.LoHaAdapter):
        return _differs((value.weights[0].shape[-1 if value.weights[5] is not None else 0],), shape[:1])
    if isinstance(value, comfy.weight_adapter.LoKrAdapter):
        return _kronecker_misfit(value.weights, shape)
    if isinstance(value, comfy.weight_adapter.OFTAdapter | comfy.weight_adapter.BOFTAdapter):
        *_, count, size, _ = value.weights[0].shape
        return _differs((count * size,), shape[:1])
    values = value[-1] if isinstance(value, tuple) and value else None
    if isinstance(values, tuple | list) and values and isinstance(values[0], Tensor):
        given = tuple(values[0].shape)
        if given != shape and len(values) > 1 and values[1].get("pad_weight"):
            raise _wider(name, given, shape)
        return _differs(given, shape)
    return None


def _pair_misfit(name: str, weights: Sequence[Any], shape: Shape) -> str | None:
    up, down, _, middle, _, reshape = (*weights, None)[:6]
    if reshape is not None and tuple(reshape) != tuple(shape):
        raise _wider(name, tuple(reshape), shape)
    if middle is not None:
        return _differs((up.shape[0],), shape[:1])
    given = (up.shape[0], down[0].numel())
    wanted = (shape[0], math.prod(shape[1:]))
    if len(shape) < 2 or given != wanted:
        return f"{given[1]} to {given[0]} features, the model has {wanted[1]} to {wanted[0]}"
    return None


def _kronecker_misfit(weights: Sequence[Any], shape: Shape) -> str | None:
    w1, w2, _, w1_a, w1_b, w2_a, w2_b, t2 = weights[:8]
    first = tuple(w1.shape) if w1 is not None else (w1_a.shape[0], w1_b.shape[1])
    if w2 is not None:
        second = (w2.shape[0], w2[0].numel())
    elif t2 is not None:
        second = (w2_a.shape[1], w2_b.shape[1] * t2[0, 0].numel())
    else:
        second = (w2_a.shape[0], w2_b.shape[1])
    return _differs((first[0] * second[0], first[1] * second[1]), (shape[0], math.prod(shape[1:])))


def _differs(given: Shape, wanted: Shape) -> str | None:
    return None if tuple(given) == tuple(wanted) else f"{list(given)}, the model has {list(wanted)}"


def _wider(name: str, given: Shape, wanted: Shape) -> ValueError:
    return ValueError(
        f"a control LoRA, which makes {name.removesuffix('.weight')} wider: {list(given)}, the model has "
        f"{list(wanted)}; expected a LoRA that keeps the model's inputs; load a model that takes a control video "
        "(Wan Fun Control, VACE), or this with ComfyUI's own Load Diffusion Model"
    )
