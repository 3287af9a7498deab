"""The node that turns torch.compile on for a streamed model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..compilation.profiles import CUSTOM, PROFILES, settings_of
from ..compilation.settings import BACKENDS, DYNAMIC, MODES, CompileSettings
from .bridge import host
from .inputs import ADVANCED, model_input, streamed_model


class TorchCompileSettings(io.ComfyNode):
    """Compile a streamed model's blocks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMTorchCompile",
            display_name="Torch Compile Settings (Low VRAM)",
            description="Compiles the model's blocks one by one with torch.compile, together with streaming and LoRA. "
            "The first step takes longer; measure whether the others take less. Needs Triton for inductor on a GPU.",
            search_aliases=["torch compile", "inductor", "dynamo", "speed up", "triton"],
            inputs=[
                model_input(),
                io.Combo.Input(
                    "backend", options=list(BACKENDS), default="inductor",
                    tooltip="inductor makes Triton kernels. cudagraphs only records launches. tensorrt needs the "
                    "package torch_tensorrt.",
                ),
                io.Boolean.Input(
                    "fullgraph", default=False,
                    tooltip="On: an error where a block is not one graph. Off: it may be cut.", extra_dict=ADVANCED,
                ),
                io.Combo.Input("mode", options=list(MODES), default="default", tooltip="One of inductor's presets."),
                io.Combo.Input(
                    "dynamic", options=list(DYNAMIC), default="auto",
                    tooltip="true: one code for videos of any size. auto, false: new code for each size.",
                ),
                io.Boolean.Input(
                    "compile_transformer_blocks_only", default=True,
                    tooltip="On: the blocks, which are nearly all of the work. Off: the output head as well.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "dynamo_cache_size_limit", default=64, min=1, max=1024,
                    tooltip="Versions of the code per function.", extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "dynamo_recompile_limit", default=128, min=1, max=4096, tooltip="Versions of the code in all.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "force_parameter_static_shapes", default=False,
                    tooltip="On: weights have fixed shapes in the code even where sizes are dynamic.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "profile", options=list(PROFILES), default=CUSTOM,
                    tooltip="custom: the widgets above. high, mid, low: settings for 24 GiB of free VRAM and more, "
                    "12 to 24, and less; of the widgets above backend alone then counts. auto: by what is free, low "
                    "where less than 30 % of the card is.",
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        backend: str,
        fullgraph: bool,
        mode: str,
        dynamic: str,
        compile_transformer_blocks_only: bool,
        dynamo_cache_size_limit: int,
        dynamo_recompile_limit: int,
        force_parameter_static_shapes: bool,
        profile: str = CUSTOM,
    ) -> io.NodeOutput:
        patcher = streamed_model(model, "Torch Compile Settings (Low VRAM)")
        settings = CompileSettings(
            backend=backend,
            fullgraph=fullgraph,
            mode=mode,
            dynamic=DYNAMIC[dynamic],
            transformer_blocks_only=compile_transformer_blocks_only,
            cache_size_limit=dynamo_cache_size_limit,
            recompile_limit=dynamo_recompile_limit,
            force_parameter_static_shapes=force_parameter_static_shapes,
        )
        settings = settings_of(profile, settings, host.video_memory(patcher.engine.device))
        settings.check()
        return io.NodeOutput(patcher.with_options(compile=settings))
