"""LoRA files: what they change in a model, and what of them could not be used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ..files.lora_keys import is_lora, unknown_kind
from ..files.open import open_checkpoint
from .names import Aliases, LayerNames
from .report import LoraReport, some
from .scaling import read_scaling
from .sort import SortedKeys
from .update import Difference, Replacement, Update

logger = logging.getLogger(__name__)

EXPECTED = "names that end in lora_A.weight, lora_down.weight, lokr_w1, diff or the like"
SPLIT = (
    'python -c "from safetensors.torch import load_file, save_file; t = load_file({file!r}); '
    "[save_file({{k: v for k, v in t.items() if k.startswith('transformer_2.') == low}}, name) "
    "for low, name in ((False, 'high.safetensors'), (True, 'low.safetensors'))]\""
)


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file and how strongly it is applied; 1 is as it was trained."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class Lora:
    """An open LoRA: updates by layer, and what else it changes, by tensor."""

    checkpoint: Checkpoint
    updates: Mapping[str, Update]
    changes: Mapping[str, Difference | Replacement]
    report: LoraReport


def open_lora(path: str | Path, tensors: Mapping[str, TensorInfo], aliases: Aliases) -> Lora:
    """Open a LoRA for a model; reads its header and its alphas.

    `tensors` are the model's by official name. CheckpointError for a file that is no LoRA or one of another model; what
    merely finds no place is in the report.
    """
    checkpoint = open_checkpoint(path)
    check_lora(checkpoint)
    scaling = read_scaling(checkpoint)
    found = SortedKeys(checkpoint, tensors, LayerNames(aliases), scaling)
    check_model(found)
    note = scaling.note if scaling is not None and found.used_scaling else ""
    report = LoraReport(checkpoint.path, len(checkpoint.tensors), found.skipped, note)
    return Lora(checkpoint, found.updates, found.changes, report)


def open_loras(choices: Sequence[LoraChoice], tensors: Mapping[str, TensorInfo], aliases: Aliases) -> list[Lora]:
    """The chosen LoRAs, opened for one model (see `open_lora`); what of them finds no place is logged."""
    loras = [open_lora(choice.path, tensors, aliases) for choice in choices]
    for lora in loras:
        logger.log(logging.WARNING if lora.report.skipped else logging.INFO, "LoRA %s", lora.report)
    return loras


def check_lora(checkpoint: Checkpoint) -> None:
    """CheckpointError unless a file is a LoRA of a known kind, and of one model."""
    path, keys = checkpoint.path, list(checkpoint.tensors)
    if not is_lora(keys):
        raise CheckpointError(
            f"{path}: no LoRA: none of its {len(keys)} tensors ({some(keys)}) has a LoRA's name; expected {EXPECTED}; "
            "choose a LoRA file"
        )
    unknown = sorted({kind for key in keys if (kind := unknown_kind(key)) is not None})
    if unknown:
        raise CheckpointError(
            f"{path}: a {' and '.join(unknown)}, which is not supported; expected LoRA, DoRA, LoHa, LoKr, GLoRA, OFT "
            "or BOFT; merge it into the model with what trained it (PEFT: merge_and_unload), and choose that model"
        )
    experts = {key.startswith("transformer_2.") for key in keys if key.startswith(("transformer.", "transformer_2."))}
    if len(experts) == 2:
        raise CheckpointError(
            f"{path}: holds the LoRAs of both experts of Wan 2.2 (transformer and transformer_2); expected one "
            f"expert's; make two files of it: {SPLIT.format(file=str(path))}"
        )


def check_model(found: SortedKeys) -> None:
    """CheckpointError unless most of what the file holds fits the model."""
    path, num_fitting = found.checkpoint.path, len(found.updates) + len(found.changes)
    if found.wider:
        layer, shape = next(iter(found.wider.items()))
        info = found.tensors[f"{layer}.weight"]
        raise CheckpointError(
            f"{path}: a control LoRA, which makes {layer} wider: {list(shape)}, the model has "
            f"{list(info.unpacked_shape)}; expected a LoRA that keeps the model's inputs; load a "
            "model that takes a control video (Wan Fun Control, VACE), or this with ComfyUI's own Load Diffusion Model"
        )
    if len(found.misfits) >= max(num_fitting, 1):
        layer, how = next(iter(found.misfits.items()))
        raise CheckpointError(
            f"{path}: a LoRA of another model: {len(found.misfits)} of its layers differ in size ({layer}: {how}); "
            "expected one for this model; choose a LoRA that was made for this model's size"
        )
    if not num_fitting:
        raise CheckpointError(
            f"{path}: a LoRA of another model: nothing in it fits ({some(found.skipped)}: "
            f"{next(iter(found.skipped.values()), 'no key')}); expected layers of this model, such as "
            f"{next(iter(found.tensors)).rpartition('.')[0]}; choose a LoRA that was made for this model"
        )
