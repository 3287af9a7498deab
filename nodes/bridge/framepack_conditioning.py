"""What FramePack's own input nodes put on the wires, and FramePack Sampler reads from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...framepack.request import Interpolation
from ...framepack.timed_prompts import TimedPrompt

TIMED_KEY = "lowvram_timed_prompt"  # in the options of a CONDITIONING's entries
NAME_KEY = "lowvram_prompt"


@dataclass(frozen=True)
class EndImageOptions:
    """The picture that a video goes to, as LATENT and CLIP_VISION_OUTPUT, and how its features and the start's mix."""

    latent: dict[str, Any] | None
    features: Any
    start_strength: float
    interpolation: Interpolation


def timed_entries(clip: Any, timed: TimedPrompt) -> list[list[Any]]:
    """A CONDITIONING with an entry for each of the prompts, which tells of all of them."""
    entries = []
    for prompt in timed.prompts():
        text, options = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0]
        entries.append([text, {**options, NAME_KEY: prompt, TIMED_KEY: timed}])
    return entries


def single_prompt_of(conditioning: list[Any], name: str) -> tuple[Tensor, dict[str, Any]]:
    """The text and options of a CONDITIONING with one entry. ValueError for one that was combined."""
    if len(conditioning) > 1:
        raise ValueError(
            f"the {name} conditioning has {len(conditioning)} entries (of Conditioning Combine, areas or ranges), and "
            "FramePack hears one prompt at a time: write one prompt, or connect FramePack Timed Prompt as positive"
        )
    text, options = conditioning[0]
    return text, options


def timed_prompt_of(conditioning: list[Any]) -> tuple[TimedPrompt, list[tuple[str, Tensor, dict[str, Any]]]]:
    """The schedule of a CONDITIONING and its (name, text, options) entries; any other node's is one prompt.

    ValueError for one that is empty, or put together from several nodes.
    """
    if not conditioning:
        raise ValueError("the positive conditioning is empty: connect CLIP Text Encode or FramePack Timed Prompt")
    _, options = conditioning[0]
    timed = options.get(TIMED_KEY)
    if timed is None and not any(TIMED_KEY in options for _, options in conditioning):
        text, options = single_prompt_of(conditioning, "positive")
        return TimedPrompt("prompt"), [("prompt", text, options)]
    if any(options.get(TIMED_KEY) is not timed for _, options in conditioning):
        raise ValueError(
            "FramePack Timed Prompt cannot be combined with other conditioning: connect it to the sampler directly and "
            "write all of the prompt into it"
        )
    return timed, [(options[NAME_KEY], text, options) for text, options in conditioning]
