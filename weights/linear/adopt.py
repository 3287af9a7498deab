"""A model without storage, its tensors as a file has them; what does not fit is named."""

from __future__ import annotations

import re
from typing import TypeVar

import torch
from torch import nn

from ..files.checkpoint import Checkpoint, CheckpointError, some_names
from .dialects import is_beside_quantised
from .formats import assign_formats, meta_parameter
from .linear import Linear

M = TypeVar("M", bound=nn.Module)

QUANTISATION_NAME = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_2)?|input_scale|output_scale|comfy_quant)$"
    r"|\.weight\._(data|scale|shift)$"
)


def adopt_tensors(model: M, checkpoint: Checkpoint, title: str, expected_files: str) -> M:
    """Make a model on the meta device hold every tensor of the checkpoint in its stored form; see `check_tensors`."""
    check_tensors(model, checkpoint, title, expected_files)
    assign_formats(model, checkpoint)
    for name, info in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, meta_parameter(info))
    return model.eval()


def load_tensors(model: M, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> M:
    """Read the tensors of a model that adopted them, onto a device, one by one."""
    # In the order of the file, which is the fastest way through it.
    for info in sorted(checkpoint.tensors.values(), key=lambda info: (str(info.file), info.offset)):
        module, _, leaf = info.name.rpartition(".")
        parameter = nn.Parameter(checkpoint.read(info.name).to(device), requires_grad=False)
        setattr(model.get_submodule(module), leaf, parameter)
    return model.eval()


def check_tensors(model: nn.Module, checkpoint: Checkpoint, title: str, expected_files: str) -> None:
    """Raise CheckpointError unless `checkpoint` holds each of the model's tensors, in its shape, and no more.

    For the messages: `title` is the model with its article, `expected_files` what to choose instead of a variant.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in checkpoint.tensors]
    unknown = [
        name
        for name in checkpoint.tensors
        if name not in expected and not is_beside_quantised(name, checkpoint.tensors)
    ]
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    scales = [name for name in unknown if is_quantisation_name(name)]
    packed = scales or [name for name, info in checkpoint.tensors.items() if info.quant and name not in linear]
    if packed:
        raise CheckpointError(
            f"{checkpoint.file_of(packed[0])}: a quantised file ({some_names(packed, 'tensor')}); expected plain "
            "weights; choose the bf16, fp16 or plain (not scaled) fp8 version of the model"
        )
    if missing:
        raise CheckpointError(
            f"{checkpoint.file_of(missing[0])}: lacks {some_names(missing, 'tensor')} of {title}; "
            f"expected {len(expected)} tensors; the file is incomplete: download it again"
        )
    if unknown:
        raise CheckpointError(
            f"{checkpoint.file_of(unknown[0])}: {some_names(unknown, 'tensor')} not known to {title}; expected "
            f"{len(expected)} tensors; the file is another variant: choose {expected_files}"
        )
    for name, shape in expected.items():
        info = checkpoint.tensors[name]
        given = info.unpacked_shape
        if given != shape:
            raise CheckpointError(
                f"{checkpoint.file_of(name)}: {name} is {list(given)}; expected {list(shape)} "
                "by the file's other tensors; it mixes two models: download it again"
            )


def is_quantisation_name(name: str) -> bool:
    """Whether a tensor belongs to how a weight is stored (a scale, a format marker), not to the model."""
    return QUANTISATION_NAME.search(name) is not None
