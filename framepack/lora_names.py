"""The names that layers of FramePack transformers go by in LoRA files.

diffusers' names, which trainers for FramePack use, and HunyuanVideo's own, in Tencent's layout and in ComfyUI's: its
blocks have the same sizes, so that LoRAs for it work on FramePack. Source: Tencent/HunyuanVideo
(`hyvideo/modules/models.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..weights.files.checkpoint import TensorInfo
from ..weights.lora.names import LayerPart

BLOCK = re.compile(r"((?:single_)?transformer_blocks|context_embedder\.token_refiner\.refiner_blocks)\.(\d+)\.")

# What layers are one in HunyuanVideo, one after the other -> its names for it.
Names = Mapping[tuple[str, ...], tuple[str, ...]]

DOUBLE: Names = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): ("img_attn_qkv", "img_attn.qkv"),
    ("attn.norm_q",): ("img_attn_q_norm", "img_attn.norm.query_norm"),
    ("attn.norm_k",): ("img_attn_k_norm", "img_attn.norm.key_norm"),
    ("attn.to_out.0",): ("img_attn_proj", "img_attn.proj"),
    ("norm1.linear",): ("img_mod.linear", "img_mod.lin"),
    ("ff.net.0.proj",): ("img_mlp.fc1", "img_mlp.0"),
    ("ff.net.2",): ("img_mlp.fc2", "img_mlp.2"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): ("txt_attn_qkv", "txt_attn.qkv"),
    ("attn.norm_added_q",): ("txt_attn_q_norm", "txt_attn.norm.query_norm"),
    ("attn.norm_added_k",): ("txt_attn_k_norm", "txt_attn.norm.key_norm"),
    ("attn.to_add_out",): ("txt_attn_proj", "txt_attn.proj"),
    ("norm1_context.linear",): ("txt_mod.linear", "txt_mod.lin"),
    ("ff_context.net.0.proj",): ("txt_mlp.fc1", "txt_mlp.0"),
    ("ff_context.net.2",): ("txt_mlp.fc2", "txt_mlp.2"),
}
SINGLE: Names = {
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): ("linear1",),
    ("attn.norm_q",): ("q_norm", "norm.query_norm"),
    ("attn.norm_k",): ("k_norm", "norm.key_norm"),
    ("proj_out",): ("linear2",),
    ("norm.linear",): ("modulation.linear", "modulation.lin"),
}
REFINER: Names = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): ("self_attn_qkv", "self_attn.qkv"),
    ("attn.to_out.0",): ("self_attn_proj", "self_attn.proj"),
    ("norm1",): ("norm1",),
    ("norm2",): ("norm2",),
    ("ff.net.0.proj",): ("mlp.fc1", "mlp.0"),
    ("ff.net.2",): ("mlp.fc2", "mlp.2"),
    ("norm_out.linear",): ("adaLN_modulation.1",),
}
BLOCKS: Mapping[str, tuple[str, Names]] = {
    "transformer_blocks": ("double_blocks", DOUBLE),
    "single_transformer_blocks": ("single_blocks", SINGLE),
    "context_embedder.token_refiner.refiner_blocks": ("txt_in.individual_token_refiner.blocks", REFINER),
}
# Two layers with an activation between them, of diffusers' name and theirs.
EMBEDDER: Names = {
    ("linear_1",): ("mlp.0", "in_layer", "linear_1"),
    ("linear_2",): ("mlp.2", "out_layer", "linear_2"),
}
EMBEDDERS = {
    "time_text_embed.timestep_embedder": "time_in",
    "time_text_embed.guidance_embedder": "guidance_in",
    "time_text_embed.text_embedder": "vector_in",
    "context_embedder.time_text_embed.timestep_embedder": "txt_in.t_embedder",
    "context_embedder.time_text_embed.text_embedder": "txt_in.c_embedder",
}
OUTSIDE: Names = {
    ("x_embedder.proj",): ("img_in.proj",),
    ("context_embedder.proj_in",): ("txt_in.input_embedder",),
    ("proj_out",): ("final_layer.linear",),
}
HEAD, HEAD_NAME = "norm_out.linear", "final_layer.adaLN_modulation.1"


def framepack_aliases(tensors: Mapping[str, TensorInfo]) -> dict[str, str | tuple[LayerPart, ...]]:
    """Every name, in any layout, of a model's layers and tensors -> its official one, or several with their rows."""
    aliases: dict[str, str | tuple[LayerPart, ...]] = {}
    for name in tensors:
        for official in (name, name.rpartition(".")[0]):
            aliases[official] = official
    blocks = {match.groups() for name in tensors if (match := BLOCK.match(name))}
    for stem, number in blocks:
        their_stem, names = BLOCKS[stem]
        aliases |= _aliases(tensors, f"{stem}.{number}.", f"{their_stem}.{number}.", names)
    for layers, their_layers in EMBEDDERS.items():
        aliases |= _aliases(tensors, f"{layers}.", f"{their_layers}.", EMBEDDER)
    aliases |= _aliases(tensors, "", "", OUTSIDE)
    if f"{HEAD}.weight" in tensors:
        half = _num_rows(tensors, HEAD) // 2  # theirs is shift, then scale
        aliases[HEAD_NAME] = (LayerPart(HEAD, (range(half, 2 * half), range(half))),)
    return aliases


def _aliases(
    tensors: Mapping[str, TensorInfo], ours: str, theirs: str, names: Names
) -> dict[str, str | tuple[LayerPart, ...]]:
    aliases: dict[str, str | tuple[LayerPart, ...]] = {}
    for leaves, their_leaves in names.items():
        layers = [ours + leaf for leaf in leaves]
        if all(f"{layer}.weight" in tensors for layer in layers):
            alias = layers[0] if len(layers) == 1 else _parts(tensors, layers)
            aliases |= {theirs + leaf: alias for leaf in their_leaves}
    return aliases


def _parts(tensors: Mapping[str, TensorInfo], layers: list[str]) -> tuple[LayerPart, ...]:
    parts, first = [], 0
    for layer in layers:
        end = first + _num_rows(tensors, layer)
        parts.append(LayerPart(layer, (range(first, end),)))
        first = end
    return tuple(parts)


def _num_rows(tensors: Mapping[str, TensorInfo], layer: str) -> int:
    info = tensors[f"{layer}.weight"]
    return info.unpacked_shape[0]
