"""LoRAs of Wan transformers: the names that layers go by, and a model's files opened for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from ..weights.lora import LoraChoice, open_lora
from ..weights.lora_source import AttachedLoras, Source
from .checkpoint import DIFFUSERS_BLOCK_NAMES, DIFFUSERS_NAMES
from .model import WanModel

logger = logging.getLogger(__name__)

BLOCK = re.compile(r"(?P<block>(?:vace_)?blocks\.\d+)\.(?P<rest>.+)")
# official -> diffusers, by the tables that read diffusers' files
TO_DIFFUSERS = {official: theirs for theirs, official in DIFFUSERS_NAMES.items()}
BLOCK_TO_DIFFUSERS = {official: theirs for theirs, official in DIFFUSERS_BLOCK_NAMES.items()}


def attach_wan_loras(
    model: WanModel, source: Source, choices: Sequence[LoraChoice], dtype: torch.dtype, mode: str
) -> AttachedLoras:
    """The chosen LoRAs on a model that is on the meta device; what of them finds no place is logged.

    Raises CheckpointError for a file that is no LoRA, or one of another model.
    """
    aliases = wan_aliases(source.tensors)
    loras = [open_lora(choice.path, source.tensors, aliases) for choice in choices]
    for lora in loras:
        logger.log(logging.WARNING if lora.report.skipped else logging.INFO, "LoRA %s", lora.report)
    return AttachedLoras(model, source, loras, [choice.strength for choice in choices], dtype, mode)


def wan_aliases(names: Iterable[str]) -> dict[str, str]:
    """Every name, in any layout, of a model's layers and tensors -> its official one; `names` are its tensors'."""
    aliases: dict[str, str] = {}
    for name in names:
        for official in (name, name.rpartition(".")[0]):
            aliases[official] = official
            aliases[_diffusers_name(official)] = official
    return aliases


def _diffusers_name(name: str) -> str:
    match = BLOCK.fullmatch(name)
    if match is None:
        return _with_start(name, TO_DIFFUSERS)
    return f"{match['block']}.{_with_start(match['rest'], BLOCK_TO_DIFFUSERS)}"


def _with_start(name: str, table: Mapping[str, str]) -> str:
    for official, theirs in table.items():
        if name == official or name.startswith(official + "."):
            return theirs + name[len(official) :]
    return name
