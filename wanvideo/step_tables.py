"""Which table of a step cache goes with a Wan model: its own, one by name or file, or the published one that suits."""

from __future__ import annotations

from pathlib import Path

from ..sampling.caching.settings import AUTO, FIRST_BLOCK, StepCacheSettings
from ..sampling.caching.tables import CALIBRATE, SUFFIX, CacheTable, published_tables, read_table
from ..weights.files.fingerprint import fingerprint
from .network.config import WanConfig

# What tells models of one shape apart: words of their files' names.
NAMES_2_2 = ("2.2", "2_2", "a14b", "high_noise", "highnoise", "low_noise", "lownoise")
NAMES_720 = ("720",)


def choose_table(settings: StepCacheSettings, config: WanConfig, path: Path) -> CacheTable:
    """The table for the model in the file `path`. ValueError where none is known, or the one that was asked for is not
    there."""
    own, wanted = own_table(path), settings.table
    published = published_tables()
    if wanted in published:
        return published[wanted]
    if wanted != AUTO:
        file = Path(wanted)
        if not file.is_file():
            raise ValueError(
                f"the step cache's table {wanted!r} is no file, nor one of {', '.join(published)}: use auto, one of "
                f"these, or {CALIBRATE}"
            )
        return read_table(file, fingerprint(path))
    if settings.method == FIRST_BLOCK:  # needs none: one that is damaged is in nobody's way
        return CacheTable(path.name)
    if own.is_file():
        return read_table(own, fingerprint(path))
    name = suitable(config, path.name)
    if name is None:
        raise ValueError(
            f"no table of a step cache is published for a Wan {config.model_type} model of {config.dim} channels such "
            f"as {path.name}: use first_block, or {CALIBRATE} {path.name}"
        )
    return published[name]


def own_table(path: Path) -> Path:
    """Where a model's own table is: beside its file."""
    return path.with_name(path.name.removesuffix(path.suffix) + SUFFIX)


def suitable(config: WanConfig, file_name: str) -> str | None:
    """The published table for a model of these dimensions, by its file's name where several models share them."""
    words = file_name.lower()
    if config.out_channels != 16 or config.dim not in (1536, 5120):
        return None
    if config.dim == 1536:
        return "wan2.1_t2v_1.3B"
    shown = config.model_type in ("i2v", "flf2v")
    if shown and not config.image_dim:
        return "wan2.2_i2v_A14B"
    if shown:
        return "wan2.1_i2v_720p" if any(name in words for name in NAMES_720) else "wan2.1_i2v_480p"
    return "wan2.2_t2v_A14B" if any(name in words for name in NAMES_2_2) else "wan2.1_t2v_14B"
