"""Files of tiny models in every layout: writers for the table in tests/layout_rows.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .layout_forms import Form, Stored, Tensors, packed
from .layout_models import MODELS, load_wan, official_wan_names, reference, spiece
from .quantizers import write_gguf


@dataclass(frozen=True)
class Made:
    """What a user would choose, the plain numbers in it by the files' names, and how it is loaded if not as usual."""

    path: Path
    truth: Tensors
    load: Callable[[Path], Tensor] | None = None


Make = Callable[[str, Path], Made]  # model, folder


def numbers(model: str) -> tuple[Tensors, frozenset[str]]:
    """A model's tensors by the files' names, and which of them are linear weights."""
    about = MODELS[model]
    stored = {
        about.names(name): tensor
        for name, tensor in reference(model).state_dict().items()
        if "encoder.embed_tokens" not in name and "position_ids" not in name
    }
    return stored, frozenset(name for name in stored if about.is_linear(name) and stored[name].ndim == 2)


def file(form: Form, rename: Callable[[str], str] = str, more: Mapping[str, Tensor] | None = None) -> Make:
    """One safetensors file; `more` are other models' tensors in it."""

    def make(model: str, folder: Path) -> Made:
        stored = form(*numbers(model)).named(rename)
        extra = dict(more or {})
        if model == "umt5" and rename is not official_umt5:
            extra["spiece_model"] = torch.frombuffer(bytearray(spiece()), dtype=torch.uint8)
        elif model == "umt5":
            (folder / "spiece.model").write_bytes(spiece())
        return Made(
            write(folder / "model.safetensors", replace(stored, tensors={**stored.tensors, **extra})), stored.truth
        )

    return make


def write(path: Path, stored: Stored) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in stored.tensors.items()}, path, {**stored.metadata})
    return path


def shards(form: Form, rename: Callable[[str], str] = str) -> Make:
    """Three shards and their index, as on the hub; the folder is chosen."""

    def make(model: str, folder: Path) -> Made:
        stored, place = form(*numbers(model)).named(rename), {}
        for index, name in enumerate(stored.tensors):
            place[name] = f"diffusion_pytorch_model-{1 + index % 3:05d}-of-00003.safetensors"
        for shard in set(place.values()):
            part = {name: tensor for name, tensor in stored.tensors.items() if place[name] == shard}
            write(folder / shard, replace(stored, tensors=part))
        index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
        index_file.write_text(json.dumps({"weight_map": place}))
        return Made(folder, stored.truth)

    return make


def gguf_file(
    quant: str, rename: Callable[[str], str] = str, flat: bool = False, without: str = "", **fields: object
) -> Make:
    """A GGUF file; `flat` cuts convolutions to two dimensions, `without` leaves a tensor out."""

    def make(model: str, folder: Path) -> Made:
        stored, truth = packed(quant)(*numbers(model))
        tensors = {
            rename(name): (tensor.flatten(1) if flat and tensor.ndim > 2 and tensor.shape[0] > 1 else tensor, kind)
            for name, (tensor, kind) in stored.items()
            if name != without and rename(name) != "output_norm.weight"
        }
        if model == "umt5":
            (folder / "spiece.model").write_bytes(spiece())
        return Made(write_gguf(folder / "model.gguf", tensors, "wan", fields), truth)

    return make


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def to_diffusers(kind: str) -> Callable[[str], str]:
    """Wan's official names (also of scales beside a layer) to diffusers'."""

    def rename(name: str) -> str:
        table = {official: theirs for theirs, official in official_wan_names(kind).items()}
        layer, _, leaf = name.rpartition(".")
        if name in table:
            return table[name]
        return f"{table[f'{layer}.weight'].removesuffix('.weight')}.{leaf}" if f"{layer}.weight" in table else name

    return rename


UMT5_PARTS = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.1.layer_norm": "norm2",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "encoder.final_layer_norm": "norm",
    "shared": "token_embedding",
    "encoder.block": "blocks",
}
UMT5_LLAMA_CPP = {
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.0.SelfAttention.": "attn_",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "encoder.final_layer_norm": "enc.output_norm",
    "encoder.block": "enc.blk",
    "shared": "token_embd",
}


def official_umt5(name: str) -> str:
    return replaced(name, UMT5_PARTS)


def llama_cpp_umt5(name: str) -> str:
    return replaced(name, UMT5_LLAMA_CPP)


def replaced(name: str, parts: Mapping[str, str]) -> str:
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


def pickle(model: str, folder: Path) -> Made:
    tensors, _ = numbers(model)
    torch.save(tensors, folder / "model.pth")
    return Made(folder / "model.pth", tensors)


def converted_pickle(model: str, folder: Path) -> Made:
    """By the command that the refusal gives."""
    made = pickle(model, folder)
    save_file(torch.load(made.path, weights_only=True), folder / "model.safetensors")
    return Made(folder / "model.safetensors", made.truth)


def vace_parts(folder: Path) -> tuple[Path, Path, Tensors]:
    tensors, _ = numbers("vace")
    parts = [{n: t for n, t in tensors.items() if n.startswith("vace") == module} for module in (False, True)]
    base, module = (
        write(folder / f"{title}.safetensors", Stored(part, part))
        for title, part in zip(("base", "module"), parts, strict=True)
    )
    return base, module, tensors


def module_alone(model: str, folder: Path) -> Made:
    _, module, tensors = vace_parts(folder)
    return Made(module, tensors)


def module_beside(model: str, folder: Path) -> Made:
    base, module, tensors = vace_parts(folder)
    return Made(base, tensors, lambda path: load_wan("vace", path, module))


def without(start: str) -> Form:
    def write_part(tensors: Tensors, linear: frozenset[str]) -> Stored:
        return Stored({name: tensor for name, tensor in tensors.items() if not name.startswith(start)}, tensors)

    return write_part


def official_vae(config: str) -> Callable[[str], str]:
    """diffusers' names of a Wan VAE to the official ones."""
    from lowvram_video.wanvideo.vae.checkpoint import to_official_names  # whether they are right, the pictures tell

    table = to_official_names(reference(config).state_dict())
    return lambda name: table[name]
