"""Nodes that open model files."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.select import ATTENTION_MODES
from ..framepack.checkpoint import MODEL_TYPES
from ..runtime.settings import DTYPES, RunSettings
from ..runtime.turns import Turns
from ..weights.linear.compute import QUANTIZATIONS
from .bridge import host, native_framepack, native_wan
from .bridge.framepack_engine import FramePackEngine
from .bridge.patcher import make_patcher
from .bridge.wan_engine import WanEngine
from .inputs import ADVANCED

TURNS = Turns()  # of all models that these nodes load
NO_MODULE = "none"


class LoadWanModel(io.ComfyNode):
    """A Wan transformer from its file, as a native MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMLoadWanModel",
            display_name="Load Wan Video Model (Low VRAM)",
            description="Loads a Wan 2.1 or 2.2 video model whose weights stream from RAM or disk while it runs. The "
            "MODEL works with KSampler, LoRA loaders, EasyCache and ComfyUI's other Wan nodes.",
            search_aliases=[
                "wan loader", "block swap", "load diffusion model", "low vram", "gguf", "unet gguf",
                "unet loader gguf", "out of memory", "sageattention", "fp8", "wan 2.2",
            ],
            inputs=[
                _file_input(
                    ". Wan 2.1/2.2 T2V, I2V, first-last-frame, TI2V 5B, VACE and Fun models; the variant is read from "
                    "the file."
                ),
                *_compute_inputs(),
                io.Combo.Input(
                    "vace_module", options=[NO_MODULE, *host.model_files()], default=NO_MODULE, optional=True,
                    tooltip="VACE's blocks where they are in a file of their own (Wan2_1-VACE_module_…): with a "
                    "text-to-video model of the same size as model_name the two are a VACE model.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, model_name: str, vace_module: str = NO_MODULE, **_: str) -> str:
        stamp = host.model_stamp(model_name)
        return stamp if vace_module == NO_MODULE else f"{stamp} {host.model_stamp(vace_module)}"

    @classmethod
    def execute(
        cls, model_name: str, compute_dtype: str, attention_mode: str, quantization: str, vace_module: str = NO_MODULE
    ) -> io.NodeOutput:
        settings = settings_of(compute_dtype, attention_mode, quantization)
        module = None if vace_module == NO_MODULE else host.model_path(vace_module)
        engine = WanEngine(host.model_path(model_name), settings, TURNS, module)
        return io.NodeOutput(make_patcher(native_wan.make_model(engine)))


class LoadFramePackModel(io.ComfyNode):
    """A FramePack transformer from its file, as a MODEL for FramePack Sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMLoadFramePackModel",
            display_name="Load FramePack Model (Low VRAM)",
            description="Loads a FramePack or FramePack F1 model whose weights stream from RAM or disk while it runs. "
            "Sample it with FramePack Sampler (Low VRAM).",
            search_aliases=[
                "framepack loader", "framepack f1", "block swap", "low vram", "gguf", "unet gguf", "unet loader gguf",
                "out of memory", "sageattention", "extend video",
            ],
            inputs=[
                _file_input(", such as FramePackI2V_HY_fp8_e4m3fn.safetensors; of the model's shards, any one."),
                io.Combo.Input(
                    "model_type", options=["auto", *MODEL_TYPES], default="auto",
                    tooltip="base works from the end of the video to its start, F1 from the start on. auto: by the "
                    "file's metadata or name, as nothing else in the files tells them apart.",
                ),
                *_compute_inputs(),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **_: str) -> str:
        return host.model_stamp(model_name)

    @classmethod
    def execute(
        cls, model_name: str, model_type: str, compute_dtype: str, attention_mode: str, quantization: str
    ) -> io.NodeOutput:
        settings = settings_of(compute_dtype, attention_mode, quantization)
        engine = FramePackEngine(host.model_path(model_name), settings, model_type, TURNS)
        return io.NodeOutput(make_patcher(native_framepack.make_model(engine)))


def settings_of(compute_dtype: str, attention_mode: str, quantization: str) -> RunSettings:
    """What a loader's widgets say."""
    return RunSettings(
        device=host.compute_device(),
        dtype=DTYPES[compute_dtype],
        attention_mode=attention_mode,
        quantization=quantization,
    )


def _file_input(more: str) -> io.Input:
    where = "A .safetensors or .gguf file in models/diffusion_models or models/unet"
    return io.Combo.Input("model_name", options=host.model_files(), tooltip=where + more)


def _compute_inputs() -> list[io.Input]:
    """How a model computes; the same for all loaders."""
    return [
        io.Combo.Input(
            "compute_dtype", options=list(DTYPES), default="auto",
            tooltip="What the model computes in, whatever its weights are stored as. auto: bf16 on GPUs that "
            "have it, else fp16; fp32 on a CPU.",
        ),
        io.Combo.Input(
            "attention_mode", options=list(ATTENTION_MODES), default="auto",
            tooltip="auto takes the fastest exact one that is installed and works here, auto_fast also one of 8 bits. "
            "sageattn, sageattn_2pp, int8_attention and, on RTX 50, sageattn_3 are inexact: auto never takes them. "
            "One that cannot run says why.",
        ),
        io.Combo.Input(
            "quantization", options=list(QUANTIZATIONS), default="none",
            tooltip="none: weights stay as the file has them (GGUF, fp8 and int8 files too). fp8, int8: bf16 "
            "weights are quantised while they are read, which halves them. fp8_fast also multiplies in fp8: "
            "faster on RTX 40 and newer (compute capability 8.9), slightly inexact. int8 multiplies in int8: "
            "the fast choice for RTX 20 and 30. 4bit_fast multiplies files in 4 bits (NVFP4, W4A4, W4A8) as stored, "
            "by comfy-kitchen, where that is faster than unpacking: inexact. auto_fast keeps weights as the file has "
            "them and multiplies in fp8 where this card does that faster (timed): a layer is off by 5 % at most on "
            "random numbers. One that cannot run here says why.",
        ),
    ]  # fmt: skip
