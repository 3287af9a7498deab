"""The families of models that this package runs, and which of them a file belongs to."""

from __future__ import annotations

from pathlib import Path

from ..framepack.family import FRAMEPACK
from ..runtime.family import Family
from ..wanvideo.family import WAN
from ..weights.files.checkpoint import CheckpointError
from ..weights.files.kinds import file_kind
from ..weights.files.open import open_checkpoint

FAMILIES: tuple[Family, ...] = (WAN, FRAMEPACK)


def family_of_kind(kind: str) -> Family | None:
    """The family whose transformers are files of this kind (see `file_kind`)."""
    return next((family for family in FAMILIES if family.wanted.kind == kind), None)


def family_of(path: str | Path) -> Family:
    """The family of a transformer file, by its header; CheckpointError, which says what the file is, for others."""
    found = file_kind(open_checkpoint(path).tensors)
    family = family_of_kind(found.kind)
    if family is None:
        titles = " or ".join(family.wanted.title.removeprefix("a ").removesuffix(" transformer") for family in FAMILIES)
        names = ", ".join(family.wanted.file_names for family in FAMILIES)
        raise CheckpointError(
            f"{path}: this is {found.title}; expected a {titles} transformer; choose such a file ({names})"
        )
    return family
