"""Which format each linear layer's weight is stored in, from what a checkpoint holds for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from ..files.checkpoint import Checkpoint, TensorInfo
from .block_scaled import recognise_block_scaled
from .fp8 import recognise_fp8
from .gguf import GGUF_FORMATS
from .int8 import recognise_int8
from .kitchen import recognise_kitchen
from .linear import Linear
from .weight_format import PLAIN, WeightFormat

# A layer's weight, whose `quant` names its format -> the format, or None for another recogniser to say. A new format is
# one line here; the first that answers decides.
RECOGNISERS: tuple[Callable[[TensorInfo], WeightFormat | None], ...] = (
    recognise_fp8,
    recognise_int8,
    recognise_block_scaled,
    recognise_kitchen,
    lambda weight: GGUF_FORMATS.get(weight.quant or ""),
)


def format_for(weight: TensorInfo) -> WeightFormat:
    """The format of a layer's weight."""
    return next(filter(None, (recognise(weight) for recognise in RECOGNISERS)), PLAIN)


def assign_formats(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Make the linear layers of a model on the meta device hold what the checkpoint stores for them.

    Their `format` is set and their parameters replaced by meta ones of the stored dtypes and shapes; those of a format
    with further tensors get them as parameters too, so that the model's names are then the checkpoint's. Shapes are not
    checked here. Layers that the checkpoint lacks stay as they are.
    """
    stored: defaultdict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in checkpoint.tensors.items():
        layer, _, leaf = name.rpartition(".")
        stored[layer][leaf] = info
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear) or "weight" not in stored[name]:
            continue
        tensors = stored[name]
        layer.format = format_for(tensors["weight"])
        # What is stored with a plain weight belongs to no format: left for the loader to refuse.
        leaves = tensors.keys() if layer.format is not PLAIN else tensors.keys() & layer._parameters.keys()
        for leaf in leaves:
            layer.register_parameter(leaf, meta_parameter(tensors[leaf]))


def meta_parameter(info: TensorInfo) -> nn.Parameter:
    """A parameter of a stored tensor's dtype and shape, without storage."""
    return nn.Parameter(torch.empty(info.shape, dtype=info.dtype, device="meta"), requires_grad=False)
