"""Subgraphs: nodes of a workflow that the page shows as one, with the widgets that people set on it.

Format: `definitions.subgraphs` of ComfyUI's page. A widget of the one node is an input with a link inside, and has its
value in `widgets_values`, in their order.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .graph import INPUT_NODE, OUTPUT_NODE, Group, Inside, Node, Output, Workflow
from .node_types import NodeType, Widget

SAMPLERS = ("KSampler", "KSamplerAdvanced", "LowVRAMFramePackSampler")


@dataclass(frozen=True)
class Promoted:
    """A widget of a node inside that is shown outside, under another name where there is one."""

    node: Node
    widget: str
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.widget

    @property
    def kind(self) -> Widget:
        """The widget outside: what the browser adds to a value is inside."""
        inside = next(widget for widget in self.node.kind.widgets if widget.name == self.widget)
        return replace(inside, name=self.name, followed_by=())

    @property
    def value(self) -> object:
        return self.node.values.get(self.widget, self.kind.default)


def fold(
    graph: Workflow,
    title: str,
    columns: Sequence[Sequence[Group]],
    promoted: Sequence[Promoted],
    given: Mapping[str, Output] | None = None,
) -> Node:
    """One node in the place of all nodes of `columns`, which are laid out inside of it.

    What they take from other nodes becomes its inputs, what others take from them its outputs: those `given`, if any.
    """
    inside = [node for column in columns for group in column for node in group.nodes]
    outside = [node for node in graph.nodes if all(node is not each for each in inside)]
    arriving = _named(wire for node in inside for wire in node.wires.values() if _is_of(wire, outside))
    leaving = dict(given or _named(w for node in outside for w in node.wires.values() if _is_of(w, inside)))
    kind = NodeType(
        sockets=tuple((name, output.kind) for name, output in arriving.items()),
        widgets=tuple(each.kind for each in promoted),
        outputs=tuple((name, output.kind) for name, output in leaving.items()),
    )
    made = str(uuid.uuid5(uuid.NAMESPACE_URL, f"lowvram-video/{graph.name}/{title}"))
    host = graph.add_host(made, kind, title, arriving, {each.name: each.value for each in promoted})
    host.previewing = [node for node in inside if node.type in SAMPLERS]
    _rewire(outside, leaving, host)
    taken = (*kind.sockets, *((widget.name, widget.kind) for widget in kind.widgets))
    source = Node(INPUT_NODE, "", NodeType((), (), taken), {}, {})
    _rewire(inside, arriving, source)
    for each in promoted:
        each.node.wires[each.widget] = source[each.name]
    sink = Node(OUTPUT_NODE, "", NodeType(kind.outputs, (), ()), leaving, {})
    graph.nodes = [*outside, host]
    graph.insides.append(Inside(host, inside, source, sink, columns))
    return host


def _is_of(wire: Output, nodes: Sequence[Node]) -> bool:
    return any(wire.node is node for node in nodes)


def _named(wires: Iterable[Output]) -> dict[str, Output]:
    """Each output once, by a name of its own: its node's title where that says what it is, else its own."""
    found: dict[str, Output] = {}
    for wire in wires:
        if any(wire.is_same(each) for each in found.values()):
            continue
        plain = wire.node.kind.outputs[wire.slot][0]
        name = (wire.node.title or plain).lower() if wire.node.type == "PrimitiveInt" else plain
        number = 2
        while name in found:
            name, number = f"{plain} {number}", number + 1
        found[name] = wire
    return found


def _rewire(nodes: Sequence[Node], named: dict[str, Output], to: Node) -> None:
    for node in nodes:
        for key, wire in node.wires.items():
            name = next((name for name, each in named.items() if each.is_same(wire)), None)
            if name is not None:
                node.wires[key] = to[name]
