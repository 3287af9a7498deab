"""Workflows in ComfyUI's UI format (0.4): nodes are added and wired in Python, places are found for them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .node_types import NODE_TYPES, NodeType, Widget

CORE = {"cnr_id": "comfy-core", "ver": "0.8.0"}
OURS = {"cnr_id": "lowvram-video", "aux_id": "lowvram-video/ComfyUI-LowVRAM-Video", "ver": "0.1.0"}
NODE_WIDTH, COLUMN_GAP, NODE_GAP, TITLE = 340, 70, 30, 30
GROUP_PADDING, GROUP_TITLE = 20, 50
FOOTER, BADGES = 30, 50  # of Nodes 2.0: under each node, and under those of packs, which may have advanced widgets
TEXT_HEIGHT = 170
NOTE_SIZE, HOST_WIDTH = (340, 560), 420
HOST_WIDGET, HOST_TEXT = 34, 120  # of a subgraph's node, which Nodes 2.0 draws higher than the canvas
BYPASSED = 4
PREVIEW = "$$canvas-image-preview"  # a widget of the page's: the pictures that a node is sent while it runs
INPUT_NODE, OUTPUT_NODE = -10, -20  # ids of what a subgraph takes from outside and gives there
OPENING, ROOT_GAP = [75, 105], 30  # where a workflow's corner is on the page, beside its bars; between its columns
RED_BOX, GREEN_BOX, GREY_BOX = "#8A3A3A", "#3A7A4A", "#555"  # of groups


@dataclass(frozen=True)
class ModelFile:
    """A download that ComfyUI offers when the file is missing."""

    name: str
    url: str
    directory: str

    def entry(self) -> dict[str, str]:
        return {"name": self.name, "url": self.url, "directory": self.directory}


@dataclass(frozen=True)
class Output:
    """An output of a node, to be wired into another one."""

    node: Node
    slot: int

    @property
    def kind(self) -> str:
        return self.node.kind.outputs[self.slot][1]

    def is_same(self, other: Output) -> bool:
        return self.node is other.node and self.slot == other.slot


@dataclass
class Node:
    """One node; its inputs are outputs of others by name."""

    id: int
    type: str
    kind: NodeType
    wires: dict[str, Output]
    values: dict[str, Any]
    title: str | None = None
    models: tuple[ModelFile, ...] = ()
    mode: int = 0
    keep_seed: bool = False  # its seed stays as it is after each run
    is_host: bool = False  # a subgraph, all of whose widgets have slots
    previewing: list[Node] = field(default_factory=list)  # of its nodes, those whose previews it shows
    size: tuple[int, int] = (0, 0)
    pos: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str | int) -> Output:
        slot = name if isinstance(name, int) else [output for output, _ in self.kind.outputs].index(name)
        return Output(self, slot)

    @property
    def inputs(self) -> list[tuple[str, str, bool]]:
        """(name, type, whether a widget) of what has a slot: all sockets, and the widgets that are wired."""
        sockets = [(name, kind, False) for name, kind in self.kind.sockets]
        wired = [(w.name, w.kind, True) for w in self.kind.widgets if self.is_host or w.name in self.wires]
        return [*sockets, *wired]


@dataclass
class Group:
    title: str
    nodes: Sequence[Node]
    colour: str = "#3f789e"


@dataclass(frozen=True)
class Inside:
    """What a subgraph's node `host` stands for; `source` has what comes from outside, `sink` takes what goes there."""

    host: Node
    nodes: Sequence[Node]
    source: Node
    sink: Node
    columns: Sequence[Sequence[Group]]


