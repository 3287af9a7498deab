"""Settings of torch.compile by how much VRAM there is, corrected where they lose or cannot go with streaming."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..system.sizes import GIB
from .settings import CompileSettings

CUSTOM, AUTO = "custom", "auto"
HIGH, MID, LOW = "high", "mid", "low"
PROFILES = (CUSTOM, AUTO, HIGH, MID, LOW)
DEFAULT_MODE = "default"
HIGH_GIB, MID_GIB = 24, 12  # of free VRAM, from which on
LEAN_SHARE = 0.3  # of the card: with less of it free, the leanest

# Measured: benchmarks/results/compiled_profiles_timed_h200_2026-11-29.json, where `high` compiled the output head.
NO_WHOLE_MODEL = (
    "the whole model as one graph: its blocks arrive one after the other, so each is a graph; the output head is none, "
    "as compiled it takes half a GiB more and gains no time"
)
NO_GRAPHS = (
    "CUDA graphs (mode {mode}): blocks write into tokens in place, for which inductor leaves graphs out, and a graph "
    "would keep memory of its own beside the ring; {instead} in its place"
)
# Measured: benchmarks/results/compiled_profiles_h200_2026-11-29.json, no code of a block within 295 s.
NO_TUNING = (
    "kernels of products tuned (mode {mode}): in code for any size each chunk's product is tuned anew, which takes "
    "minutes; {instead} in its place"
)


@dataclass(frozen=True)
class VideoMemory:
    """Bytes of the card, and of them those that are free or would be made free."""

    free_bytes: int
    total_bytes: int

    @property
    def free_share(self) -> float:
        return self.free_bytes / self.total_bytes if self.total_bytes else 0.0


def settings_of(profile: str, own: CompileSettings, memory: VideoMemory) -> CompileSettings:
    """The settings of a profile, with notes on what was corrected; of "custom" `own` ones as they are.

    Profiles leave the backend as it is in `own`: for another one than inductor there is no mode to choose.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} does not exist: use one of {', '.join(PROFILES)}")
    if profile == CUSTOM:
        return own
    chosen, why = (profile, "") if profile != AUTO else choose(memory)
    made = _corrected(replace(TIERS[chosen], backend=own.backend))
    name = chosen if profile != AUTO else f"{AUTO} ({chosen}: {why})"
    return replace(made, profile=name)


def choose(memory: VideoMemory) -> tuple[str, str]:
    """The profile for so much free VRAM, and why."""
    free = memory.free_bytes / GIB
    if memory.free_share < LEAN_SHARE:
        return LOW, f"{100 * memory.free_share:.0f} % of the VRAM is free, less than {100 * LEAN_SHARE:.0f} %"
    for name, least in ((HIGH, HIGH_GIB), (MID, MID_GIB)):
        if free >= least:
            return name, f"{free:.0f} GiB are free, {least} or more"
    return LOW, f"{free:.0f} GiB are free, less than {MID_GIB}"


# As they are written in guides; `_corrected` says what of them cannot be.
TIERS = {
    HIGH: CompileSettings(
        fullgraph=True,
        mode="max-autotune",
        dynamic=True,  # whole graphs end with an error where there are more versions than allowed: sizes share theirs
        transformer_blocks_only=False,
        cache_size_limit=8,
        recompile_limit=128,
    ),
    MID: CompileSettings(mode="reduce-overhead", dynamic=True, cache_size_limit=4, recompile_limit=64),
    LOW: CompileSettings(mode=DEFAULT_MODE, dynamic=True, cache_size_limit=2, recompile_limit=32),
}


def _corrected(settings: CompileSettings) -> CompileSettings:
    notes = [] if settings.transformer_blocks_only else [NO_WHOLE_MODEL]
    reasons = {"max-autotune": (NO_GRAPHS, NO_TUNING), "reduce-overhead": (NO_GRAPHS,)}.get(settings.mode, ())
    if settings.backend == "inductor":  # modes are its alone
        notes += [reason.format(mode=settings.mode, instead=DEFAULT_MODE) for reason in reasons]
    return replace(settings, mode=DEFAULT_MODE, transformer_blocks_only=True, notes=tuple(notes))
