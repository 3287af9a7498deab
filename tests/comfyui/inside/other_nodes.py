"""Nodes of ComfyUI and of other packs by their ids, called with their defaults; the tables of docs/other_nodes.md."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[3] / "docs/other_nodes.md"

# Where defaults change nothing, or are not for these tiny latents.
SETTINGS: dict[str, dict[str, Any]] = {
    "ApplyRifleXRoPE_HunuyanVideo": {"latent": "latent", "k": 2},
    "ApplyRifleXRoPE_WanVideo": {"latent": "latent", "k": 2},
    "ContextWindowsManual": {
        "context_length": 2, "context_overlap": 1, "context_schedule": "standard_static", "dim": 2,
        "fuse_method": "pyramid", "closed_loop": False, "context_stride": 1, "cond_retain_index_list": "",
    },
    "EasyCache": {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0},
    "FreSca": {"scale_low": 1.2, "scale_high": 1.5, "freq_cutoff": 1},
    "LazyCache": {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0},
    "Epsilon Scaling": {"scaling_factor": 1.05},
    "ModelAttentionBackend": {"attention": "pytorch attention"},
    "ModelComputeDtype": {"dtype": "bf16"},
    "ModelMemoryUsageFactorOverride": {"memory_usage_factor": 2.0},
    "ModelNoiseScale": {"noise_scale": 1.2},
    "ModelSamplingSD3": {"shift": 9.0},
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "ScaleROPE": {"scale_x": 0.5, "shift_x": 3.0, "scale_y": 1.2, "shift_y": 1.0, "scale_t": 0.5, "shift_t": 2.0},
    "SkipLayerGuidanceDiT": {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiTSimple": {
        "double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0
    },
    "SkipLayerGuidanceWanVideo": {"blocks": "1"},
    "TorchCompileModel": {"backend": "inductor"},
    "TorchCompileModelAdvanced": {"backend": "inductor"},
    "TorchCompileModelWanVideoV2": {"backend": "inductor"},
    "WanVideoEnhanceAVideoKJ": {"latent": "latent"},
    "WanVideoNAG": {"conditioning": "conditioning"},
}  # fmt: skip
SLOW = {"TorchCompileModel", "TorchCompileModelAdvanced", "TorchCompileModelWanVideoV2"}  # minutes of a compiler


def table(title: str) -> list[tuple[str, str, str]]:
    """(node, on Wan, on FramePack) of the document's table under this title."""
    part = DOCS.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows[2:]]
    return [(row[0], row[1], row[2]) for row in cells]


def known() -> dict[str, type]:
    """All of core's nodes, loaded once."""
    import nodes

    if "APG" not in nodes.NODE_CLASS_MAPPINGS:
        with torch.inference_mode(False):
            asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes.NODE_CLASS_MAPPINGS


def known_of_kjnodes() -> dict[str, type]:
    """KJNodes, unmodified: beside ComfyUI's own custom nodes, or in KJNODES_DIR."""
    import nodes

    places = [os.environ.get("KJNODES_DIR", ""), Path(os.environ["COMFYUI_DIR"]) / "custom_nodes/ComfyUI-KJNodes"]
    place = next((Path(place) for place in places if place and Path(place).is_dir()), None)
    if place is None:
        pytest.skip("KJNodes is not beside ComfyUI's custom nodes (or in KJNODES_DIR)")
    if "WanVideoNAG" not in nodes.NODE_CLASS_MAPPINGS:
        with torch.inference_mode(False):
            assert asyncio.run(nodes.load_custom_node(str(place)))
    return nodes.NODE_CLASS_MAPPINGS


def patched(node: type[Any], model: Any, settings: dict[str, Any]) -> Any:
    """The MODEL that a node makes of one, with its defaults but for these settings."""
    types = node.INPUT_TYPES()
    inputs: dict[str, Any] = {}
    for part in ("required", "optional"):
        for name, (kind, *options) in types.get(part, {}).items():
            given = options[0] if options else {}
            if name in settings:
                inputs[name] = settings[name]
            elif kind == "MODEL":
                inputs[name] = model
            elif isinstance(kind, (list, tuple)):
                inputs[name] = given.get("default", kind[0])
            elif kind == "COMBO":
                inputs[name] = given.get("default") or given["options"][0]
            elif "default" in given:
                inputs[name] = given["default"]
    if hasattr(node, "define_schema"):
        made = node.execute(**inputs)
        return getattr(made, "result", made)[0]
    return getattr(node(), node.FUNCTION)(**inputs)[0]
