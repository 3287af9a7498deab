"""Where the nodes of an example workflow are: few on the page, all others in a subgraph behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .folding import Promoted, fold
from .graph import Group, Node, Output, Workflow
from .notes import unwrapped

TALL_NOTE = 840  # pixels, with nothing above it: it ends where a page of 1080 does
BEHIND = 90  # lower: a wire that comes from behind a node is not taken for one of its outputs
SHOWN = {"LoadImage", "LoadVideo"}  # what people bring
# what is set outside, by the type of its node; of several nodes of a type, all
PROMOTED: dict[str, tuple[str, ...]] = {
    "KSampler": ("seed", "steps", "cfg", "denoise"),
    "KSamplerAdvanced": ("noise_seed",),
    "LowVRAMFramePackSampler": ("total_second_length", "steps", "seed"),
    "LowVRAMFramePackNearestBucket": ("base_resolution",),
    "LowVRAMNag": ("nag_scale",),
    "LowVRAMSparseAttention": ("mode",),
    "LowVRAMBlockSwap": ("vram_budget_gb",),
    "LowVRAMLoadWanModel": ("model_name",),
    "LowVRAMLoadFramePackModel": ("model_name",),
}


def promoted_of(nodes: Sequence[Node]) -> list[Promoted]:
    """What is set outside of these nodes; the same widget of two nodes by their numbers."""
    found: list[Promoted] = []
    for node in nodes:
        goes_on = node.type == "KSamplerAdvanced" and node.keep_seed  # from another sampler, with what that has
        for widget in () if goes_on else PROMOTED.get(node.type, ()):
            number = 1 + sum(each.widget == widget and each.node.type == node.type for each in found)
            found.append(Promoted(node, widget, widget if number == 1 else f"{widget}_{number}"))
    return found


@dataclass(frozen=True)
class Parts:
    """What every workflow has; `columns` are the groups of nodes to be folded, from left to right.

    `promoted` are the widgets that are set on the page. Pictures that people bring, of whichever
    group, stay on the page.
    """

    title: str
    note: str
    columns: Sequence[Sequence[Group]]
    promoted: Sequence[Promoted]
    saving: Node
    plan: Node
    report: Node


def place(graph: Workflow, parts: Parts) -> dict[str, Any]:
    """The workflow as JSON: notes and pictures, the subgraph, what it would take and took, and the video.

    What it took stands to the left of the page's map, which is in the lower right corner; so does a note below a video.
    """
    brought = [node for column in parts.columns for group in column for node in group.nodes if node.type in SHOWN]
    folded = [[_without(group, brought) for group in column] for column in parts.columns]
    columns = [[group for group in column if group.nodes] for column in folded]
    host = fold(graph, parts.title, [column for column in columns if column], parts.promoted)
    note = graph.add("MarkdownNote", title="Read me", text=unwrapped(parts.note))
    left, saving, about = [*brought], [parts.saving], [parts.plan, parts.report]
    (left if len(brought) < 2 else saving).append(note)  # where it is seen
    if left == [note]:
        note.size = (note.size[0], TALL_NOTE)
    if note not in left:
        return graph.place([left, [host], saving, about])
    return graph.place([left, [host], about, saving], lower_last=BEHIND)


def place_alone(
    graph: Workflow,
    title: str,
    columns: Sequence[Sequence[Group]],
    promoted: Sequence[Promoted],
    given: dict[str, Output],
    about: str,
) -> dict[str, Any]:
    """A blueprint: one node that takes pictures from outside and gives `given`; `about` is what it is for."""
    brought = [node for column in columns for group in column for node in group.nodes if node.type in SHOWN]
    inside = [[group for each in column if (group := _without(each, brought)).nodes] for column in columns]
    fold(graph, title, [column for column in inside if column], promoted, given)
    graph.nodes = [node for node in graph.nodes if node.is_host]
    graph.nodes[0].wires = {}
    placed = graph.place([graph.nodes])
    placed["definitions"]["subgraphs"][0] |= {"category": "LowVRAM Video", "description": about}
    return placed


def _without(group: Group, nodes: Sequence[Node]) -> Group:
    return Group(group.title, [node for node in group.nodes if all(node is not each for each in nodes)], group.colour)
