"""How numbers are stored in files of models: writers for tests/layout_rows.py, each with what its numbers stand for.

A writer takes tensors by name and which of them are linear weights, and gives the tensors of a file, its metadata and
the plain numbers in fp32. Nothing here comes from the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import gguf
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Stored:
    """The tensors of a file and its metadata; `truth` has the numbers that they stand for, by the plain names."""

    tensors: Tensors
    truth: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)

    def named(self, rename: Callable[[str], str]) -> Stored:
        """The same file with other names; those beside a weight move with it."""
        return Stored({rename(name): tensor for name, tensor in self.tensors.items()}, self.truth, self.metadata)


Form = Callable[[Tensors, frozenset[str]], Stored]


def cast(dtype: torch.dtype, linear_only: bool = False) -> Form:
    def write(tensors: Tensors, linear: frozenset[str]) -> Stored:
        stored = {
            name: tensor.to(dtype if name in linear or not linear_only else torch.bfloat16)
            for name, tensor in tensors.items()
        }
        return Stored(stored, {name: tensor.float() for name, tensor in stored.items()})

    return write


def scaled(
    dtype: torch.dtype,
    scale_name: str = "weight_scale",
    block: tuple[int, int] | None = None,
    rows: bool = False,
    marker: Mapping[str, object] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    rotation: int = 0,
) -> Form:
    """8 bits with a scale: of the tensor, of each row, or of each `block` (0 rows or columns: all of them).

    `marker` is the JSON of a layer's `comfy_quant`, `beside` are further tensors of every layer.
    """
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max

    def write(tensors: Tensors, linear: frozenset[str]) -> Stored:
        stored = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        truth = {name: tensor.float() for name, tensor in stored.items()}
        for name in linear:
            layer, weight = name.removesuffix(".weight"), tensors[name]
            if rotation:
                weight = rotated(weight, rotation)
            height, width = block or (1 if rows else weight.shape[0], weight.shape[1])
            tiles = weight.view(weight.shape[0] // height, height, weight.shape[1] // width, width)
            scale = tiles.abs().amax((1, 3), keepdim=True) / most
            ratio = tiles / scale
            values = (ratio.round() if dtype == torch.int8 else ratio).to(dtype)
            plain = (values.float() * scale).view_as(weight)
            stored[name], truth[name] = values.view_as(weight), rotated(plain, rotation) if rotation else plain
            shape = (len(tiles), tiles.shape[2], *([1] if block and height == 1 else [])) if block else (-1, 1)
            stored[f"{layer}.{scale_name}"] = scale.reshape(shape) if block or rows else scale.reshape(())
            stored |= {f"{layer}.{leaf}": tensor.clone() for leaf, tensor in (beside or {}).items()}
            if marker is not None:
                stored[f"{layer}.comfy_quant"] = json_bytes(marker)
        return Stored(stored, truth)

    return write


def quanto(tensors: Tensors, linear: frozenset[str]) -> Stored:
    """optimum-quanto's int8: `weight._data`, `weight._scale`, and scales of activations."""
    plain = scaled(torch.int8, rows=True)(tensors, linear)
    stored: Tensors = {}
    for name, tensor in plain.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight_scale":
            stored[f"{layer}.weight._scale"] = tensor.bfloat16().float()
            stored |= {f"{layer}.input_scale": torch.ones(()), f"{layer}.output_scale": torch.ones(())}
        else:
            stored[f"{name}._data" if name in linear else name] = tensor
    truth = {
        name: tensor if name not in linear else stored[f"{name}._data"].float() * stored[f"{name}._scale"]
        for name, tensor in plain.truth.items()
    }
    return Stored(stored, truth)


def with_old_marker(form: Form, num_elements: int = 0) -> Form:
    """A file's one marker `scaled_fp8`, as Kijai's and the first files of Comfy-Org have it."""

    def write(tensors: Tensors, linear: frozenset[str]) -> Stored:
        stored = form(tensors, linear)
        return Stored({**stored.tensors, "scaled_fp8": torch.zeros(num_elements, dtype=E4M3)}, stored.truth)

    return write


def with_header(form: Form, layer_format: str) -> Form:
    """What comfy_quant says, in the header of the file."""

    def write(tensors: Tensors, linear: frozenset[str]) -> Stored:
        stored = form(tensors, linear)
        layers = {name.removesuffix(".weight"): {"format": layer_format} for name in linear}
        return Stored(stored.tensors, stored.truth, {"_quantization_metadata": json.dumps({"layers": layers})})

    return write


def with_extra(form: Form, extra: Tensors) -> Form:
    """More tensors than the model has."""

    def write(tensors: Tensors, linear: frozenset[str]) -> Stored:
        stored = form(tensors, linear)
        return Stored({**stored.tensors, **extra}, stored.truth, stored.metadata)

    return write


def foreign(*leaves: str) -> Form:
    """4-bit weights of another program: bytes in place of every linear weight, and tensors of these names beside."""

    def write(tensors: Tensors, linear: frozenset[str]) -> Stored:
        stored = {name: tensor for name, tensor in tensors.items() if name not in linear}
        for name in linear:
            layer = name.removesuffix(".weight")
            packed = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
            stored |= {f"{layer}.{leaf}": packed.clone() if leaf == leaves[0] else torch.ones(4) for leaf in leaves}
        return Stored(stored, tensors)

    return write


def packed(
    quant: str, plain: str = "F32"
) -> Callable[[Tensors, frozenset[str]], tuple[dict[str, tuple[Tensor, str]], Tensors]]:
    """GGUF: linear weights in a packed type; unpacked again by the `gguf` package."""
    from .quantizers import quantize

    def write(tensors: Tensors, linear: frozenset[str]) -> tuple[dict[str, tuple[Tensor, str]], Tensors]:
        stored: dict[str, tuple[Tensor, str]] = {}
        truth: Tensors = {}
        for name, tensor in tensors.items():
            kind = quant if name in linear else plain if tensor.ndim > 1 else "F32"
            if kind in ("F32", "F16"):
                stored[name], truth[name] = (tensor, kind), (tensor if kind == "F32" else tensor.half().float())
                continue
            values = quantize(tensor, kind)
            stored[name] = (values, kind)
            number = gguf.GGMLQuantizationType[kind]
            truth[name] = torch.from_numpy(gguf.quants.dequantize(values.numpy(), number).copy()).view_as(tensor)
        return stored, truth

    return write


def json_bytes(fields: Mapping[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def rotated(weight: Tensor, group: int) -> Tensor:
    """Groups of columns times ConvRot's matrix: -1 where an odd number of base-4 digits of the two add up to 3."""
    digits = range(group.bit_length() // 2)
    signs = [
        [(-1) ** sum((i // 4**d) % 4 + (j // 4**d) % 4 == 3 for d in digits) for j in range(group)]
        for i in range(group)
    ]
    matrix = torch.tensor(signs, dtype=torch.float64) / group**0.5
    return (weight.double().unflatten(1, (-1, group)) @ matrix).flatten(1).float()
