"""A file's tensors as a network has them, wherever they hold the same numbers in another form.

What the network does not have is left out where its result is the same without it; shapes of the same numbers are
taken for each other; what is packed where the network wants plain numbers (a norm, a convolution, a table) is unpacked
as it is read. What then does not fit is for `adopt.py` to refuse.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..files.checkpoint import Checkpoint, TensorInfo, some_names
from .dialects import is_beside_quantised
from .formats import format_for
from .linear import Linear

logger = logging.getLogger(__name__)

# What networks compute for themselves and some tools save, and what training leaves behind.
NOT_WEIGHTS = re.compile(
    r"(^|\.)(freqs(_cis|_cos|_sin)?|inv_freq|rotary_emb\.\w+|rope\w*\.\w+|position_ids|num_batches_tracked"
    r"|(model_)?ema\..+|optimizer\..+|lr_scheduler\..+)$"
)

Shape = tuple[int, ...]
UNPACKED = " (unpacked as it is read)"  # behind the file's name, so that nobody looks for the bytes there


@dataclass(frozen=True)
class UnpackedSource(Checkpoint):
    """A checkpoint of which some tensors, those of `packed` with what lies beside them, come out as fp32."""

    origin: Checkpoint
    packed: Mapping[str, Mapping[str, TensorInfo]]  # name -> leaf -> tensor of the origin

    def read_into(self, name: str, out: Tensor) -> None:
        """The tensor's bytes, as `Checkpoint.read_into`."""
        if name not in self.packed:
            self.origin.read_into(name, out)
            return
        stored = self.packed[name]
        form = format_for(stored["weight"])
        packed = {leaf: self.origin.read(info.name).view(info.shape) for leaf, info in stored.items()}
        packed["weight"] = packed["weight"].reshape(_rows(stored["weight"]), -1)
        values = form.dequantize(packed, torch.float32)
        out.copy_(values.contiguous().view(-1).view(torch.uint8))


def fit_tensors(network: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint (our names, dialects undone) as far as it can be taken for a network on the meta device."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    linear = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, Linear)}
    roots = {name.partition(".")[0] for name in expected}
    inert = [name for name, info in checkpoint.tensors.items() if name not in expected and _is_inert(info, roots)]
    if inert:
        logger.info("%s: %s are not needed", checkpoint.path, some_names(inert, "tensor"))
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in inert}
    packed: dict[str, Mapping[str, TensorInfo]] = {}
    for name in expected.keys() & tensors.keys():
        info, shape = tensors[name], expected[name]
        if info.quant is not None and not (name in linear and _stays_packed(info, shape)):
            if math.prod(info.unpacked_shape) == math.prod(shape):
                packed[name] = _with_beside(name, tensors)
                tensors[name] = _unpacked_info(info, shape)
        elif info.quant is None and info.shape != shape and holds_same(info.shape, shape):
            tensors[name] = replace(info, shape=shape)
    beside = {info.name for stored in packed.values() for leaf, info in stored.items() if leaf != "weight"}
    tensors = {name: info for name, info in tensors.items() if name not in beside}
    if packed:
        return UnpackedSource(checkpoint.path, tensors, checkpoint.metadata, checkpoint, packed)
    return replace(checkpoint, tensors=tensors)


def holds_same(stored: Shape, wanted: Shape) -> bool:
    """Whether two shapes are of the same numbers in the same order: dimensions of one, or several laid out as one."""
    sizes = [[size for size in shape if size != 1] for shape in (stored, wanted)]
    fewer, more = sorted(sizes, key=len)
    if math.prod(fewer) != math.prod(more) or 0 in more:
        return False
    for size in fewer:
        product = 1
        while more and product < size:
            product *= more.pop(0)
        if product != size:
            return False
    return True


def _is_inert(info: TensorInfo, roots: set[str]) -> bool:
    """Whether a tensor that the network lacks changes nothing: no numbers, a marker or a counter, a computed table."""
    if not info.nbytes or NOT_WEIGHTS.search(info.name):
        return True
    is_number = info.dtype.is_floating_point and math.prod(info.shape) > 1
    return info.name.partition(".")[0] not in roots and not is_number and info.quant is None


def _stays_packed(info: TensorInfo, shape: Shape) -> bool:
    """Whether a linear layer's packed weight has the layer's rows; some GGUF files cut weights into rows of 256."""
    return info.shape[:-1] == shape[:-1]


def _with_beside(name: str, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    layer, _, leaf = name.rpartition(".")
    beside = {
        other.rpartition(".")[2]: info
        for other, info in tensors.items()
        if other.rpartition(".")[0] == layer and leaf == "weight" and is_beside_quantised(other, tensors)
    }
    return {**beside, "weight": tensors[name]}


def _unpacked_info(info: TensorInfo, shape: Shape) -> TensorInfo:
    nowhere = info.file.with_name(info.file.name + UNPACKED)
    return TensorInfo(info.name, torch.float32, shape, nowhere, info.offset, 4 * math.prod(shape))


def _rows(info: TensorInfo) -> int:
    """Rows of a packed tensor as its format unpacks them: of bytes, or of numbers with a scale for each or for all."""
    if info.logical_shape is not None:
        return math.prod(info.shape[:-1])
    return info.shape[0] if info.shape else 1
