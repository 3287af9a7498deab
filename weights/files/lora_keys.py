"""The keys of LoRA files: which part of a layer's LoRA a key holds, and which files are LoRAs.

A key is a stem and an ending, `diffusion_model.blocks.0.self_attn.q` and `.lora_A.weight`. Sources: ComfyUI
(`comfy/lora.py`, `comfy/weight_adapter`), PEFT (`peft/tuners`), LyCORIS (`lycoris/modules`, their `weight_list`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# A low-rank pair, what lies between its two, its strength, the lengths of a DoRA.
DOWN, UP, MID, ALPHA, MAGNITUDE = "down", "up", "mid", "alpha", "magnitude"
# Added to a bias with the pair's strength; added to a weight, a bias, a modulation as they are.
UP_BIAS, DIFF, DIFF_BIAS, DIFF_MODULATION = "up_bias", "diff", "diff_b", "diff_m"
# In place of a weight; the shape of a layer that is made wider.
SET, RESHAPE = "set", "reshape"

# LyCORIS' decompositions, by the names that their parts have in files.
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
GENERALIZED = ("a1", "a2", "b1", "b2")
ORTHOGONAL = ("oft_blocks", "rescale")

ENDINGS: Mapping[str, str] = {
    ".lora_A.weight": DOWN,
    ".lora_A": DOWN,
    ".lora_down.weight": DOWN,
    ".lora_down": DOWN,
    ".lora.down.weight": DOWN,
    "_lora.down.weight": DOWN,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_B": UP,
    ".lora_up.weight": UP,
    ".lora_up": UP,
    ".lora.up.weight": UP,
    "_lora.up.weight": UP,
    ".lora_linear_layer.up.weight": UP,
    ".lora_mid.weight": MID,
    ".alpha": ALPHA,
    ".dora_scale": MAGNITUDE,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".lora_B.bias": UP_BIAS,
    ".lora_up.bias": UP_BIAS,
    ".diff": DIFF,
    ".w_norm": DIFF,
    ".diff_b": DIFF_BIAS,
    ".b_norm": DIFF_BIAS,
    ".diff_m": DIFF_MODULATION,
    ".set_weight": SET,
    ".reshape_weight": RESHAPE,
    **{f".{part}": part for part in (*HADAMARD, *KRONECKER, *ORTHOGONAL)},
    **{f".{part}.weight": part for part in GENERALIZED},
}
_ANY_ENDING = tuple(ENDINGS)

# PEFT puts an adapter's name in between: `.lora_A.default.weight`, `.hada_w1_a.default`.
_ADAPTER = re.compile(
    r"(\.(?:lora_(?:A|B|magnitude_vector)|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2))"
    r"\.(?!weight$|bias$)[^.]+(?=\.weight$|\.bias$|$)"
)

# What files are called, by parts that only they have.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "a LoRA for control videos": (RESHAPE,),
    "a LoRA (DoRA)": (MAGNITUDE,),
    "a LoRA": (DOWN, UP),
    "a LoHa, a kind of LoRA": HADAMARD,
    "a LoKr, a kind of LoRA": KRONECKER,
    "a GLoRA, a kind of LoRA": GENERALIZED,
    "an OFT, a kind of LoRA": ORTHOGONAL,
}

# What no model has among its own tensors: one such key makes a file a LoRA. Others (alpha, a1) may be a model's.
_TELLING = (DOWN, UP, UP_BIAS, DIFF, DIFF_BIAS, DIFF_MODULATION, SET, RESHAPE, *HADAMARD, *KRONECKER, "oft_blocks")

# Decompositions that are not known here, by a part of their keys or, with an underscore at its end, how one begins.
UNKNOWN_KINDS: Mapping[str, str] = {
    "vera_lambda_": "VeRA",
    "oft_r": "OFT of PEFT",
    "oft_R": "OFT of PEFT",
    "boft_R": "BOFT of PEFT",
    "boft_s": "BOFT of PEFT",
    "ia3_l": "IA3",
    "lora_E": "AdaLoRA",
    "hra_u": "HRA",
    "fourierft_": "FourierFT",
    "vblora_": "VB-LoRA",
    "randlora_": "RandLora",
    "shira_weight": "SHiRA",
    "delora_": "DeLoRA",
    "road_theta": "RoAd",
    "c3a_kernel": "C3A",
    "bone_block": "Bone",
    "miss_block": "MiSS",
    "lokr_t1": "LoKr with two convolutions",
}
# With those whose names other models have too.
_ALL_KINDS: Mapping[str, str] = {**UNKNOWN_KINDS, "on_input": "IA3", "bm": "GLoRA with a convolution"}
_BEGINNINGS = tuple(name for name in UNKNOWN_KINDS if name.endswith("_"))


def split_key(key: str) -> tuple[str, str] | None:
    """The stem of a key and the part that it holds; None where the ending is not known."""
    key = _ADAPTER.sub(r"\1", key)
    if not key.endswith(_ANY_ENDING):  # most keys of most files
        return None
    ending, part = next((ending, part) for ending, part in ENDINGS.items() if key.endswith(ending))
    return key.removesuffix(ending).replace(".processor.", "."), part


def unknown_kind(key: str) -> str | None:
    """The name of a decomposition that is not known here, where a key is of one."""
    return _kind(key, _ALL_KINDS)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file of these keys is a LoRA, of any decomposition."""
    stems: dict[str, set[str]] = {}
    are_parts = True  # all of them
    for key in keys:
        split = split_key(key)
        if split is None:
            if _kind(key, UNKNOWN_KINDS):
                return True
            are_parts = False
        elif split[1] in _TELLING:
            return True
        else:
            stems.setdefault(split[0], set()).add(split[1])
    return any(parts.issuperset(GENERALIZED) for parts in stems.values()) or (bool(stems) and are_parts)


def lora_title(keys: Iterable[str]) -> str:
    """What a file that is a LoRA is called, with its article: by what it has of its layers."""
    keys = list(keys)
    parts = {split[1] for key in keys if (split := split_key(key)) is not None}
    unknown = next((kind for key in keys if (kind := unknown_kind(key)) is not None), None)
    if unknown is not None:
        return f"a LoRA of another kind ({unknown})"
    for kind, own in _KINDS.items():
        if not parts.isdisjoint(own):
            return kind
    return "a LoRA (full differences)"


def _kind(key: str, kinds: Mapping[str, str]) -> str | None:
    for part in key.split(".")[1:]:
        if part in kinds:
            return kinds[part]
        if part.startswith(_BEGINNINGS):
            return next(kinds[name] for name in _BEGINNINGS if part.startswith(name))
    return None
