"""A workflow as ComfyUI's page saves it, made the prompt that its server takes.

Sources: the format 0.4 of ComfyUI's frontend; its `graphToPrompt` for what becomes of widgets and bypassed nodes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .subgraphs import BYPASSED, MUTED, VALUES, unfolded

OF_THE_PAGE = ("MarkdownNote", "Note")  # nodes that no server knows
VIRTUAL = ("Reroute", "PrimitiveNode")  # of the page, but with wires
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
ADDING = ("control_after_generate", "image_upload", "video_upload")  # each is one more entry of widgets_values

Graph = dict[str, dict[str, Any]]  # as POST /prompt takes it: {id: {class_type, inputs}}
ObjectInfo = Mapping[str, Any]  # what GET /object_info says of nodes


@dataclass(frozen=True)
class Prompt:
    """A graph, and what its nodes are called: their titles, or else their types."""

    graph: Graph
    titles: Mapping[str, str]


def make_prompt(workflow: Mapping[str, Any], object_info: ObjectInfo) -> Prompt:
    """The prompt of a workflow, or of what the page saves as "API" format. ValueError for one that is neither."""
    if workflow and all(isinstance(node, dict) and "class_type" in node for node in workflow.values()):
        graph = copy.deepcopy(dict(workflow))
        titles = {key: str((node.get("_meta") or {}).get("title") or node["class_type"]) for key, node in graph.items()}
        plain = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in graph.items()}
        return Prompt(plain, titles)
    if not isinstance(workflow.get("nodes"), list) or not isinstance(workflow.get("links"), list):
        raise ValueError("it is no workflow of ComfyUI's: save one from its page")
    if (workflow.get("definitions") or {}).get("subgraphs"):
        try:
            workflow = unfolded(workflow)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"its subgraphs are not as ComfyUI's page saves them ({error!r}): save it there anew"
            ) from error
    return _from_page(workflow, object_info)


def _from_page(workflow: Mapping[str, Any], object_info: ObjectInfo) -> Prompt:
    wires = _Wires(workflow)
    graph: Graph = {}
    titles: dict[str, str] = {}
    for node in workflow["nodes"]:
        kind, number = node["type"], str(node["id"])
        if kind in OF_THE_PAGE or node.get("mode") in (MUTED, BYPASSED):
            continue
        if kind in VIRTUAL:
            raise ValueError(f"it has a {kind}, which is of ComfyUI's page: save it there as API format")
        if kind not in object_info:
            raise ValueError(f"it has a {kind} (node {number}), which the server does not know: install what has it")
        inputs = _widget_inputs(object_info[kind]["input"], node.get("widgets_values") or [])
        for slot in node.get("inputs", []):
            source = wires.source(slot.get("link"))
            if source is not None:
                inputs[slot["name"]] = list(source)
        inputs |= node.get(VALUES, {})
        graph[number] = {"class_type": kind, "inputs": inputs}
        titles[number] = str(node.get("title") or kind)
    return Prompt(graph, titles)


class _Wires:
    """What feeds an input, through bypassed nodes."""

    def __init__(self, workflow: Mapping[str, Any]) -> None:
        self._nodes = {node["id"]: node for node in workflow["nodes"]}
        self._links = {link[0]: link for link in workflow["links"]}

    def source(self, link: Any) -> tuple[str, int] | None:
        """(node, output) that feed a link; None where nothing that runs does."""
        for _ in range(len(self._links) + 1):  # no longer: wires in a circle end
            found = self._links.get(link)
            node = None if found is None else self._nodes.get(found[1])
            if found is None or node is None or node.get("mode") == MUTED:
                return None
            if node.get("mode") != BYPASSED:
                return str(found[1]), int(found[2])
            link = self._through(node, int(found[2]), found[5])
        return None

    def _through(self, node: Mapping[str, Any], output: int, kind: Any) -> Any:
        """The link that a bypassed node passes on: of the input in the output's place, or the first of its type."""
        inputs = node.get("inputs", [])
        in_place = inputs[output : output + 1]
        for slot in [*in_place, *inputs]:
            if slot.get("type") == kind and slot.get("link") is not None:
                return slot["link"]
        return None


def _widget_inputs(schema: Mapping[str, Any], given: Any) -> dict[str, Any]:
    """A node's widgets by name. Values are in the order of the schema, or by name as some nodes save them."""
    if isinstance(given, dict):
        return dict(given)
    values = list(given)
    return _taken(schema, values, "")


def _taken(schema: Mapping[str, Any], values: list[Any], prefix: str) -> dict[str, Any]:
    """Values of a schema's widgets, taken from the front of `values`; defaults where those end."""
    inputs: dict[str, Any] = {}
    for section in ("required", "optional"):
        for name, spec in (schema.get(section) or {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if options.get("forceInput") or not (isinstance(kind, list) or kind in WIDGETS or kind == DYNAMIC):
                continue
            value = values.pop(0) if values else _default(kind, options)
            if values and any(options.get(key) for key in ADDING):
                values.pop(0)
            inputs[prefix + name] = value
            if kind == DYNAMIC:
                chosen = [option for option in options["options"] if option["key"] == value]
                for option in chosen:
                    inputs |= _taken(option["inputs"], values, f"{prefix}{name}.")
    return inputs


def _default(kind: Any, options: Mapping[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    if kind == DYNAMIC:
        return options["options"][0]["key"]
    choices = kind if isinstance(kind, list) else options.get("options") or [None]
    return choices[0]


def check_prompt(prompt: Prompt, object_info: ObjectInfo, filled: set[tuple[str, str]]) -> None:
    """ValueError where the server would refuse a prompt, as far as its schema tells.

    `filled` are the (node, input) whose files are sent with the job: what the server has does not matter there.
    """
    for number, node in prompt.graph.items():
        info = object_info.get(node["class_type"])
        name = f"{prompt.titles[number]} (node {number})"
        if info is None:
            raise ValueError(f"{name}: the server has no {node['class_type']}: install what has it")
        for section in ("required", "optional"):
            for key, spec in (info["input"].get(section) or {}).items():
                if key not in node["inputs"]:
                    if section == "required" and spec[0] != DYNAMIC:
                        raise ValueError(f"{name} has no {key}: connect it, or give it a value")
                elif (number, key) not in filled:
                    _check_value(f"{name}, {key}", node["inputs"][key], spec)


def _check_value(name: str, value: Any, spec: Any) -> None:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(value, list):  # a wire
        return
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if choices and value not in choices:
        some = ", ".join(str(each) for each in choices[:5]) + (" ..." if len(choices) > 5 else "")
        raise ValueError(f"{name}: the server has no {value!r}; it has {some}")
    if kind in ("INT", "FLOAT") and not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}: expected a number")
    if kind in ("INT", "FLOAT"):
        low, high = options.get("min", value), options.get("max", value)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}: expected {low} to {high}")
