"""The example workflows as the tests run them: tiny files under their names, as prompts, in small sizes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lowvram_video.wanvideo.config import WanConfig
from lowvram_video.wanvideo.model import WanModel
from lowvram_video.wanvideo.vae import WAN21_VAE, WAN22_VAE, WanVAE
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..tiny import randomize
from . import model_files as files
from .graph import ModelFile
from .server import Graph

FOLDER = Path(__file__).parents[2] / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
NOT_RUN = {"MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
STAND_INS = {"CLIPTextEncode": "TestConditioning", "CLIPVisionEncode": "TestClipVision"}
REPLACED_LOADERS = {"CLIPLoader", "CLIPVisionLoader"}

TINY = WanConfig("t2v", dim=128, ffn_dim=192, num_heads=1, num_layers=2)
I2V = replace(TINY, model_type="i2v", in_channels=36)
CONFIGS: dict[ModelFile, WanConfig] = {
    files.T2V_SMALL: TINY,
    files.T2V_HIGH: TINY,
    files.T2V_LOW: TINY,
    files.I2V_480P: replace(I2V, image_dim=1280),
    files.I2V_HIGH: I2V,
    files.I2V_LOW: I2V,
    files.FLF2V: replace(I2V, model_type="flf2v", image_dim=1280, image_pos_tokens=514),
    files.VACE_SMALL: replace(TINY, model_type="vace", vace_layers=1, vace_channels=96),
    files.TI2V: replace(TINY, model_type="ti2v", in_channels=48, out_channels=48),
}
LORAS = (files.T2V_LORA_HIGH, files.T2V_LORA_LOW, files.I2V_LORA_HIGH, files.I2V_LORA_LOW)


def load(name: str) -> dict[str, Any]:
    """A workflow as shipped."""
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


# --- files -----------------------------------------------------------------------------------------------


def make_models(folder: Path) -> None:
    """ComfyUI's models folder with a tiny file for every download of the workflows."""
    for number, (file, config) in enumerate(CONFIGS.items()):
        tensors = dict(randomize(WanModel(config), number).state_dict())
        _save(folder, file, _as_named(file.name, tensors))
    for file in LORAS:
        _save(folder, file, _lora())
    vae = randomize(WanVAE(replace(WAN21_VAE, encoder_dim=8, decoder_dim=8)))
    _save(folder, files.VAE_21, dict(vae.state_dict()))
    _save(folder, files.VAE_22, _full_size(WanVAE(WAN22_VAE, device="meta")))
    # the loaders of these are replaced, but their menus are checked
    for file in (files.TEXT_ENCODER, files.CLIP_VISION):
        _save(folder, file, {"empty": torch.zeros(1)})


def make_picture(folder: Path) -> None:
    """The picture that ComfyUI ships as its example."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").convert("RGB").save(folder / "example.png")


def _save(folder: Path, file: ModelFile, tensors: dict[str, Tensor]) -> None:
    (folder / file.directory).mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / file.directory / file.name)


def _as_named(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored as the file's name says: fp16, fp8, or fp8 with a scale per layer."""
    if "fp8" not in name:
        return {key: tensor.half() for key, tensor in tensors.items()}
    stored: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not (key.startswith("blocks.") and key.endswith("weight") and tensor.ndim == 2):
            stored[key] = tensor.half()
            continue
        scale = tensor.abs().max() / 448 if "scaled" in name else torch.ones(())
        stored[key] = (tensor / scale).to(torch.float8_e4m3fn)
        if "scaled" in name:
            stored[key.replace(".weight", ".scale_weight")] = scale.float()
    if "scaled" in name:
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return stored


def _lora(rank: int = 4) -> dict[str, Tensor]:
    layer, generator = "diffusion_model.blocks.1.self_attn.q", torch.Generator().manual_seed(0)
    return {
        f"{layer}.lora_down.weight": torch.randn(rank, TINY.dim, generator=generator) / TINY.dim**0.5,
        f"{layer}.lora_up.weight": torch.randn(TINY.dim, rank, generator=generator) * 0.5,
        f"{layer}.alpha": torch.tensor(float(rank)),
    }


def _full_size(model: WanVAE) -> dict[str, Tensor]:
    """Core builds this VAE in its full size: random fp16, the same numbers again and again to be quick."""
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = noise.repeat(tensor.numel() // noise.numel() + 1)[: tensor.numel()].view(tensor.shape)
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
        tensors[name] = (torch.ones(tensor.shape) if "gamma" in name else values * (0.7 / fan_in**0.5)).half()
    return tensors


# --- prompts ---------------------------------------------------------------------------------------------


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    """The API format of a UI workflow, as the browser makes it; `object_info` is the server's /object_info."""
    sources = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    running = {node["id"] for node in workflow["nodes"] if node["mode"] == 0 and node["type"] not in NOT_RUN}
    graph: Graph = {}
    for node in workflow["nodes"]:
        if node["id"] not in running:
            continue
        info = object_info[node["type"]]
        inputs = _widget_inputs(info["input"], list(node["widgets_values"]))
        for slot in node["inputs"]:
            if slot["link"] is not None and sources[slot["link"]][0] in running:
                source, output = sources[slot["link"]]
                inputs[slot["name"]] = [str(source), output]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def _widget_inputs(schema: dict[str, Any], values: list[Any], prefix: str = "") -> dict[str, Any]:
    """Values of a schema's widgets, taken from the front of `values`; defaults where those end."""
    inputs: dict[str, Any] = {}
    for section in ("required", "optional"):
        for name, spec in schema.get(section, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if not (isinstance(kind, list) or kind in WIDGET_TYPES or kind == DYNAMIC):
                continue
            value = values.pop(0) if values else _default(kind, options)
            if values and (options.get("control_after_generate") or options.get("image_upload")):
                values.pop(0)
            inputs[prefix + name] = value
            if kind == DYNAMIC:
                chosen = next(option for option in options["options"] if option["key"] == value)
                inputs |= _widget_inputs(chosen["inputs"], values, f"{prefix}{name}.")
    return inputs


def _default(kind: Any, options: dict[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    if kind == DYNAMIC:
        return options["options"][0]["key"]
    return kind[0] if isinstance(kind, list) else options["options"][0]


def for_test(prompt: Graph, width: int = 64, height: int = 48, length: int = 5, steps: int = 2) -> Graph:
    """A copy with stand-ins for text encoder and CLIP vision, a small size, and few steps."""
    graph = copy.deepcopy(prompt)
    sizes = {"Width": width, "Height": height, "Frames": length}
    for number, node in list(graph.items()):
        kind, inputs = node["class_type"], node["inputs"]
        if kind in REPLACED_LOADERS:
            del graph[number]
        elif kind in STAND_INS:
            graph[number] = {"class_type": STAND_INS[kind], "inputs": {"seed": int(number)}}
        elif kind == "KSampler":
            inputs["steps"] = steps
    for value, number in zip(sizes.values(), size_nodes(graph), strict=True):
        graph[number]["inputs"]["value"] = value
    return graph


def size_nodes(graph: Graph) -> list[str]:
    """The nodes of width, height and frames."""
    plan = next(node for node in graph.values() if node["class_type"] == "LowVRAMPlan")
    return [plan["inputs"][name][0] for name in ("width", "height", "length")]
