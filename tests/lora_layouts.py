"""Every layout of LoRA files that we know, as tiny files, and what each does to a model, computed plainly in fp32.

A layout is one line of a table: how its keys are called, and what its numbers mean by the paper or by the program that
writes it. Nothing here comes from the code under test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .loras import DIALECTS, diffusers_name

Tensors = dict[str, Tensor]
Weights = Mapping[str, Tensor]
Changes = dict[str, Tensor]  # a tensor of the model -> what it is with the LoRA at strength 1

RANK, ALPHA = 4, 2.0
Q, FFN_IN, FFN_OUT = "blocks.0.self_attn.q", "blocks.0.ffn.0", "blocks.0.ffn.2"
ATTENTION = tuple(f"blocks.0.{attn}.{layer}" for attn in ("self_attn", "cross_attn") for layer in "qkvo")
LAYERS = (*ATTENTION, FFN_IN, FFN_OUT)
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


@dataclass(frozen=True)
class MadeLora:
    """A LoRA's tensors, header and the file beside it; `changes` is the model with it, at strength 1."""

    tensors: Tensors
    changes: Changes
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, object] | None = None  # adapter_config.json
    replaced: frozenset[str] = frozenset()  # tensors whose place is taken, at any strength

    def save(self, folder: Path) -> Path:
        path = folder / "lora.safetensors"
        save_file({name: tensor.clone().contiguous() for name, tensor in self.tensors.items()}, path, {**self.metadata})
        if self.beside is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self.beside), encoding="utf-8")
        return path


