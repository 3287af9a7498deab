"""The nodes: the only part of the package that knows ComfyUI."""

from __future__ import annotations

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

from ..system.triton_errors import triton_errors

logger = logging.getLogger(__name__)

# module -> its nodes, in the order in which they are listed
PARTS = {
    "loaders": ("LoadWanModel", "LoadFramePackModel"),
    "block_swap": ("BlockSwap",),
    "plan": ("VramPlan",),
    "report": ("MemoryReport",),
    "compile": ("TorchCompileSettings",),
    "decode": ("DecodeVideo",),
    "save_video": ("SaveVideo",),
    "encode": ("EncodeVideo",),
    "demo": ("LoadDemo",),
    "text_encoder": ("LoadClipGGUF",),
    "lora": ("LoadLora",),
    "nag": ("NegativeGuidance",),
    "framepack": ("FramePackSampler",),
    "framepack_inputs": ("FramePackEndImage", "TimedPrompts", "NearestBucket"),
    "resumable": ("ResumableSampling",),
    "doctor": ("Doctor",),
    "sparse": ("SparseAttention",),
    "step_cache": ("StepCacheNode",),
    "several_gpus": ("SeveralGPUs",),
    "upscale": ("LoadFlashVSRModel", "UpscaleVideo"),
    "show_video": ("ShowVideo",),
}


def load_nodes() -> list[type[io.ComfyNode]]:
    """All nodes whose requirements are installed; what is missing is logged, and never stops the others."""
    nodes: list[type[io.ComfyNode]] = []
    for part, names in PARTS.items():
        try:
            module = importlib.import_module(f".{part}", __name__)
        except triton_errors() as error:  # what broken packages raise: OSError for DLLs, for one
            logger.error(
                "LowVRAM Video: the nodes %s are off: %s. Run: pip install -r requirements.txt in the pack's folder, "
                "with ComfyUI's own Python",
                ", ".join(names),
                error,
            )
            continue
        nodes += [getattr(module, name) for name in names]
    return nodes


class LowVRAMExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return load_nodes()
