"""The node that says how a model may use memory."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .bridge import host
from .bridge.patcher import StreamedModelPatcher
from .inputs import ADVANCED, check_numbers, model_input, streamed_model


class BlockSwap(io.ComfyNode):
    """How much memory a streamed model may use."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMBlockSwap",
            display_name="Block Swap (Low VRAM)",
            description="Sets how many blocks of the model stream from RAM (or disk) and how much memory it may use. "
            "Without this node everything is planned from what is free.",
            search_aliases=[
                "block swap", "vram budget", "offload", "blocks to swap", "out of memory", "oom", "low vram",
            ],
            inputs=[
                model_input(),
                io.Int.Input(
                    "blocks_to_swap", default=-1, min=-1, max=100,
                    tooltip="-1: planned, so that it fits and runs as fast as it can. 0: all blocks stay in VRAM. "
                    "N: exactly N blocks are streamed in every pass.",
                ),
                io.Float.Input(
                    "vram_budget_gb", default=0.0, min=0.0, max=192.0, step=0.25,
                    tooltip="A hard limit in GiB for all of ComfyUI while this model runs. 0: what is free, less "
                    "what --reserve-vram leaves to others.",
                ),
                io.Int.Input(
                    "prefetch", default=0, min=0, max=40,
                    tooltip="So many blocks arrive ahead of the one that computes. 0: planned; 1 is enough where "
                    "transfers are as fast as compute.", extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "ram_budget_gb", default=0.0, min=0.0, max=1024.0, step=0.5,
                    tooltip="RAM for this model's weights in GiB; below their size they stream from the disk. 0: what "
                    "is free.", extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "pinned_memory", default=True,
                    tooltip="Pinned RAM copies to the GPU at full speed while it computes. Turn it off if pinning "
                    "fails or the system stutters; --disable-pinned-memory does the same for all of ComfyUI.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "pass_other_models", default=False,
                    tooltip="On: a model of another loader passes through as it is. Off: it is an error that says why.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, pass_other_models: bool = False, **options: Any) -> io.NodeOutput:
        if pass_other_models and not isinstance(model, StreamedModelPatcher):
            return io.NodeOutput(model)
        patcher = streamed_model(model, "Block Swap (Low VRAM)")
        check_numbers(vram_budget_gb=options["vram_budget_gb"], ram_budget_gb=options["ram_budget_gb"])
        num_blocks = len(patcher.engine.streamed.blocks)
        if options["blocks_to_swap"] > num_blocks:
            raise ValueError(
                f"blocks_to_swap is {options['blocks_to_swap']}, but this model has {num_blocks} blocks: "
                f"use -1 (planned) or 0 to {num_blocks}"
            )
        return io.NodeOutput(patcher.with_options(**options))
