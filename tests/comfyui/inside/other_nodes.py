"""Nodes of ComfyUI and of other packs by their ids, called with their defaults; the tables of docs/other_nodes.md."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

DOCS = Path(__file__).parents[3] / "docs/other_nodes.md"

# Where defaults change nothing, or are not for these tiny latents. What begins with @ is made for each family.
SETTINGS: dict[str, dict[str, Any]] = {
    "ApplyRifleXRoPE_HunuyanVideo": {"latent": "@latent", "k": 2},
    "ApplyRifleXRoPE_WanVideo": {"latent": "@latent", "k": 2},
    "ARVideoI2V": {"vae": "@vae", "start_image": "@image", "width": 48, "height": 32, "length": 13},
    "CFGOverride": {"cfg": 1.5, "start_percent": 0.0, "end_percent": 1.0},
    "ContextWindowsManual": {
        "context_length": 2, "context_overlap": 1, "context_schedule": "standard_static", "dim": 2,
        "fuse_method": "pyramid", "closed_loop": False, "context_stride": 1, "cond_retain_index_list": "",
    },
    "ContextWindowsVisualizerKJ": {"context_length": 5, "context_overlap": 4, "context_schedule": "standard_static"},
    "DiTBlockLoraLoader": {"lora_name": "@lora", "strength_model": 1.0, "blocks": None, "opt_lora_path": None},
    "DifferentialDiffusionAdvanced": {"samples": "@latent", "mask": "@mask"},
    "EasyCache": {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0},
    "FreSca": {"scale_low": 1.2, "scale_high": 1.5, "freq_cutoff": 1},
    "HiDreamO1PatchSeamSmoothing": {"start_percent": 0.0},
    "LTXVContextWindows": {"context_length": 9, "context_overlap": 8, "context_schedule": "standard_static"},
    "LatentApplyOperationCFG": {"operation": "@operation"},
    "LazyCache": {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0},
    "LoraLoader": {"clip": None, "lora_name": "@lora", "strength_model": 1.0, "strength_clip": 0.0},
    "LoraLoaderBypass": {"clip": None, "lora_name": "@lora", "strength_model": 1.0, "strength_clip": 0.0},
    "LoraLoaderBypassModelOnly": {"lora_name": "@lora", "strength_model": 1.0},
    "LoraLoaderModelOnly": {"lora_name": "@lora", "strength_model": 1.0},
    "LoraModelLoader": {"lora": "@lora tensors", "strength_model": 1.0},
    "Epsilon Scaling": {"scaling_factor": 1.05},
    "ModelAttentionBackend": {"attention": "pytorch attention"},
    "ModelComputeDtype": {"dtype": "bf16"},
    "ModelMemoryUsageFactorOverride": {"memory_usage_factor": 2.0},
    "ModelNoiseScale": {"noise_scale": 1.2},
    "ModelSamplingSD3": {"shift": 9.0},
    "PathchSageAttentionKJ": {"sage_attention": "disabled"},
    "PerpNeg": {"empty_conditioning": "@conditioning"},
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "ScaleROPE": {"scale_x": 0.5, "shift_x": 3.0, "scale_y": 1.2, "shift_y": 1.0, "scale_t": 0.5, "shift_t": 2.0},
    "SkipLayerGuidanceDiT": {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiTSimple": {
        "double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0
    },
    "SkipLayerGuidanceSD3": {"layers": "1", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceWanVideo": {"blocks": "1"},
    "TorchCompileModel": {"backend": "inductor"},
    "TorchCompileModelAdvanced": {"backend": "inductor"},
    "TorchCompileModelWanVideoV2": {"backend": "inductor"},
    "WanContextWindowsManual": {"context_length": 5, "context_overlap": 4, "context_schedule": "standard_static"},
    "WanVideoEnhanceAVideoKJ": {"latent": "@latent"},
    "WanVideoNAG": {"conditioning": "@conditioning"},
}  # fmt: skip
COMPILERS = ("TorchCompileModel", "TorchCompileModelAdvanced", "TorchCompileModelWanVideoV2")


def table(title: str) -> list[tuple[str, str, str]]:
    """(node, on Wan, on FramePack) of the document's table under this title."""
    rows = [line.strip("|").split("|") for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows[2:]]
    return [(row[0], row[1], row[2]) for row in cells]


def listed(title: str) -> list[str]:
    """The nodes of a list of names under this title."""
    for paragraph in section(title).split("\n\n"):
        names = [name.strip() for name in paragraph.replace("\n", " ").split(",")]
        if len(names) > 1 and all(re.fullmatch(r"\w+", name) for name in names):
            return names
    raise AssertionError(f"no list of nodes under {title!r}")


def section(title: str) -> str:
    return DOCS.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]


def known() -> dict[str, type]:
    """All of core's nodes, loaded once."""
    import nodes

    if "APG" not in nodes.NODE_CLASS_MAPPINGS:
        with torch.inference_mode(False):
            asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes.NODE_CLASS_MAPPINGS


def known_of_kjnodes() -> dict[str, type]:
    """All nodes, KJNodes', unmodified, among them."""
    place = place_of("ComfyUI-KJNodes", "KJNODES_DIR")
    import server

    import nodes

    if "WanVideoNAG" not in nodes.NODE_CLASS_MAPPINGS:
        page = mock.patch.object(server.PromptServer, "instance", mock.MagicMock(), create=True)
        with torch.inference_mode(False), page:
            assert asyncio.run(nodes.load_custom_node(str(place)))
    return nodes.NODE_CLASS_MAPPINGS


def place_of(folder: str, variable: str) -> Path:
    """A pack beside ComfyUI's custom nodes, or where an environment variable says; a test without it is skipped."""
    places = [os.environ.get(variable, ""), Path(os.environ["COMFYUI_DIR"]) / "custom_nodes" / folder]
    place = next((Path(place) for place in places if place and Path(place).is_dir()), None)
    if place is None:
        pytest.skip(f"{folder} is not beside ComfyUI's custom nodes (or in {variable})")
    return place


def patched(node: type[Any], model: Any, settings: dict[str, Any]) -> Any:
    """The MODEL that a node makes of one, with its defaults but for these settings."""
    inputs = defaults_of(node) | {name: model for name, kind, _ in inputs_of(node) if kind == "MODEL"} | settings
    if hasattr(node, "define_schema"):
        made = node.execute(**inputs)
        return getattr(made, "result", made)[0]
    return getattr(node(), node.FUNCTION)(**inputs)[0]


def defaults_of(node: type[Any]) -> dict[str, Any]:
    """What its widgets show at first."""
    found: dict[str, Any] = {}
    for name, kind, given in inputs_of(node):
        if isinstance(kind, (list, tuple)):
            found[name] = given.get("default", kind[0] if kind else "")
        elif kind == "COMBO":
            found[name] = given.get("default") or given["options"][0]
        elif "default" in given:
            found[name] = given["default"]
    return found


def inputs_of(node: type[Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, kind, options) of each."""
    types = node.INPUT_TYPES()
    return [
        (name, kind, options[0] if options else {})
        for part in ("required", "optional")
        for name, (kind, *options) in types.get(part, {}).items()
    ]