@dataclass
class Workflow:
    """`add` nodes, `fold` many of them into one, then `place` columns of groups of those that are left."""

    name: str
    nodes: list[Node] = field(default_factory=list)
    insides: list[Inside] = field(default_factory=list)

    def add(
        self,
        type: str,
        *,
        title: str | None = None,
        models: Iterable[ModelFile] = (),
        mode: int = 0,
        keep_seed: bool = False,
        **given: Any,
    ) -> Node:
        """A node; outputs are wired to the input of that name, other values go to the widget of that name."""
        kind = NODE_TYPES[type]
        wires = {name: value for name, value in given.items() if isinstance(value, Output)}
        values = {name: value for name, value in given.items() if not isinstance(value, Output)}
        values |= {name: wire.node.values["value"] for name, wire in wires.items() if wire.node.type == "PrimitiveInt"}
        known = {name for name, _ in kind.sockets} | {widget.name for widget in kind.widgets}
        assert set(given) <= known, f"{type} has no input {sorted(set(given) - known)}"
        node = Node(1 + self._last_id, type, kind, wires, values, title, tuple(models), mode, keep_seed)
        node.size = _size(node)
        self.nodes.append(node)
        return node

    def add_host(self, type: str, kind: NodeType, title: str, wires: dict[str, Output], values: dict[str, Any]) -> Node:
        """The node of a subgraph."""
        host = Node(1 + self._last_id, type, kind, dict(wires), values, title, is_host=True)
        host.size = _size(host)
        return host

    @property
    def _last_id(self) -> int:
        return max(
            (node.id for nodes in (self.nodes, *(each.nodes for each in self.insides)) for node in nodes), default=0
        )

    def place(self, columns: Sequence[Sequence[Node]], lower_last: int = 0) -> dict[str, Any]:
        """The workflow as JSON, its nodes in columns from left to right, the last one lower; it opens at 100 %."""
        _lay_out([[Group("", column)] for column in columns], ROOT_GAP)
        for node in columns[-1]:
            node.pos = (node.pos[0], node.pos[1] + lower_last)
        links = _links(self.nodes)
        placed = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"lowvram-video/{self.name}")),
            "revision": 0,
            "last_node_id": self._last_id,
            "last_link_id": len(links),
            "nodes": [_node_json(node, order, links) for order, node in enumerate(_in_order(self.nodes))],
            "links": links,
            "groups": [],
            "config": {},
            "extra": {"ds": {"scale": 1.0, "offset": OPENING}},
            "version": 0.4,
        }
        if self.insides:
            placed["definitions"] = {"subgraphs": [_inside_json(inside) for inside in self.insides]}
        return placed


def _lay_out(columns: Sequence[Sequence[Group]], gap: int = COLUMN_GAP) -> list[dict[str, Any]]:
    """Give nodes their places, groups below each other in their columns; the groups as JSON."""
    groups, x = [], 0
    for column in columns:
        y = 0
        for group in column:
            y = _stack(group, x, y)
            groups.append((group, *_bounds(group)))
            y += GROUP_TITLE + GROUP_PADDING + NODE_GAP
        x += max(node.size[0] for group in column for node in group.nodes) + gap
    return [_group_json(number + 1, *group) for number, group in enumerate(groups) if group[0].title]


def _in_order(nodes: Sequence[Node]) -> list[Node]:
    """Nodes after those that they take something from, else as they come."""
    waiting, found = list(nodes), []
    while waiting:
        feeding = {id(each) for each in waiting}
        free = next(node for node in waiting if not any(id(wire.node) in feeding for wire in node.wires.values()))
        waiting.remove(free)
        found.append(free)
    return found


def _links(nodes: Sequence[Node]) -> list[list[Any]]:
    links: list[list[Any]] = []
    for node in nodes:
        for slot, (name, kind, _) in enumerate(node.inputs):
            source = node.wires.get(name)
            if source is not None:
                assert kind in (source.kind, "*"), f"{node.type}.{name} takes {kind}, not {source.kind}"
                links.append([len(links) + 1, source.node.id, source.slot, node.id, slot, source.kind])
    return links


