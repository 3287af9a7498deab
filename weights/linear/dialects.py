"""How quantised files say that they are: every dialect's names and markers, brought to one.

Afterwards a quantised layer has `<layer>.weight`, whose `TensorInfo.quant` names its format, and `<layer>.weight_scale`
(and what else a 4-bit format needs). Static scales of activations are dropped: activations are quantised row by row as
they come, which is more accurate. Sources: ComfyUI 0.33 (`comfy/utils.py`, `comfy/ops.py`), optimum-quanto, LightX2V,
musubi-tuner, DeepSeek-V3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...system.bounded_json import JsonError, parse_json
from ...system.plain_text import shown
from ..files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from .block_scaled import BLOCK_SCALED, is_block_scaled
from .fp8 import FP8, FP8_FULL_PRECISION
from .int8 import INT8
from .kitchen import KITCHEN_QUANTS, kitchen_quant_name

HEADER_KEY = "_quantization_metadata"  # in a file's metadata: {"layers": {layer: what comfy_quant holds}}
MARKER = "comfy_quant"  # beside a weight: uint8, the text of a JSON object with a "format"
MOST_MARKER_BYTES = 1 << 16
OLD_MARKER = "scaled_fp8"  # one per model; its dtype is that of the weights

# The last parts of a name -> what it becomes; None is dropped.
PARTS: Mapping[str, str | None] = {
    "scale_weight": "weight_scale",
    "weight_scale_inv": "weight_scale",  # what to multiply by, though its name says otherwise
    "weight._data": "weight",
    "weight._scale": "weight_scale",
    "scale_input": None,
    "input_scale": None,
    "output_scale": None,
    MARKER: None,
}
ENDING = re.compile(rf"(.+)\.({'|'.join(re.escape(part) for part in PARTS)})")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class LayerMarker:
    """What a file says of one layer's format; what it leaves out has ComfyUI's defaults."""

    format: str
    full_precision: bool = False  # multiply in the compute dtype though fp8 could be
    rotated: bool = False
    rotation: int = 256
    group: int = 16


def plain_dialect(checkpoint: Checkpoint, names: Mapping[str, str | None] | None = None) -> Checkpoint:
    """The checkpoint in the one dialect above; a file that is not quantised comes back as it is.

    `names` are those that the checkpoint's tensors had in the file, `{in the file: now}`: the header's metadata speaks
    in them. Only markers are read. Raises CheckpointError for a format that is not known.
    """
    refuse_foreign(checkpoint)
    markers = _markers(checkpoint, names or {})
    full_precision = _old_marker_asks_full_precision(checkpoint)
    renamed = checkpoint.renamed(_new_names(checkpoint))
    tensors: dict[str, TensorInfo] = dict(renamed.tensors)
    for name, info in renamed.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or info.quant is not None:
            continue
        marker = markers.get(layer)
        if marker is None and f"{layer}.weight_scale" in tensors:
            marker = LayerMarker(_format_by_dtype(checkpoint, info), full_precision)
        if marker is not None:
            beside = {part: tensors[f"{layer}.{part}"] for part in BESIDE if f"{layer}.{part}" in tensors}
            tensors[name] = _marked(checkpoint, info, marker, beside)
    return Checkpoint(checkpoint.path, tensors, checkpoint.metadata)


def with_plain_parts(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every weight and scale called so: what finds layers by their names need know no dialect.

    `plain_dialect` then gives the weights their formats.
    """
    new = {name: plain for name, plain in _new_names(checkpoint).items() if plain is not None}
    return checkpoint.renamed(new)


