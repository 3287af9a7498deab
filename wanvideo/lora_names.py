"""The names that layers of Wan transformers go by in LoRA files."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .checkpoint import DIFFUSERS_BLOCK_NAMES, DIFFUSERS_NAMES, with_start

BLOCK = re.compile(r"(?P<block>(?:vace_)?blocks\.\d+)\.(?P<rest>.+)")
# official -> diffusers, by the tables that read diffusers' files
TO_DIFFUSERS = {official: theirs for theirs, official in DIFFUSERS_NAMES.items()}
BLOCK_TO_DIFFUSERS = {official: theirs for theirs, official in DIFFUSERS_BLOCK_NAMES.items()}


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
        return with_start(name, TO_DIFFUSERS)
    return f"{match['block']}.{with_start(match['rest'], BLOCK_TO_DIFFUSERS)}"
