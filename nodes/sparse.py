"""The node that leaves out of attention what matters little."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.sparse.settings import MIN_TOKENS, MODES, settings_of
from .bridge import host
from .inputs import ADVANCED, model_input, streamed_model

TITLE = "Sparse Attention (Low VRAM)"


class SparseAttention(io.ComfyNode):
    """A MODEL whose self-attention leaves out what matters little, steered by the error that the run measures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMSparseAttention",
            display_name=TITLE,
            description="Long videos faster where their attention is sparse: each group of tokens attends exactly to "
            "those that matter to it, and to the means of the others. The run compares itself with exact "
            "attention as it goes and steers each layer to an error bound, which a single step may pass: "
            "that layer is exact in the next one. FramePack gains nothing at its usual sizes. Needs an "
            "RTX 30 card or newer and a recent comfy-kitchen.",
            search_aliases=["sparse attention", "sol attn", "radial attention", "sla", "speed up", "block sparse"],
            inputs=[
                model_input(),
                io.Combo.Input(
                    "mode", options=list(MODES), default="balanced",
                    tooltip="The error that attention of a layer is steered to: quality 5 %, balanced 10 %, fast 20 %; "
                    "the time that they save was not measured on a real model. tau and top_k: by the value "
                    "below.",
                ),
                io.Float.Input(
                    "value", default=1.0, min=-1.0, max=4.0, step=0.05,
                    tooltip="tau: groups whose score is so many deviations over the mean are attended exactly; "
                    "higher is faster. top_k: the share of groups, such as 0.15. Not used by the other modes.",
                ),
                io.Float.Input(
                    "error_bound", default=-1.0, min=-1.0, max=1.0, step=0.01,
                    tooltip="The relative error that attention of a layer is steered to; a single step may be beyond "
                    "it, and that layer is exact in the next one. -1: by the mode; none for tau and top_k. 0: "
                    "everything is exact.",
                ),
                io.Float.Input(
                    "dense_percent", default=25.0, min=0.0, max=100.0, step=1.0,
                    tooltip="The first steps, in per cent, are exact: they decide what the video shows.",
                ),
                io.Int.Input(
                    "dense_layers", default=1, min=0, max=100,
                    tooltip="So many first layers are always exact.", extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "min_tokens", default=MIN_TOKENS, min=0, max=10_000_000, step=1000,
                    tooltip="Shorter videos are exact, as nothing would be gained: 480x832 of 81 frames are 32760 "
                    "tokens.", extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        mode: str,
        value: float,
        error_bound: float,
        dense_percent: float,
        dense_layers: int,
        min_tokens: int,
    ) -> io.NodeOutput:
        patcher = streamed_model(model, TITLE)
        settings = settings_of(
            mode, value, None if error_bound < 0 else error_bound, dense_percent, dense_layers, min_tokens
        )
        patcher.engine.streamed.check_sparse(settings)
        return io.NodeOutput(patcher.with_options(sparse=settings))
