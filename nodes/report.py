"""The node that says what a model used."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..memory.plan.table import describe
from ..memory.report.report import RunReport
from .bridge import host
from .inputs import LOADERS, streamed_model


class MemoryReport(io.ComfyNode):
    """Shows what the last run of a model used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMMemoryReport",
            display_name="Memory Report",
            description="Shows what the last run of this model used: peaks beside their prediction, transfers, and a "
            "timeline. Connect the sampler's latent, so that it comes after the run.",
            search_aliases=["ram usage", "vram usage", "timeline", "out of memory", "slow"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip=f"The MODEL of {LOADERS} that the sampler used."),
                io.AnyType.Input("after", optional=True, tooltip="What to wait for: the sampler's LATENT."),
            ],
            outputs=[io.String.Output("report"), io.Image.Output("timeline")],
        )

    @classmethod
    def execute(cls, model: Any, after: Any = None) -> io.NodeOutput:
        engine = streamed_model(model, "Memory Report").engine
        if engine.report is None:
            text = "This model has not run yet: connect the sampler's LATENT to `after`."
            return io.NodeOutput(text, torch.zeros(1, 8, 8, 3), ui=ui.PreviewText(text))
        text = engine.report.table()
        if engine.streamed.plan is not None and engine.device.type == "cuda":
            text += "\n\n" + describe(engine.streamed.plan)
        try:
            picture, small = _timelines(engine.report)
        except ImportError as error:
            text += f"\n\nNo timeline: {error} (pip install matplotlib)"
            return io.NodeOutput(text, torch.zeros(1, 8, 8, 3), ui=ui.PreviewText(text))
        shown = ui.PreviewImage(small, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(text, picture, ui=shown)


def _timelines(report: RunReport) -> tuple[Tensor, Tensor]:
    """The run as an IMAGE `[1, H, W, 3]` to be saved, and as one that is legible in the node."""
    from ..memory.report import timeline  # matplotlib: a report without a picture is better than none

    return _image(timeline.draw_timeline(report)), _image(timeline.draw_timeline(report, timeline.NODE))


def _image(png: bytes) -> Tensor:
    with Image.open(BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]