def is_beside_quantised(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is a scale (or the like) of a weight that is stored in a quantised format."""
    layer, _, leaf = name.rpartition(".")
    weight = tensors.get(f"{layer}.weight")
    return leaf in BESIDE and weight is not None and weight.quant is not None


BESIDE = frozenset(
    ("weight_scale", "weight_scale_2", "pre_quant_scale", "weight_s_rel", "weight_s_channel", "weight_codebook")
)


def _new_names(checkpoint: Checkpoint) -> dict[str, str | None]:
    new: dict[str, str | None] = {}
    for name in checkpoint.tensors:
        match = ENDING.fullmatch(name)
        if match is not None:
            part = PARTS[match[2]]
            new[name] = None if part is None else f"{match[1]}.{part}"
        elif name == OLD_MARKER or name.endswith("." + OLD_MARKER):
            new[name] = None
    return new


# Forms of others that no part of this package unpacks, by the end of a name that only they have.
FOREIGN: Mapping[str, str] = {
    ".absmax": "in 4 or 8 bits by bitsandbytes",
    ".quant_map": "in 4 or 8 bits by bitsandbytes",
    ".qweight": "in 4 bits by SVDQuant (Nunchaku), GPTQ or AWQ",
    ".wscales": "in 4 bits by SVDQuant (Nunchaku)",
    ".weight._shift": "in 2 or 4 bits by optimum-quanto",
    ".weight._qdata": "by torchao",
    ".weight_qdata": "by torchao",
    ".weight_global_scale": "in NVFP4 by LightX2V",
}


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """CheckpointError for a file whose weights are stored in a form that only another program unpacks."""
    for name in checkpoint.tensors:
        how = next((how for end, how in FOREIGN.items() if name.endswith(end)), None)
        if how is not None:
            raise CheckpointError(
                f"{checkpoint.path}: its weights are stored {how} ({name}), which is not unpacked here; expected bf16, "
                "fp16, fp8, int8 or GGUF; choose the fp8 scaled or a GGUF version of the model"
            )


# --- markers ---------------------------------------------------------------------------------------------


def _markers(checkpoint: Checkpoint, names: Mapping[str, str | None]) -> dict[str, LayerMarker]:
    """By layer, from the header and from the tensors beside the weights; the latter win."""
    markers: dict[str, LayerMarker] = {}
    header = checkpoint.metadata.get(HEADER_KEY)
    if header is not None:
        layers = _json(checkpoint, HEADER_KEY, header).get("layers")
        if not isinstance(layers, dict):
            raise CheckpointError(_unreadable(checkpoint, HEADER_KEY, "no table of layers"))
        for layer, fields in layers.items():
            now = names.get(f"{layer}.weight", f"{layer}.weight") or ""
            markers[now.removesuffix(".weight")] = _marker(checkpoint, layer, fields)
    for name in checkpoint.tensors:
        layer, _, leaf = name.rpartition(".")
        if leaf == MARKER:
            info = checkpoint.tensors[name]
            if info.dtype != torch.uint8 or info.nbytes > MOST_MARKER_BYTES:
                given = f"it is {info.dtype} of {info.nbytes:,} bytes"
                raise CheckpointError(_unreadable(checkpoint, name, f"{given}, a text of bytes is short"))
            text = checkpoint.read(name).reshape(-1).numpy().tobytes().decode("utf-8", "replace")
            markers[layer] = _marker(checkpoint, layer, _json(checkpoint, name, text))
    return markers


def _marker(checkpoint: Checkpoint, layer: str, fields: Any) -> LayerMarker:
    inner = fields.get("params") if isinstance(fields, dict) else None
    fields = {**(inner if isinstance(inner, dict) else {}), **(fields if isinstance(fields, dict) else {})}
    try:
        return LayerMarker(
            format=str(fields["format"]),
            full_precision=bool(fields.get("full_precision_matrix_mult", False)),
            rotated=bool(fields.get("convrot", False)),
            rotation=int(fields.get("convrot_groupsize", 256)),
            group=int(fields.get("group_size", 16)),
        )
    except (KeyError, TypeError, ValueError) as error:
        why = f"{shown(fields)} lacks a format or has odd sizes"
        raise CheckpointError(_unreadable(checkpoint, layer, why)) from error


def _old_marker_asks_full_precision(checkpoint: Checkpoint) -> bool:
    """The marker of the first scaled files: two elements mean multiplication in the compute dtype."""
    infos = [info for name, info in checkpoint.tensors.items() if name.rpartition(".")[2] == OLD_MARKER]
    return any(math.prod(info.shape) == 2 for info in infos)


def _format_by_dtype(checkpoint: Checkpoint, info: TensorInfo) -> str:
    """The format of a weight that has a scale and no marker of its own."""
    if info.dtype == torch.int8:
        return "int8_tensorwise"
    if info.dtype in FP8_DTYPES or info.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return "float8_e4m3fn"
    raise CheckpointError(
        f"{checkpoint.path}: {info.name} is {info.dtype} with a scale and no marker of its format; expected fp8 or "
        "int8 weights; choose the fp8 scaled, int8 or a GGUF version of the model"
    )


def _marked(
    checkpoint: Checkpoint, info: TensorInfo, marker: LayerMarker, beside: Mapping[str, TensorInfo]
) -> TensorInfo:
    """The weight's `TensorInfo` with its format's name and, where weights share bytes, its shape unpacked."""
    scale = beside.get("weight_scale")
    if marker.format in ("float8_e4m3fn", "float8_e5m2"):
        if scale is None:
            return info  # a cast without a scale is a plain weight
        if _in_blocks(info, scale):
            return replace(info, quant=BLOCK_SCALED)
        _check_scale(checkpoint, info, scale)
        return replace(info, quant=FP8_FULL_PRECISION if marker.full_precision else FP8)
    if marker.format == "int8_tensorwise":
        if scale is not None and not marker.rotated and _in_blocks(info, scale):
            return replace(info, quant=BLOCK_SCALED)
        _check_scale(checkpoint, info, scale)
        if not marker.rotated:
            return replace(info, quant=INT8)
        return replace(info, quant=f"{INT8} convrot {_rotation(checkpoint, info, marker, info.shape[-1])}")
    quant = KITCHEN_QUANTS.get(marker.format)
    if quant is None:
        known = ", ".join(("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", *KITCHEN_QUANTS))
        raise CheckpointError(
            f"{checkpoint.path}: {info.name} is stored as {shown(marker.format)}, which is not known; expected one of "
            f"{known}; choose the fp8 scaled or a GGUF version of the model"
        )
    if len(info.shape) != 2:
        raise CheckpointError(
            f"{checkpoint.path}: {info.name} {list(info.shape)} is stored as {shown(marker.format)}; expected a "
            "matrix; choose the fp8 scaled or a GGUF version of the model"
        )
    if (problem := quant.problem(info, beside)) is not None:
        raise CheckpointError(
            f"{checkpoint.path}: {info.name} {list(info.shape)} is stored as {shown(marker.format)} {problem}; "
            "expected what that format has; the file is damaged or incomplete: download it again"
        )
    rows, columns = info.shape
    shape = (rows, 2 * columns if quant.halved else columns)
    return replace(info, quant=kitchen_quant_name(quant, marker.group, marker.rotation), logical_shape=shape)


def _in_blocks(info: TensorInfo, scale: TensorInfo) -> bool:
    return math.prod(scale.shape) not in (1, info.shape[0]) and is_block_scaled(info, scale)


def _check_scale(checkpoint: Checkpoint, info: TensorInfo, scale: TensorInfo | None) -> None:
    if scale is None or math.prod(scale.shape) not in (1, info.shape[0]):
        given = "none" if scale is None else f"one of shape {list(scale.shape)}"
        raise CheckpointError(
            f"{checkpoint.path}: the scale of {info.name} {list(info.shape)} is {given}; expected one number, or one "
            "for each row or block; choose the fp8 scaled, int8 or a GGUF version of the model"
        )


def _rotation(checkpoint: Checkpoint, info: TensorInfo, marker: LayerMarker, columns: int) -> int:
    size = marker.rotation
    power_of_4 = size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1
    if power_of_4 and columns % size == 0:
        return size
    raise CheckpointError(
        f"{checkpoint.path}: {info.name} says that groups of {size} of its {columns} columns are rotated; expected a "
        "power of 4 that divides them; the file is damaged: download it again"
    )


def _json(checkpoint: Checkpoint, name: str, text: str) -> dict[str, Any]:
    try:
        fields = parse_json(text)
    except JsonError as error:
        raise CheckpointError(_unreadable(checkpoint, name, f"it is {error}")) from error
    if not isinstance(fields, dict):
        raise CheckpointError(_unreadable(checkpoint, name, "it is no JSON object"))
    return fields


def _unreadable(checkpoint: Checkpoint, name: str, why: str) -> str:
    return (
        f"{checkpoint.path}: the quantisation marker of {name} cannot be used: {why}; expected "
        '{"format": "float8_e4m3fn", ...}; download the model again'
    )
