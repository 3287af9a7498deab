"""What the page is told while a node runs: videos that grow, and previews that move."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from . import host

SHOWING = "LowVRAMShowVideo"  # the kind of the nodes that show a VIDEO


def running_server() -> Any:
    """ComfyUI's server, which is imported long before any node; None where nodes run without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def shown_video(video: Any) -> ui.SavedResult:
    """A VIDEO as the page shows it: its file if that is in the output folder, else a copy in the temporary one."""
    source, outputs = video.get_stream_source(), host.output_folder("").resolve()
    if isinstance(source, str) and Path(source).resolve().is_relative_to(outputs):
        place = Path(source).resolve().relative_to(outputs)
        folder = "" if place.parent == Path() else place.parent.as_posix()
        return ui.SavedResult(place.name, folder, io.FolderType.output)
    path = host.temporary_folder() / f"lowvram_{uuid.uuid4().hex}.mp4"
    video.save_to(str(path))
    return ui.SavedResult(path.name, "", io.FolderType.temp)


def showing_nodes(hidden: io.HiddenHolder | None, slot: int) -> list[str]:
    """Ids of the Show Video nodes that take the output `slot` of the node that runs, which was given `hidden`."""
    if hidden is None or hidden.prompt is None:
        return []
    taken = [str(hidden.unique_id), slot]
    nodes = dict(hidden.prompt).items()
    return [str(id) for id, node in nodes if node["class_type"] == SHOWING and taken in node["inputs"].values()]


def show_video(nodes: Sequence[str], path: Path) -> None:
    """Have the page show a video of the output folder in nodes that have not run yet, as if they had."""
    server = running_server()
    if server is None or server.client_id is None:
        return
    output = ui.PreviewVideo([host.saved_result(path)]).as_dict()
    for node in nodes:
        told = {"node": node, "display_node": node, "output": output, "prompt_id": server.last_prompt_id}
        server.send_sync("executed", told, server.client_id)
