"""The node that skips steps whose result would hardly change."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sampling.caching.settings import AUTO, END, METHODS, MOST_SKIPS, PLACES, START, StepCacheSettings
from ..sampling.caching.tables import published_tables
from .bridge import host
from .bridge.step_cache import check_no_other
from .inputs import ADVANCED, streamed_model

TITLE = "Step Cache (Low VRAM)"


class StepCacheNode(io.ComfyNode):
    """A MODEL whose steps skip the blocks where their result would hardly change."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMStepCache",
            display_name=TITLE,
            description="Long runs faster: a step whose result would hardly change adds again what the blocks added "
            "at the last computed one. For 20 steps and more; with 8 or fewer nothing is skipped.",
            search_aliases=["teacache", "magcache", "first block cache", "fbcache", "step cache", "speed up", "faster"],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL of Load Wan Video Model (Low VRAM)."),
                io.Combo.Input(
                    "method", options=list(METHODS), default="teacache",
                    tooltip="teacache: by how far the noise level moved, as fitted for the model. magcache: by how "
                    "the blocks' result changes in length, as measured of the model. first_block: by what the first "
                    "block does now; needs no table.",
                ),
                io.Float.Input(
                    "threshold", default=0.0, min=0.0, max=10.0, step=0.005, round=0.0001,
                    tooltip="Estimated change that skipped steps may add up to: higher is faster and further from the "
                    "uncached video. 0: the table's own, such as 0.14 for 14B with teacache.",
                ),
                io.Float.Input(
                    "start_percent", default=START, min=0.0, max=1.0, step=0.01,
                    tooltip="The first share of the steps is always computed: it decides what the video shows.",
                ),
                io.Float.Input(
                    "end_percent", default=END, min=0.0, max=1.0, step=0.01,
                    tooltip="After this share of the steps all are computed: they make the details.",
                ),
                io.Int.Input(
                    "max_skips", default=0, min=0, max=MOST_SKIPS,
                    tooltip="So many steps in a row are skipped at most. 0: 4 for magcache, any number for the "
                    "others.", extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "table", options=[AUTO, *published_tables()], default=AUTO,
                    tooltip="auto: the table that `lowvram-video calibrate` left beside the model's file, else the "
                    "published one for a model of this kind. Published ones were not verified here.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "residuals", options=list(PLACES), default=AUTO,
                    tooltip="Where what the blocks added is kept between steps, about 0.3 GiB per prompt at 832x480x81 "
                    "with 14B: in VRAM, in RAM, or as the plan says.", extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        method: str,
        threshold: float,
        start_percent: float,
        end_percent: float,
        max_skips: int,
        table: str,
        residuals: str,
    ) -> io.NodeOutput:
        patcher = streamed_model(model, TITLE)
        settings = StepCacheSettings(method, threshold or None, start_percent, end_percent, max_skips, table, residuals)
        check_no_other(patcher.model_options)
        patcher.engine.check_step_cache(settings)
        return io.NodeOutput(patcher.with_options(step_cache=settings))
