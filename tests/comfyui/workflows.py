"""The example workflows as the tests run them: as prompts, in small sizes (see `tiny_files`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import model_files as files
from .server import Graph

FOLDER = Path(__file__).parents[2] / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
NOT_RUN = {"MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
ADDING = ("control_after_generate", "image_upload", "video_upload")  # another entry in widgets_values
# loaders whose files ComfyUI wants in their full size
STAND_INS: Graph = {
    "CLIPLoader": {"class_type": "TestTextEncoder", "inputs": {"pooled": False}},
    "LowVRAMLoadClipGGUF": {"class_type": "TestTextEncoder", "inputs": {"pooled": False}},
    "DualCLIPLoader": {"class_type": "TestTextEncoder", "inputs": {"pooled": True}},
    "CLIPVisionLoader": {"class_type": "TestImageEncoder", "inputs": {}},
}
FIXED_VAES = {files.VAE_22.name, files.HUNYUAN_VAE.name}  # of one size in core
# of FramePack: two sections of 2 latents in 64x64
SMALL = {
    "LowVRAMSparseAttention": {"error_bound": 0.0},  # a processor has no kernel for it
    "LowVRAMTorchCompile": {"backend": "cudagraphs"},  # which a processor has nothing to compile for
    "LowVRAMSeveralGPUs": {"devices": "cpu,cpu"},  # threads of the processor stand for cards
    "LowVRAMStepCache": {"method": "first_block"},  # tiny models have no published table
    "LowVRAMFramePackNearestBucket": {"base_resolution": 64},
    "LowVRAMFramePackSampler": {"total_second_length": 0.5, "latent_window_size": 2, "steps": 2},
}


def load(name: str) -> dict[str, Any]:
    """A workflow as shipped."""
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


# --- prompts ---------------------------------------------------------------------------------------------


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    """The API format of a UI workflow, as the browser makes it; `object_info` is the server's /object_info."""
    graph: Graph = {}
    for number, node, sources in flat_nodes(workflow):
        inputs = _widget_inputs(object_info[node["type"]]["input"], list(node["widgets_values"]))
        inputs.update(sources)
        graph[number] = {"class_type": node["type"], "inputs": inputs}
    return graph


def flat_nodes(workflow: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(id, node, what its inputs are linked to) of all nodes that run, those in subgraphs in the place of these."""
    folded = {each["id"]: each for each in workflow.get("definitions", {}).get("subgraphs", ())}
    hosts = {node["id"]: (node, folded[node["type"]]) for node in workflow["nodes"] if node["type"] in folded}
    running = {node["id"] for node in workflow["nodes"] if _runs(node)}
    links = {link[0]: link for link in workflow["links"]}

    def outside(link: int | None) -> list[Any] | None:
        """Where a link on the page comes from."""
        if link is None or links[link][1] not in running:
            return None
        origin, slot = links[link][1:3]
        if origin not in hosts:
            return [str(origin), slot]
        inner = next(
            each for each in hosts[origin][1]["links"] if (each["target_id"], each["target_slot"]) == (-20, slot)
        )
        return [f"{origin}:{inner['origin_id']}", inner["origin_slot"]]

    found = []
    for node in workflow["nodes"]:
        if node["id"] in hosts:
            found += _inner_nodes(node, hosts[node["id"]][1], outside)
        elif _runs(node):
            found.append((str(node["id"]), node, _sources(node, outside)))
    return found


def _inner_nodes(
    host: dict[str, Any], folded: dict[str, Any], outside: Callable[[int | None], list[Any] | None]
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The nodes of one subgraph; a widget of its node on the page gives its value to those inside."""
    links = {link["id"]: link for link in folded["links"]}
    widgets = [slot["name"] for slot in host["inputs"] if "widget" in slot]
    values = dict(zip(widgets, host["widgets_values"], strict=True))

    def inside(link: int | None) -> Any:
        if link is None:
            return None
        origin, slot = links[link]["origin_id"], links[link]["origin_slot"]
        if origin != -10:
            return [f"{host['id']}:{origin}", slot]
        given = host["inputs"][slot]
        return values[given["name"]] if given["name"] in values else outside(given["link"])

    return [(f"{host['id']}:{node['id']}", node, _sources(node, inside)) for node in folded["nodes"] if _runs(node)]


def _sources(node: dict[str, Any], source: Callable[[int | None], Any]) -> dict[str, Any]:
    found = {slot["name"]: source(slot["link"]) for slot in node["inputs"]}
    return {name: value for name, value in found.items() if value is not None}


def _runs(node: dict[str, Any]) -> bool:
    return node["mode"] == 0 and node["type"] not in NOT_RUN


def _widget_inputs(schema: dict[str, Any], values: list[Any], prefix: str = "") -> dict[str, Any]:
    """Values of a schema's widgets, taken from the front of `values`; defaults where those end."""
    inputs: dict[str, Any] = {}
    for section in ("required", "optional"):
        for name, spec in schema.get(section, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if not (isinstance(kind, list) or kind in WIDGET_TYPES or kind == DYNAMIC):
                continue
            value = values.pop(0) if values else _default(kind, options)
            if values and any(options.get(key) for key in ADDING):
                values.pop(0)
            inputs[prefix + name] = value
            if options.get("video_upload"):
                inputs["video-preview"] = ""  # the page's player, which is a widget too
            if kind == DYNAMIC:
                chosen = next(option for option in options["options"] if option["key"] == value)
                inputs |= _widget_inputs(chosen["inputs"], values, f"{prefix}{name}.")
    return inputs


def _default(kind: Any, options: dict[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    if kind == DYNAMIC:
        return options["options"][0]["key"]
    return kind[0] if isinstance(kind, list) else options["options"][0]


def for_test(
    prompt: Graph, width: int = 64, height: int = 48, length: int = 5, steps: int = 2, full_size: bool = False
) -> Graph:
    """A small, short copy with stand-ins for text encoder, CLIP vision and, but for `full_size`, VAEs of one size."""
    graph = copy.deepcopy(prompt)
    for number, node in list(graph.items()):
        kind, inputs = node["class_type"], node["inputs"]
        if kind in STAND_INS:
            graph[number] = copy.deepcopy(STAND_INS[kind])
        elif kind == "VAELoader" and inputs["vae_name"] in FIXED_VAES and not full_size:
            graph[number] = {"class_type": "TestTinyVAE", "inputs": inputs}
        elif kind == "KSampler":
            inputs["steps"] = steps
        inputs.update(SMALL.get(kind, {}))
    for value, number in zip((width, height, length), size_nodes(graph), strict=False):
        graph[number]["inputs"]["value"] = value
    return graph


def size_nodes(graph: Graph) -> list[str]:
    """The nodes of width, height and frames; none where a picture decides."""
    plan = next((node for node in graph.values() if node["class_type"] == "LowVRAMPlan"), None)
    if plan is None:
        return []
    sources = [plan["inputs"][name][0] for name in ("width", "height") if isinstance(plan["inputs"][name], list)]
    if any(graph[number]["class_type"] != "PrimitiveInt" for number in sources):
        return []
    return [*sources, plan["inputs"]["length"][0]]
