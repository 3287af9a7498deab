"""The names that jobs use for a workflow's values, and where those are in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .job import kind_of
from .workflow import Prompt


@dataclass(frozen=True)
class Place:
    """Inputs of nodes of one type, of those with a title where one is given (the start of it)."""

    type: str
    input: str
    title: str = ""


FRAMEPACK = "LowVRAMFramePackSampler"
# By the flag of `generate` that means the same. Of several places all that a workflow has are filled, of pictures and
# videos the first that it has.
PLACES: Mapping[str, tuple[Place, ...]] = MappingProxyType(
    {
        "prompt": (Place("CLIPTextEncode", "text", "Prompt"), Place("LowVRAMFramePackTimedPrompt", "text")),
        "negative_prompt": (Place("CLIPTextEncode", "text", "Negative prompt"),),
        "width": (Place("PrimitiveInt", "value", "Width"),),
        "height": (Place("PrimitiveInt", "value", "Height"),),
        "frames": (Place("PrimitiveInt", "value", "Frames"),),
        "fps": (Place("LowVRAMSaveVideo", "fps"), Place("CreateVideo", "fps")),
        "seed": (Place("KSampler", "seed"), Place("KSamplerAdvanced", "noise_seed"), Place(FRAMEPACK, "seed")),
        "steps": (Place("KSampler", "steps"), Place(FRAMEPACK, "steps")),
        "sampler": (Place("KSampler", "sampler_name"), Place(FRAMEPACK, "sampler")),
        "guidance": (Place("KSampler", "cfg"),),
        "cfg": (Place(FRAMEPACK, "cfg"),),
        "distilled_guidance": (Place(FRAMEPACK, "guidance_scale"),),
        "strength": (Place("KSampler", "denoise"),),
        "shift": (Place("ModelSamplingSD3", "shift"), Place(FRAMEPACK, "shift")),
        "seconds": (Place(FRAMEPACK, "total_second_length"),),
        "window": (Place(FRAMEPACK, "latent_window_size"),),
        "nag": (Place("LowVRAMNag", "scale"),),
        "vram_budget": (Place("LowVRAMBlockSwap", "vram_budget_gb"),),
        "ram_budget": (Place("LowVRAMBlockSwap", "ram_budget_gb"),),
    }
)
# Their values are files of this machine, which are sent.
FILES: Mapping[str, tuple[Place, ...]] = MappingProxyType(
    {
        "image": (
            Place("LoadImage", "image", "First frame"),
            Place("LoadImage", "image", "Start image"),
            Place("LoadImage", "image", "LoadImage"),
        ),
        "end_image": (Place("LoadImage", "image", "Last frame"), Place("LoadImage", "image", "End image")),
        "reference": (Place("LoadImage", "image", "Reference"),),
        "extend": (Place("LoadVideo", "file", "Video to go on from"),),
        "video": (Place("LoadVideo", "file", "Video to change"),),
        "control": (Place("LoadVideo", "file", "Control"),),
    }
)


@dataclass(frozen=True)
class JobValues:
    """What a job fills in: `values` by the names above, `nodes` by a node's title, type or number, then by input."""

    values: Mapping[str, Any]
    nodes: Mapping[str, Mapping[str, Any]]

    @property
    def files(self) -> dict[str, Path]:
        """Those of this machine that are sent."""
        return {name: Path(value) for name, value in self.values.items() if name in FILES}


def fill(prompt: Prompt, job: JobValues, sent: Mapping[str, str]) -> set[tuple[str, str]]:
    """Write a job's values into a prompt; the (node, input) that files were put to. `sent` are their names there.

    ValueError where the workflow has no place for a value.
    """
    filled: set[tuple[str, str]] = set()
    for name, value in job.values.items():
        if name in FILES:
            found = next(filter(None, (_find(prompt, place) for place in FILES[name])), [])
            filled |= set(found)
        else:
            found = [at for place in PLACES[name] for at in _find(prompt, place)]
        if not found:
            raise ValueError(f"{name}: this workflow has no place for it; give nodes: {{title: {{input: value}}}}")
        for number, key in found:
            prompt.graph[number]["inputs"][key] = sent.get(name, value)
    for name, inputs in job.nodes.items():
        for number in _named(prompt, name):
            prompt.graph[number]["inputs"].update(inputs)
    return filled


def check_names(values: Mapping[str, Any]) -> None:
    """ValueError for a name that no workflow has a place for, and for what no widget takes."""
    known = {**PLACES, **FILES}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{name!r} is no value of a workflow: {', '.join(known)}, or nodes: {{title: {{...}}}}")
        fits, wanted = (str, "a path") if name in FILES else (str | int | float, "text or a number")
        if isinstance(value, bool) or not isinstance(value, fits):
            raise ValueError(f"{name} is {kind_of(value)}: expected {wanted}")


def _find(prompt: Prompt, place: Place) -> list[tuple[str, str]]:
    return [
        (number, place.input)
        for number, node in prompt.graph.items()
        if node["class_type"] == place.type and prompt.titles[number].startswith(place.title)
    ]


def _named(prompt: Prompt, name: str) -> list[str]:
    """The nodes of this title, or else of this type, or of this number."""
    by_title = [number for number, title in prompt.titles.items() if title == name]
    by_type = [number for number, node in prompt.graph.items() if node["class_type"] == name]
    found = by_title or by_type or [number for number in prompt.graph if number == name]
    if not found:
        raise ValueError(f"nodes: this workflow has none that is called {name!r}, by title, type or number")
    return found
