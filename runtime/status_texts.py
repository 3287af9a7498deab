"""What is said of a run while it goes on, in a few words each; `web/texts` has the same in other languages."""

from __future__ import annotations

from ..system.sizes import in_gib

PREPARING = "reading prompts and pictures"
LOADING = "loading the model"
UPSCALING = "upscaling"
PHASES = {"load": LOADING, "upscale": UPSCALING}  # by the titles that runs tell a `Progress`


def loading(num_bytes: int, merges: bool) -> str:
    """So many bytes of weights are read, with LoRAs merged into some of them or without."""
    return f"merging LoRAs into {in_gib(num_bytes)} of weights" if merges else f"loading {in_gib(num_bytes)} of weights"


def loading_for(text: str, seconds: float) -> str:
    """The same, once it has taken a while."""
    return f"{text}, {seconds:.0f} s"


def section_step(section: int, num_sections: int, step: int, num_steps: int) -> str:
    """The step that is done, of the section that is made: both counted from 1."""
    return f"section {section} of {num_sections}, step {step} of {num_steps}"


def decoding(section: int, num_sections: int) -> str:
    """The steps of this section, counted from 1, are done; 0: they were in an earlier run, or it was given."""
    return f"section {section} of {num_sections}, decoding" if section else "decoding"


def sections_done(num_sections: int) -> str:
    """The whole run is."""
    return f"sections done: {num_sections}"
