"""The node that shows a video, also one that is still growing."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .bridge import host
from .bridge.page import shown_video


class ShowVideo(io.ComfyNode):
    """Shows a VIDEO on the page, where it is, and writes none."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMShowVideo",
            display_name="Show Video (Low VRAM)",
            description="Shows a video in the graph. That of FramePack Sampler is shown as it grows, after each "
            "section. A video that is in the output folder already is not written once more.",
            search_aliases=["preview video", "show video", "framepack", "low vram"],
            is_output_node=True,
            inputs=[io.Video.Input("video", tooltip="Of FramePack Sampler, Save Video (Low VRAM) or any other node.")],
            outputs=[io.Video.Output("video", tooltip="The same video.")],
        )

    @classmethod
    def execute(cls, video: Any) -> io.NodeOutput:
        return io.NodeOutput(video, ui=ui.PreviewVideo([shown_video(video)]))
