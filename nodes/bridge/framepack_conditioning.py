"""What FramePack's own input nodes put on the wires, and FramePack Sampler reads from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...framepack.request import Interpolation
from ...framepack.timed_prompts import TimedPrompt
from .carried import HOOKED

TIMED_KEY = "lowvram_timed_prompt"  # in the options of a CONDITIONING's entries
NAME_KEY = "lowvram_prompt"

ENCODED = {"pooled_output", "attention_mask", "guidance", TIMED_KEY, NAME_KEY}  # what a prompt is
# How and when it is heard: done by core's samplers.
GUIDED = {"start_percent", "end_percent", "strength", "mask", "mask_strength", "set_area_to_bounds", "default"}
REFUSED = {
    "hooks": HOOKED,
    "area": "a prompt for an area is not for FramePack Sampler (Low VRAM), whose history is of the whole picture: use "
    "a mask (Conditioning Set Mask), or take that node out",
    "control": "a ControlNet is not for FramePack Sampler (Low VRAM), whose network has no place for it: take it out",
    "gligen": "GLIGEN is not for FramePack Sampler (Low VRAM), whose network has no place for it: take it out",
}


@dataclass(frozen=True)
class EndImageOptions:
    """The picture that a video goes to, as LATENT and CLIP_VISION_OUTPUT, and how its features and the start's mix."""

    latent: dict[str, Any] | None
    features: Any
    start_strength: float
    interpolation: Interpolation


def timed_entries(clip: Any, timed: TimedPrompt) -> list[list[Any]]:
    """A CONDITIONING with an entry for each of the prompts, which tells of all of them. ValueError without a CLIP."""
    if clip is None:
        raise ValueError(
            "there is no CLIP: the file that a checkpoint loader opened has none in it; connect Load CLIP (Dual), type "
            "hunyuan_video"
        )
    entries = []
    for prompt in timed.prompts():
        text, options = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0]
        entries.append([text, {**options, NAME_KEY: prompt, TIMED_KEY: timed}])
    return entries


def check_options(conditioning: list[Any], name: str) -> None:
    """ValueError where a node gave the prompt what FramePack Sampler would leave out, several at a time, or none."""
    if len(conditioning) > 1 and name == "negative" and _is_timed(conditioning):
        raise ValueError(
            "FramePack Timed Prompt is heard as the positive conditioning of FramePack Sampler (Low VRAM), and the "
            f"negative one has {len(conditioning)} prompts of it: write one, or connect CLIP Text Encode"
        )
    if len(conditioning) > 1 and not is_guided(conditioning) and not _is_timed(conditioning):
        raise ValueError(
            f"the {name} conditioning has {len(conditioning)} entries (of Conditioning Combine), and FramePack hears "
            "one prompt at a time: write one, connect FramePack Timed Prompt as positive, or give each its range "
            "of steps or its mask"
        )
    for _, options in conditioning:
        for key, value in options.items():
            if key == "guidance" and value is None:
                raise ValueError(
                    f"the {name} prompt is without guidance (FluxDisableGuidance), and FramePack was trained with one: "
                    "take that node out, and set guidance_scale"
                )
            if value is None or key in ENCODED or key in GUIDED:
                continue
            raise ValueError(REFUSED.get(key) or _unheard(name, key))
    silent = _silent_from(conditioning)
    if silent < 1:
        raise ValueError(
            f"no {name} prompt is heard from {silent:.0%} of the steps on, and FramePack makes nothing without one: "
            "give another prompt those steps (Conditioning Set Timestep Range, Conditioning Combine), or take the "
            "range out"
        )


def _silent_from(conditioning: list[Any]) -> float:
    """The share of the steps after which no entry is heard; 1 where one always is."""
    if any(options.get("default") for _, options in conditioning):  # heard where no other is
        return 1.0
    ranges = [[options.get(key) for key in ("start_percent", "end_percent")] for _, options in conditioning]
    heard = 0.0
    for start, end in sorted((start or 0.0, 1.0 if end is None else end) for start, end in ranges):
        if start > heard:
            break
        heard = max(heard, end)
    return heard if conditioning else 1.0


def _unheard(name: str, key: str) -> str:
    return (
        f"a node gives the {name} prompt {key!r}, which FramePack Sampler (Low VRAM) does not hear: take out the node "
        "between the text encoder and this one that does"
    )


def _is_timed(conditioning: list[Any]) -> bool:
    return any(TIMED_KEY in options for _, options in conditioning)


def is_guided(conditioning: list[Any]) -> bool:
    """Whether core's own way of hearing prompts is needed: for several at a time, their ranges and masks."""
    return any(options.get(key) is not None for _, options in conditioning for key in GUIDED)


def timed_prompt_of(conditioning: list[Any]) -> tuple[TimedPrompt, list[tuple[str, Tensor, dict[str, Any]]]]:
    """The schedule of a CONDITIONING and its (name, text, options) entries; any other node's is one prompt.

    ValueError for one that is empty, or put together from several nodes.
    """
    if not conditioning:
        raise ValueError("the positive conditioning is empty: connect CLIP Text Encode or FramePack Timed Prompt")
    _, options = conditioning[0]
    timed = options.get(TIMED_KEY)
    if timed is None and not _is_timed(conditioning):
        text, options = conditioning[0]  # the others beside it: see `is_guided`
        return TimedPrompt("prompt"), [("prompt", text, options)]
    if any(options.get(TIMED_KEY) is not timed for _, options in conditioning):
        raise ValueError(
            "FramePack Timed Prompt cannot be combined with other conditioning: connect it to the sampler directly and "
            "write all of the prompt into it"
        )
    return timed, [(options[NAME_KEY], text, options) for text, options in conditioning]