@dataclass(frozen=True)
class Layout:
    """A line of the table: `keys` shows one, `written_by` says by whom."""

    keys: str
    written_by: str
    make: Callable[[Weights], MadeLora]
    merged_only: bool = False  # nothing of it runs beside a layer


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(weights: Weights, layer: str, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """down, up: random, their product a tenth of the weight."""
    rows, columns = weights[f"{layer}.weight"].shape
    seed = sum(map(ord, layer))
    return rand(seed, rank, columns) * 0.3 / columns**0.5, rand(seed + 1, rows, rank) * 0.3


def with_delta(weights: Weights, layer: str, delta: Tensor) -> Changes:
    weight = weights[f"{layer}.weight"]
    return {f"{layer}.weight": weight + delta.view(weight.shape)}


# --- plain pairs by every name ---------------------------------------------------------------------------


def pairs(
    stem: Callable[[str], str],
    ends: tuple[str, str],
    layers: tuple[str, ...] = LAYERS,
    alpha_end: str | None = "alpha",
    scale: float = ALPHA / RANK,
    metadata: Mapping[str, str] | None = None,
    beside: Mapping[str, object] | None = None,
) -> Callable[[Weights], MadeLora]:
    def make(weights: Weights) -> MadeLora:
        tensors, changes = {}, {}
        for layer in layers:
            down, up = factors(weights, layer)
            tensors |= {f"{stem(layer)}{join(ends[0])}": down, f"{stem(layer)}{join(ends[1])}": up}
            if alpha_end is not None:
                tensors[f"{stem(layer)}.{alpha_end}"] = torch.tensor(ALPHA)
            changes |= with_delta(weights, layer, scale * up @ down)
        return MadeLora(tensors, changes, metadata or {}, beside)

    return make


def join(end: str) -> str:
    return end if end.startswith("_") else f".{end}"


def underscored(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer.replace(".", "_")


def half_underscored(layer: str) -> str:
    blocks, number, rest = layer.split(".", 2)
    return f"lora_unet_{blocks}_{number}.{rest}"


def processor(layer: str) -> str:
    *start, last = f"transformer.{diffusers_name(layer)}".removesuffix(".0").split(".")
    return ".".join([*start, "processor", last])


SPELLINGS = {
    title: Layout(f"{name(Q)}.{ends[0]}", title, pairs(name, ends)) for title, (name, ends) in DIALECTS.items()
}
INNER = tuple(layer for layer in ATTENTION if layer[-1] != "o")
SPELLINGS |= {
    "half-underscored": Layout(
        "lora_unet_blocks_0.self_attn.q.lora_down.weight", "conversions", pairs(half_underscored, DOWN_UP)
    ),
    "OneTrainer": Layout(
        "lora_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "OneTrainer",
        pairs(lambda layer: underscored("lora_transformer_")(diffusers_name(layer)), DOWN_UP),
    ),
    "LyCORIS, LoCon": Layout(
        "lycoris_blocks_0_attn1_to_q.lora_down.weight",
        "SimpleTuner with LyCORIS",
        pairs(lambda layer: underscored("lycoris_")(diffusers_name(layer)), DOWN_UP),
    ),
    "low-noise expert": Layout(
        "transformer_2.blocks.0.attn1.to_q.lora_A.weight",
        "diffusers, for Wan 2.2",
        pairs(lambda layer: f"transformer_2.{diffusers_name(layer)}", AB),
    ),
    "DiffSynth, low noise": Layout(
        "pipe.dit2.blocks.0.self_attn.q.lora_A.default.weight",
        "DiffSynth-Studio, for Wan 2.2",
        pairs(lambda layer: f"pipe.dit2.{layer}", ("lora_A.default.weight", "lora_B.default.weight")),
    ),
    "checkpoint's prefix": Layout(
        "model.diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "merging tools",
        pairs(lambda layer: f"model.diffusion_model.{layer}", AB),
    ),
    "compiled while it was trained": Layout(
        "diffusion_model.blocks.0._orig_mod.self_attn.q.lora_A.weight",
        "trainers with torch.compile",
        pairs(lambda layer: "diffusion_model." + layer.replace("blocks.0.", "blocks.0._orig_mod."), AB),
    ),
    "sharded while it was trained": Layout(
        "base_model.model._fsdp_wrapped_module.blocks.0.self_attn.q.lora_A.weight",
        "trainers with FSDP",
        pairs(lambda layer: f"base_model.model._fsdp_wrapped_module.{layer}", AB),
    ),
    "adapter's name last": Layout(
        "blocks.0.self_attn.q.lora_A.default", "PEFT", pairs(lambda layer: layer, ("lora_A.default", "lora_B.default"))
    ),
    "linear layers' own": Layout(
        "transformer.blocks.0.attn1.to_q.lora_linear_layer.down.weight",
        "diffusers before 0.22",
        pairs(
            lambda layer: f"transformer.{diffusers_name(layer)}",
            ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ),
    ),
    "attention processors": Layout(
        "transformer.blocks.0.attn1.processor.to_q_lora.down.weight",
        "diffusers before 0.22",
        pairs(processor, ("_lora.down.weight", "_lora.up.weight"), INNER),
    ),
    "without .weight": Layout(
        "lora_unet_blocks_0_self_attn_q.lora_down",
        "old exports",
        pairs(underscored("lora_unet_"), ("lora_down", "lora_up")),
    ),
}


# --- strengths -------------------------------------------------------------------------------------------


def diffusers_stem(layer: str) -> str:
    return f"transformer.{diffusers_name(layer)}"


def header(**config: object) -> dict[str, str]:
    """As diffusers writes it."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}


def stated(
    scale: float, metadata: Mapping[str, str] | None = None, beside: Mapping[str, object] | None = None
) -> Callable[[Weights], MadeLora]:
    return pairs(diffusers_stem, AB, alpha_end=None, scale=scale, metadata=metadata, beside=beside)


def patterns(weights: Weights) -> MadeLora:
    """Two layers of a rank and an alpha of their own."""
    own = {Q: (8, 4.0), FFN_IN: (2, 6.0)}
    tensors, changes = {}, {}
    for layer in LAYERS:
        rank, alpha = own.get(layer, (RANK, 16.0))
        down, up = factors(weights, layer, rank)
        tensors |= {f"{diffusers_stem(layer)}.lora_A.weight": down, f"{diffusers_stem(layer)}.lora_B.weight": up}
        changes |= with_delta(weights, layer, alpha / rank * up @ down)
    names = {"blocks.0.attn1.to_q": Q, r"^blocks\.\d+\.ffn\.net\.0\.proj": FFN_IN}
    return MadeLora(
        tensors,
        changes,
        header(
            r=RANK,
            lora_alpha=16,
            rank_pattern={name: own[layer][0] for name, layer in names.items()},
            alpha_pattern={name: own[layer][1] for name, layer in names.items()},
        ),
    )


ALPHA_KEYS = "transformer.blocks.0.attn1.to_q.lora_A.weight"
SCALES = {
    "no alpha": Layout(ALPHA_KEYS, "diffusers, PEFT, ai-toolkit (alpha is the rank)", stated(1.0)),
    "alpha in the header": Layout(
        "header `lora_adapter_metadata`", "diffusers, SimpleTuner", stated(4.0, header(r=4, lora_alpha=16))
    ),
    "alpha in the header, by layer": Layout("header `alpha_pattern`, `rank_pattern`", "diffusers, PEFT", patterns),
    "rsLoRA": Layout(
        "header `use_rslora`", "diffusers, PEFT", stated(8.0, header(r=4, lora_alpha=16, use_rslora=True))
    ),
    "finetrainers": Layout(
        "header `lora_config`", "finetrainers", stated(2.0, {"lora_config": json.dumps({"r": 4, "lora_alpha": 8})})
    ),
    "plain header": Layout("header `lora_alpha`", "scripts with PEFT", stated(2.0, {"lora_alpha": "8", "rank": "4"})),
    "adapter_config.json": Layout(
        "`adapter_config.json` beside it", "PEFT, diffusion-pipe", stated(4.0, None, {"r": 4, "lora_alpha": 16})
    ),
    "adapter_config.json, rsLoRA": Layout(
        "`adapter_config.json` with `use_rslora`",
        "PEFT",
        stated(8.0, None, {"r": 4, "lora_alpha": 16, "use_rslora": True, "peft_type": "LORA"}),
    ),
    "kohya's notes": Layout(
        "header `ss_network_alpha`: not used, as converters that scale the pairs keep it",
        "musubi-tuner's convert_lora.py",
        stated(1.0, {"ss_network_alpha": "1.0", "ss_network_dim": "4"}),
    ),
}


# --- decompositions --------------------------------------------------------------------------------------

KIND_STEM = underscored("lora_unet_")


def of_layers(parts: Callable[[Tensor, int], tuple[Tensors, Tensor]], stem: Callable[[str], str] = KIND_STEM):
    """Of each layer: parts by their ends, and the weight with them."""

    def make(weights: Weights) -> MadeLora:
        tensors, changes = {}, {}
        for seed, layer in enumerate(LAYERS):
            made, changed = parts(weights[f"{layer}.weight"], 100 * seed)
            tensors |= {f"{stem(layer)}.{end}": tensor for end, tensor in made.items()}
            changes[f"{layer}.weight"] = changed
        return MadeLora(tensors, changes)

    return make


def dora(by_column: bool) -> Callable[[Tensor, int], tuple[Tensors, Tensor]]:
    def parts(weight: Tensor, seed: int) -> tuple[Tensors, Tensor]:
        down, up = rand(seed, RANK, weight.shape[1]) / 30, rand(seed + 1, weight.shape[0], RANK) / 3
        dim = 0 if by_column else 1
        magnitude = weight.norm(dim=dim, keepdim=True) * (1 + 0.2 * rand(seed + 2, 1))
        changed = weight + ALPHA / RANK * up @ down
        changed = magnitude * changed / changed.norm(dim=dim, keepdim=True)
        ends = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA), "dora_scale": magnitude}
        return ends, changed

    return parts


def loha(weight: Tensor, seed: int) -> tuple[Tensors, Tensor]:
    rows, columns = weight.shape
    ends, halves = {}, []
    for number in "12":
        seed += 2
        a, b = rand(seed, rows, RANK) / 2, rand(seed + 1, RANK, columns) / 5
        ends |= {f"hada_w{number}_a": a, f"hada_w{number}_b": b}
        halves.append(a @ b)
    ends["alpha"] = torch.tensor(ALPHA)
    return ends, weight + ALPHA / RANK * halves[0] * halves[1]


def lokr(first: int, second: int, alpha: float = ALPHA) -> Callable[[Tensor, int], tuple[Tensors, Tensor]]:
    """Ranks of the two matrices; 0: it is whole."""

    def parts(weight: Tensor, seed: int) -> tuple[Tensors, Tensor]:
        sizes = ((4, 4), (weight.shape[0] // 4, weight.shape[1] // 4))
        ends, whole, scale = {}, [], 1.0
        for number, (rows, columns), rank in zip("12", sizes, (first, second), strict=True):
            seed += 2
            if not rank:
                ends[f"lokr_w{number}"] = rand(seed, rows, columns) / 5
                whole.append(ends[f"lokr_w{number}"])
                continue
            a, b = rand(seed, rows, rank) / 3, rand(seed + 1, rank, columns) / 3
            ends |= {f"lokr_w{number}_a": a, f"lokr_w{number}_b": b}
            whole.append(a @ b)
            scale = alpha / rank
        ends["alpha"] = torch.tensor(alpha)
        return ends, weight + scale * torch.kron(*whole)

    return parts


def glora(is_old: bool) -> Callable[[Tensor, int], tuple[Tensors, Tensor]]:
    def parts(weight: Tensor, seed: int) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        a1, a2 = rand(seed, columns, RANK) / 20, rand(seed + 1, RANK, columns) / 5
        b1, b2 = rand(seed + 2, rows, RANK) / 20, rand(seed + 3, RANK, columns) / 5
        changed = weight + ALPHA / RANK * (weight @ a1 @ a2 + b1 @ b2)
        if is_old:
            a1, a2, b1, b2 = a2, a1, b2, b1
        ends = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(ALPHA)}
        return ends, changed

    return parts


def cayley(blocks: Tensor, constraint: float = 0.0) -> Tensor:
    skew = blocks - blocks.transpose(-1, -2)
    if 0 < constraint < skew.norm():
        skew = skew * constraint / skew.norm()
    one = torch.eye(blocks.shape[-1])
    return torch.linalg.solve(one - skew, one + skew)  # the two commute


def oft(constraint: float = 0.0, rescaled: bool = False) -> Callable[[Tensor, int], tuple[Tensors, Tensor]]:
    def parts(weight: Tensor, seed: int) -> tuple[Tensors, Tensor]:
        size = 16
        blocks = rand(seed, weight.shape[0] // size, size, size) / 20
        ends = {"oft_blocks": blocks, "alpha": torch.tensor(constraint)}
        turns = torch.block_diag(*cayley(blocks, constraint)).T
        changed = turns @ weight
        if rescaled:
            ends["rescale"] = 1 + 0.1 * rand(seed + 1, weight.shape[0], 1)
            changed = ends["rescale"] * changed
        return ends, changed

    return parts


def boft(weight: Tensor, seed: int) -> tuple[Tensors, Tensor]:
    """Two steps: rows that lie side by side, then rows that lie `size` apart."""
    rows, size = weight.shape[0], 8
    blocks = rand(seed, 2, rows // size, size, size) / 20
    changed = weight
    for step, turns in enumerate(cayley(blocks)):
        stride = 2**step * (size // 2)
        order = torch.arange(rows).view(-1, 2, stride).transpose(1, 2).reshape(-1)
        shuffled = torch.block_diag(*turns) @ changed[order]
        changed = torch.empty_like(shuffled)
        changed[order] = shuffled
    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, changed


def lokr_of_peft(weights: Weights) -> MadeLora:
    made = of_layers(lokr(0, RANK), lambda layer: f"base_model.model.{diffusers_name(layer)}")(weights)
    tensors = {name: tensor for name, tensor in made.tensors.items() if not name.endswith("alpha")}
    return MadeLora(tensors, made.changes, {}, {"peft_type": "LOKR", "r": RANK, "alpha": ALPHA})


def simpletuner(weights: Weights) -> MadeLora:
    return of_layers(lokr(0, 0, 1.0), lambda layer: underscored("lycoris_")(diffusers_name(layer)))(weights)


LOHA_KEYS, OFT_KEYS = "lora_unet_blocks_0_self_attn_q.hada_w1_a", "lora_unet_blocks_0_self_attn_q.oft_blocks"
KINDS = {
    "DoRA, by output": Layout("….dora_scale [out, 1]", "LyCORIS, PEFT, OneTrainer", of_layers(dora(False)), True),
    "DoRA, by input": Layout("….dora_scale [1, in]", "LyCORIS, kohya's sd-scripts", of_layers(dora(True)), True),
    "LoHa": Layout(LOHA_KEYS, "LyCORIS, musubi-tuner", of_layers(loha)),
    "LoKr, both matrices whole": Layout("….lokr_w1, lokr_w2", "LyCORIS, ai-toolkit", of_layers(lokr(0, 0)), True),
    "LoKr, the second decomposed": Layout("….lokr_w1, lokr_w2_a, lokr_w2_b", "LyCORIS", of_layers(lokr(0, 2))),
    "LoKr, both decomposed": Layout("….lokr_w1_a, …, lokr_w2_b", "LyCORIS", of_layers(lokr(2, 4))),
    "LoKr of SimpleTuner": Layout("lycoris_blocks_0_attn1_to_q.lokr_w1", "SimpleTuner", simpletuner, True),
    "LoKr of PEFT": Layout("base_model.model.….lokr_w1, alpha in adapter_config.json", "PEFT", lokr_of_peft),
    "GLoRA": Layout("….a1.weight, a2.weight, b1.weight, b2.weight", "LyCORIS", of_layers(glora(False)), True),
    "GLoRA, old": Layout("….a1.weight …, each pair the other way round", "LyCORIS 1", of_layers(glora(True)), True),
    "OFT": Layout(OFT_KEYS, "LyCORIS, OneTrainer", of_layers(oft()), True),
    "OFT, constrained": Layout("….oft_blocks, alpha", "LyCORIS", of_layers(oft(2.0)), True),
    "OFT, rescaled": Layout("….oft_blocks, rescale", "LyCORIS", of_layers(oft(rescaled=True)), True),
    "BOFT": Layout("….oft_blocks of four dimensions", "LyCORIS", of_layers(boft), True),
}


# --- convolutions ----------------------------------------------------------------------------------------


def convolution(*parts: str) -> Callable[[Weights], MadeLora]:
    """Of the patch embedding `[dim, channels, 1, 2, 2]`: a pair, or a product around a core."""

    def make(weights: Weights) -> MadeLora:
        weight, stem = weights["patch_embedding.weight"], KIND_STEM("patch_embedding")
        rows, channels, *kernel = weight.shape
        core, core2 = rand(1, RANK, RANK, *kernel) / 5, rand(2, RANK, RANK, *kernel) / 2
        tensors: Tensors = {f"{stem}.alpha": torch.tensor(ALPHA)}
        if "hada_t1" in parts:
            a, b, a2, b2 = (rand(3 + n, RANK, size) / 2 for n, size in enumerate((rows, channels, rows, channels)))
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
            tensors |= {f"{stem}.{n}": t for n, t in zip(names, (a, b, a2, b2, core, core2), strict=True)}
            delta = torch.einsum("rs...,ro,sc->oc...", core, a, b) * torch.einsum("rs...,ro,sc->oc...", core2, a2, b2)
        elif "lokr_t2" in parts:
            w1, a, b = rand(3, 2, 2) / 2, rand(4, RANK, rows // 2) / 2, rand(5, RANK, channels // 2) / 2
            tensors |= {
                f"{stem}.{n}": t for n, t in (("lokr_w1", w1), ("lokr_w2_a", a), ("lokr_w2_b", b), ("lokr_t2", core))
            }
            delta = torch.kron(w1[..., None, None, None], torch.einsum("rs...,ro,sc->oc...", core, a, b).contiguous())
        elif "lora_mid" in parts:
            down, up = rand(3, RANK, channels, 1, 1, 1) / 4, rand(4, rows, RANK, 1, 1, 1) / 2
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.lora_mid.weight": core}
            delta = torch.einsum("or,rs...,sc->oc...", up.flatten(1), core, down.flatten(1))
        else:
            down, up = rand(3, RANK, channels, *kernel) / 10, rand(4, rows, RANK, 1, 1, 1) / 3
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            delta = torch.einsum("or,rc...->oc...", up.flatten(1), down)
        return MadeLora(tensors, with_delta(weights, "patch_embedding", ALPHA / RANK * delta))

    return make


CONVOLUTIONS = {
    "convolution": Layout("lora_unet_patch_embedding.lora_down.weight", "kohya, LyCORIS", convolution(), True),
    "convolution with a middle": Layout("….lora_mid.weight", "LyCORIS with Tucker", convolution("lora_mid"), True),
    "LoHa of a convolution": Layout("….hada_t1, hada_t2", "LyCORIS with Tucker", convolution("hada_t1"), True),
    "LoKr of a convolution": Layout("….lokr_t2", "LyCORIS with Tucker", convolution("lokr_t2"), True),
}


# --- what is no pair -------------------------------------------------------------------------------------


def whole(
    ends: Mapping[str, tuple[str, bool]], stem: Callable[[str], str] = lambda name: f"diffusion_model.{name}"
) -> Callable[[Weights], MadeLora]:
    """end of a key -> the tensor of the model, and whether it is replaced; otherwise added to."""

    def make(weights: Weights) -> MadeLora:
        tensors, changes = {}, {}
        for seed, (end, (name, replaced)) in enumerate(ends.items()):
            values = rand(seed, *weights[name].shape) * 0.3
            tensors[stem(end)] = values
            changes[name] = values if replaced else weights[name] + values
        return MadeLora(tensors, changes, replaced=frozenset(name for name, replaced in ends.values() if replaced))

    return make


def bias_of_pair(weights: Weights) -> MadeLora:
    """PEFT: it has the pair's strength."""
    made = pairs(lambda layer: f"base_model.model.{layer}", AB)(weights)
    bias = rand(5, weights[f"{Q}.bias"].numel()) * 0.2
    made.tensors[f"base_model.model.{Q}.lora_B.bias"] = bias
    return MadeLora(made.tensors, {**made.changes, f"{Q}.bias": weights[f"{Q}.bias"] + ALPHA / RANK * bias})


def trained_biases(weights: Weights) -> MadeLora:
    """PEFT with `bias="all"`: the whole biases."""
    made = pairs(lambda layer: f"base_model.model.{layer}", AB)(weights)
    own = whole({f"{Q}.bias": (f"{Q}.bias", True)}, lambda name: f"base_model.model.{name}")(weights)
    return MadeLora({**made.tensors, **own.tensors}, {**made.changes, **own.changes}, replaced=own.replaced)


def trained_module(weights: Weights) -> MadeLora:
    """PEFT with `modules_to_save`."""
    made = pairs(lambda layer: f"base_model.model.{layer}", AB)(weights)
    ends = {f"head.head.modules_to_save.default.{leaf}": (f"head.head.{leaf}", True) for leaf in ("weight", "bias")}
    own = whole(ends, lambda name: f"base_model.model.{name}")(weights)
    return MadeLora({**made.tensors, **own.tensors}, {**made.changes, **own.changes}, replaced=own.replaced)


NORM, MODULATION, SELF = "blocks.0.norm3", "blocks.0.modulation", "blocks.0.self_attn"
WHOLE = {
    "differences": Layout(
        "diffusion_model.blocks.0.ffn.0.diff, ….diff_b",
        "LightX2V, ComfyUI",
        whole({f"{FFN_IN}.diff": (f"{FFN_IN}.weight", False), f"{FFN_IN}.diff_b": (f"{FFN_IN}.bias", False)}),
        True,
    ),
    "modulation": Layout(
        "diffusion_model.blocks.0.diff_m", "LightX2V", whole({"blocks.0.diff_m": (MODULATION, False)}), True
    ),
    "modulation by its name": Layout(
        "diffusion_model.blocks.0.modulation.diff",
        "ComfyUI",
        whole({f"{MODULATION}.diff": (MODULATION, False), "head.modulation.diff": ("head.modulation", False)}),
        True,
    ),
    "norms": Layout(
        "lora_unet_blocks_0_norm3.w_norm, b_norm",
        "LyCORIS",
        whole(
            {"norm3.w_norm": (f"{NORM}.weight", False), "norm3.b_norm": (f"{NORM}.bias", False)},
            lambda name: f"lora_unet_blocks_0_{name}",
        ),
        True,
    ),
    "norms of queries and keys": Layout(
        "diffusion_model.blocks.0.self_attn.norm_q.diff",
        "LightX2V",
        whole(
            {f"blocks.0.self_attn.{n}.diff": (f"blocks.0.self_attn.{n}.weight", False) for n in ("norm_q", "norm_k")}
        ),
        True,
    ),
    "weights in place": Layout(
        "diffusion_model.blocks.0.norm3.set_weight",
        "ComfyUI",
        whole({f"{NORM}.set_weight": (f"{NORM}.weight", True)}),
        True,
    ),
    "bias of a pair": Layout("base_model.model.….lora_B.bias", "PEFT with `lora_bias`", bias_of_pair),
    "trained biases": Layout("base_model.model.….bias", 'PEFT with `bias="all"`', trained_biases),
    "trained modules": Layout("….modules_to_save.default.weight", "PEFT", trained_module),
}

LAYOUTS: dict[str, Layout] = {**SPELLINGS, **SCALES, **KINDS, **CONVOLUTIONS, **WHOLE}


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / max(float(want.float().norm()), math.ulp(0)))
