"""Nodes that open model files."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..attention.select import ATTENTION_MODES
from ..diffusion.settings import RunSettings
from ..weights.compute import QUANTIZATIONS
from . import host
from .native import make_model
from .patcher import StreamedModelPatcher
from .wan_engine import WanEngine

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LoadWanModel(io.ComfyNode):
    """A Wan transformer from its file, as a native MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMLoadWanModel",
            display_name="Load Wan Video Model (Low VRAM)",
            description="Loads a Wan 2.1 or 2.2 video model whose weights stream from RAM or disk while it runs. The "
            "MODEL works with KSampler, LoRA loaders, EasyCache and ComfyUI's other Wan nodes.",
            search_aliases=["wan loader", "block swap", "load diffusion model", "low vram", "gguf"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.model_files(),
                    tooltip="A .safetensors or .gguf file in models/diffusion_models or models/unet. Wan 2.1/2.2 "
                    "T2V, I2V, first-last-frame, TI2V 5B, VACE and Fun models; the variant is read from the file.",
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="What the model computes in, whatever its weights are stored as. auto: bf16 on GPUs that "
                    "have it, else fp16; fp32 on a CPU.",
                ),
                io.Combo.Input(
                    "attention_mode",
                    options=list(ATTENTION_MODES),
                    default="auto",
                    tooltip="auto takes the fastest exact one that is installed and works here. sageattn is faster "
                    "and slightly inexact, so it is only taken when chosen. One that cannot run says why.",
                ),
                io.Combo.Input(
                    "quantization",
                    options=list(QUANTIZATIONS),
                    default="none",
                    tooltip="none: weights stay as the file has them (GGUF, fp8 and int8 files too). fp8, int8: bf16 "
                    "weights are quantised while they are read, which halves them. fp8_fast also multiplies in fp8: "
                    "faster on RTX 40 and newer (compute capability 8.9), slightly inexact. int8 multiplies in int8: "
                    "the fast choice for RTX 20 and 30. One that cannot run here says why.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **_: str) -> str:
        return host.model_stamp(model_name)

    @classmethod
    def execute(cls, model_name: str, compute_dtype: str, attention_mode: str, quantization: str) -> io.NodeOutput:
        device = host.compute_device()
        settings = RunSettings(
            device=device, dtype=DTYPES[compute_dtype], attention_mode=attention_mode, quantization=quantization
        )
        engine = WanEngine(host.model_path(model_name), settings)
        patcher = StreamedModelPatcher(make_model(engine), device, host.offload_device(), engine.total_bytes)
        return io.NodeOutput(patcher)
