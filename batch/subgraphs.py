"""Workflows without their subgraphs: the nodes of each stand in the place of the one that the page shows for them.

Source: `definitions.subgraphs` as ComfyUI's frontend writes them, whose `graphToPrompt` numbers nodes so: "16:3" is
node 3 of the subgraph that node 16 stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

GIVEN, TAKEN = -10, -20  # the nodes inside a subgraph that stand for its inputs and outputs
MUTED, BYPASSED = 2, 4
DEEPEST = 32  # subgraphs in each other
VALUES = "lowvram_values"  # widgets of a node inside that have their values outside, by name

Node = Mapping[str, Any]
Source = tuple[str, int]  # a node's number in the prompt, and its output


def unfolded(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """A workflow with `nodes` and `links` alone; nodes inside have numbers such as "16:3", and VALUES of theirs.

    ValueError for subgraphs that are not as the page writes them.
    """
    definitions = {each["id"]: each for each in (workflow.get("definitions") or {}).get("subgraphs") or ()}
    top = _Level(definitions, workflow["nodes"], {link[0]: (link[1], link[2], link[5]) for link in workflow["links"]})
    nodes: list[dict[str, Any]] = []
    links: list[list[Any]] = []
    for level, node in top.plain_nodes():
        slots: list[Any] = []
        values: dict[str, Any] = {}
        for slot in node.get("inputs", []):
            source = level.source(slot.get("link"))
            if isinstance(source, _Value):
                values[slot["name"]] = source.value
            elif source is not None:
                links.append([len(links) + 1, *source, level.number(node), len(slots), slot.get("type")])
            slots.append({**slot, "link": links[-1][0] if isinstance(source, tuple) else None})
        nodes.append({**node, "id": level.number(node), "inputs": slots, VALUES: values})
    return {"nodes": nodes, "links": links}


@dataclass(frozen=True)
class _Value:
    """What a widget outside is set to."""

    value: Any


@dataclass
class _Level:
    """The nodes of a workflow or of one subgraph; `links` are (node, output, type) by number."""

    definitions: Mapping[str, Any]
    nodes: list[Node]
    links: Mapping[Any, tuple[Any, int, Any]]
    parent: _Level | None = None
    host: Node = field(default_factory=dict)
    inside: dict[Any, _Level] = field(default_factory=dict)
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.prefix.count(":") > DEEPEST:
            raise ValueError(f"its subgraphs are in each other more than {DEEPEST} times")
        for node in self.nodes:
            if node["type"] in self.definitions and node.get("mode") not in (MUTED, BYPASSED):
                self.inside[node["id"]] = self._below(node)

    def _below(self, host: Node) -> _Level:
        subgraph = self.definitions[host["type"]]
        links = {each["id"]: (each["origin_id"], each["origin_slot"], each["type"]) for each in subgraph["links"]}
        return _Level(self.definitions, subgraph["nodes"], links, self, host, prefix=f"{self.prefix}{host['id']}:")

    def number(self, node: Node) -> str:
        return f"{self.prefix}{node['id']}"

    def plain_nodes(self) -> Iterator[tuple[_Level, Node]]:
        """All nodes, each with the level that it is in, but for those that stand for a subgraph."""
        for node in self.nodes:
            if node["id"] in self.inside:
                yield from self.inside[node["id"]].plain_nodes()
            else:
                yield self, node

    def source(self, link: Any) -> Source | _Value | None:
        """What feeds a link of this level; None where nothing does."""
        if link not in self.links:
            return None
        origin, output, _ = self.links[link]
        if origin == GIVEN:
            return self._from_outside(output)
        if origin in self.inside:
            return self.inside[origin].given(output)
        return f"{self.prefix}{origin}", output

    def given(self, output: int) -> Source | _Value | None:
        """What comes out of this subgraph."""
        subgraph = self.definitions[self.host["type"]]
        links = [
            link["id"] for link in subgraph["links"] if (link["target_id"], link["target_slot"]) == (TAKEN, output)
        ]
        return self.source(links[0]) if links else None

    def _from_outside(self, slot: int) -> Source | _Value | None:
        assert self.parent is not None
        name = self.definitions[self.host["type"]]["inputs"][slot]["name"]
        wired: dict[str, Any] = next((each for each in self.host.get("inputs", []) if each["name"] == name), {})
        if wired.get("link") is not None:
            return self.parent.source(wired["link"])
        values = self._widgets()
        return _Value(values[name]) if name in values else None

    def _widgets(self) -> dict[str, Any]:
        """The widgets on this subgraph's node that are its own, by name: others have their values inside."""
        proxies = (self.host.get("properties") or {}).get("proxyWidgets")
        if proxies is None:
            names = [each["name"] for each in self.host.get("inputs", []) if "widget" in each]
        else:
            names = [name for owner, name, *_ in proxies if str(owner) == "-1"]
        values = self.host.get("widgets_values") or []
        return dict(values) if isinstance(values, dict) else dict(zip(names, values, strict=False))
