"""Files of the tiny decoders: which one a file holds, and in which scale it takes latents."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..weights.files.checkpoint import Checkpoint, CheckpointError
from .files import OpenVae, VaeFormat, own_names
from .tiny import TINY_16, TINY_48, TinyConfig, TinyVAE

GROWTHS = ("decoder.7.conv.weight", "decoder.13.conv.weight", "decoder.19.conv.weight")
ENTRANCES = ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")


def infer_config(checkpoint: Checkpoint) -> TinyConfig:
    """The dimensions of a tiny decoder, from its tensors' shapes. CheckpointError for those of other models."""
    shapes = checkpoint.shapes
    wanted = (*ENTRANCES, *GROWTHS, "decoder.22.weight")
    if missing := [name for name in wanted if len(shapes.get(name, ())) != 4]:
        raise CheckpointError(
            f"{checkpoint.path}: a tiny decoder without a convolution {missing[0]}; expected the layers of TAEHV; "
            f"download {TINY_16.file_name} or {TINY_48.file_name} again"
        )
    channels, out = shapes["decoder.1.weight"][1], shapes["decoder.22.weight"][0]
    base = next((each for each in (TINY_16, TINY_48) if each.latent_channels == channels), None)
    if base is None or out != 3 * base.patch_size**2:
        raise CheckpointError(
            f"{checkpoint.path}: a tiny decoder of {channels} latent channels to {out} of a pixel, of another model; "
            f"expected 16 to 3 or 48 to 12; choose {TINY_16.file_name}, or for TI2V 5B {TINY_48.file_name}"
        )
    first, second, third, last = (shapes[name][0] for name in ENTRANCES)
    growth = tuple(shapes[name][0] // max(1, shapes[name][1]) for name in GROWTHS)
    if math.prod(growth) != base.temporal_stride:
        raise CheckpointError(
            f"{checkpoint.path}: a tiny decoder that makes {math.prod(growth)} frames of one; expected "
            f"{base.temporal_stride}; choose {base.file_name}"
        )
    return replace(base, widths=(first, second, third, last), growth=(growth[0], growth[1], growth[2]))


def takes_raw_latents(opened: OpenVae[TinyConfig, TinyVAE]) -> bool:
    """Whether a Wan decoder takes latents in the VAE's own scale, instead of normalised as they are sampled.

    LightX2V's do, and the tensors of both have the same names and shapes. Their files are told by their names, as
    LightX2V does; where those say nothing by their numbers: madebyollin's are fp16, LightX2V's are not, as ComfyUI has
    it.
    """
    name = opened.checkpoint.path.name.lower()
    if "lighttae" in name:
        return True
    if "taew" in name or "taehv" in name:
        return False
    return opened.checkpoint.tensors["decoder.1.weight"].dtype != torch.float16


TINY_FORMAT = VaeFormat(
    title="a tiny decoder (TAEHV)",
    advice=f"Choose {TINY_16.file_name}, or for TI2V 5B {TINY_48.file_name}.",
    markers=(("decoder.22.bias", "decoder.7.conv.weight", "decoder.3.conv.0.weight"),),
    rename=own_names,
    infer_config=infer_config,
    network=TinyVAE,
    decoder=("decoder.",),
)