def _inside_json(inside: Inside) -> dict[str, Any]:
    """A subgraph's definition."""
    groups, links = _lay_out(inside.columns), _links([*inside.nodes, inside.sink])
    right = max(node.pos[0] + node.size[0] for node in inside.nodes)
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return {
        "id": inside.host.type,
        "version": 1,
        "state": {
            "lastGroupId": len(groups),
            "lastNodeId": max(node.id for node in inside.nodes),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": inside.host.title,
        "inputNode": {"id": INPUT_NODE, "bounding": [-300, 0, 160, 40 + 20 * len(inside.source.kind.outputs)]},
        "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 120, 0, 120, 40 + 20 * len(inside.sink.kind.sockets)]},
        "inputs": [
            _slot_json(inside, name, kind, [link[0] for link in links if (link[1], link[2]) == (INPUT_NODE, slot)])
            for slot, (name, kind) in enumerate(inside.source.kind.outputs)
        ],
        "outputs": [
            _slot_json(inside, name, kind, [link[0] for link in links if (link[3], link[4]) == (OUTPUT_NODE, slot)])
            for slot, (name, kind) in enumerate(inside.sink.kind.sockets)
        ],
        "widgets": [],
        "nodes": [_node_json(node, order, links) for order, node in enumerate(_in_order(inside.nodes))],
        "groups": groups,
        "links": [dict(zip(keys, link, strict=True)) for link in links],
        "extra": {},
    }


def _slot_json(inside: Inside, name: str, kind: str, link_ids: list[int]) -> dict[str, Any]:
    made = str(uuid.uuid5(uuid.UUID(inside.host.type), f"{name}/{kind}"))
    return {"id": made, "name": name, "type": kind, "linkIds": link_ids}


def _size(node: Node) -> tuple[int, int]:
    if node.type == "MarkdownNote":
        return NOTE_SIZE  # its text scrolls
    if node.is_host:
        rows = max(len(node.kind.sockets), len(node.kind.outputs))
        widgets = sum(HOST_TEXT if widget.multiline else HOST_WIDGET for widget in node.kind.widgets)
        return (HOST_WIDTH, 20 * rows + widgets + 2 * FOOTER)
    rows = max(len(node.inputs), len(node.kind.outputs))
    widgets = sum(TEXT_HEIGHT if widget.multiline else 24 for widget in node.kind.widgets)
    footer = BADGES if node.type.startswith("LowVRAM") else FOOTER
    return (NODE_WIDTH + node.kind.extra_width, 20 * rows + widgets + footer + node.kind.extra_height)


def _stack(group: Group, x: int, y: int) -> int:
    y += GROUP_TITLE if group.title else 0
    for node in group.nodes:
        y += TITLE
        node.pos = (x, y)
        y += node.size[1] + NODE_GAP
    return y


def _bounds(group: Group) -> tuple[int, int, int, int]:
    left = min(node.pos[0] for node in group.nodes) - GROUP_PADDING
    top = min(node.pos[1] for node in group.nodes) - TITLE - GROUP_TITLE
    right = max(node.pos[0] + node.size[0] for node in group.nodes) + GROUP_PADDING
    bottom = max(node.pos[1] + node.size[1] for node in group.nodes) + GROUP_PADDING
    return left, top, right - left, bottom - top


def _group_json(number: int, group: Group, *bounds: int) -> dict[str, Any]:
    return {
        "id": number,
        "title": group.title,
        "bounding": list(bounds),
        "color": group.colour,
        "font_size": 24,
        "flags": {},
    }


def _node_json(node: Node, order: int, links: list[list[Any]]) -> dict[str, Any]:
    arriving = {(link[3], link[4]): link[0] for link in links}
    inputs = []
    for slot, (name, kind, is_widget) in enumerate(node.inputs):
        entry: dict[str, Any] = {"name": name, "type": kind, "link": arriving.get((node.id, slot))}
        if name in node.kind.optional:
            entry["shape"] = 7
        if is_widget:
            entry["widget"] = {"name": name}
        inputs.append(entry)
    outputs = []
    for slot, (name, kind) in enumerate(node.kind.outputs):
        leaving = [link[0] for link in links if (link[1], link[2]) == (node.id, slot)]
        outputs.append({"name": name, "type": kind, "links": leaving or None})
    origin = OURS if node.type.startswith("LowVRAM") else CORE
    properties: dict[str, Any] = {"Node name for S&R": node.type, **origin}
    if node.is_host:
        properties["proxyWidgets"] = [["-1", widget.name] for widget in node.kind.widgets]
        properties["proxyWidgets"] += [[str(inner.id), PREVIEW] for inner in node.previewing]
        properties["previewExposures"] = [  # what newer pages have instead
            {"name": f"{PREVIEW}_{inner.id}", "sourceNodeId": str(inner.id), "sourcePreviewName": PREVIEW}
            for inner in node.previewing
        ]
        properties.pop("Node name for S&R")
    if node.models:
        properties["models"] = [model.entry() for model in node.models]
    entry = {
        "id": node.id,
        "type": node.type,
        "pos": list(node.pos),
        "size": list(node.size),
        "flags": {},
        "order": order,
        "mode": node.mode,
        "inputs": inputs,
        "outputs": outputs,
        "properties": properties,
        "widgets_values": [value for widget in node.kind.widgets for value in _widget_values(node, widget)],
    }
    if node.title:
        entry["title"] = node.title
    if node.kind.colour:
        entry["color"], entry["bgcolor"] = node.kind.colour
    return entry


def _widget_values(node: Node, widget: Widget) -> list[Any]:
    value = node.values.get(widget.name, widget.default)
    return [value, *(("fixed",) if node.keep_seed and "randomize" in widget.followed_by else widget.followed_by)]
