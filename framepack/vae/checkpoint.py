"""Files of the HunyuanVideo autoencoder: whether a file holds it, under which layout, and how large it is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace

from ...vae.files import VaeFormat
from ...weights.files.checkpoint import Checkpoint, CheckpointError
from .model import HUNYUAN_VAE, HunyuanVAE, VAEConfig

# --- dimensions ------------------------------------------------------------------------------------------

ENCODER_CONV = re.compile(
    r"encoder\.down_blocks\.(?P<stage>[0-9]{1,4})\.resnets\.(?P<block>[0-9]{1,4})\.conv1\.conv\.weight$"
)


def infer_config(checkpoint: Checkpoint) -> VAEConfig:
    """The dimensions of a VAE with diffusers' names, from its tensors' names and shapes alone.

    Raises CheckpointError when a tensor that tells them is missing or the autoencoder is another generation's.
    """
    shapes = checkpoint.shapes
    latent = shapes.get("post_quant_conv.weight", ())
    if len(latent) == 5 and latent[0] != HUNYUAN_VAE.latent_channels:
        raise CheckpointError(
            f"{checkpoint.path}: a HunyuanVideo VAE of {latent[0]} latent channels; expected "
            f"{HUNYUAN_VAE.latent_channels}, those of HunyuanVideo 1.0 and FramePack. Choose {HUNYUAN_VAE.file_name}."
        )
    blocks: dict[int, dict[int, int]] = {}
    for name, shape in shapes.items():
        if (match := ENCODER_CONV.match(name)) and len(shape) == 5:
            blocks.setdefault(int(match["stage"]), {})[int(match["block"])] = shape[0]
    if len(latent) != 5 or len(blocks) < 3 or sorted(blocks) != list(range(len(blocks))):
        raise CheckpointError(
            f"{checkpoint.path}: a HunyuanVideo VAE with the encoder's resolutions {sorted(blocks)}; expected 0 to 3, "
            f"encoder and decoder in one file. Download {HUNYUAN_VAE.file_name} again."
        )
    dims = tuple(max(blocks[stage].items())[1] for stage in range(len(blocks)))
    return replace(
        HUNYUAN_VAE,
        block_out_channels=dims,
        layers_per_block=len(blocks[0]),
        num_groups=math.gcd(HUNYUAN_VAE.num_groups, *dims),  # 32 for every width that 32 divides
    )


# --- layouts ---------------------------------------------------------------------------------------------

COMFY_LAYER = re.compile(
    r"(?P<side>encoder\.down|decoder\.up)\.(?P<stage>[0-9]{1,4})\."
    r"(?:block\.(?P<block>[0-9]{1,4})|(?P<sampler>down|up)sample)\.(?P<leaf>.+)$"
)
COMFY_PART = re.compile(r"(?P<side>encoder|decoder)\.(?P<part>mid\.block_[12]|mid\.attn_1|norm_out)\.(?P<leaf>.+)$")
DIFFUSERS_PARTS = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
    "norm_out": "conv_norm_out",
}
DIFFUSERS_LEAVES = {
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def to_diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """`{name: diffusers' name}` for the tensors of a HunyuanVideo VAE in ComfyUI's layout.

    A name that is diffusers' already, or unknown, maps to itself.
    """
    names = list(names)
    stages = [int(match["stage"]) for name in names if (match := COMFY_LAYER.match(name))]
    last = max(stages, default=0)
    return {name: _diffusers_name(name, last) for name in names}


def _diffusers_name(name: str, last_stage: int) -> str:
    if match := COMFY_LAYER.match(name):
        # The decoder's resolutions are counted from the pixels there, from the latent here.
        encodes = match["side"] == "encoder.down"
        stage = int(match["stage"]) if encodes else last_stage - int(match["stage"])
        layer = f"resnets.{match['block']}" if match["block"] else f"{match['sampler']}samplers.0"
        return f"{match['side']}_blocks.{stage}.{layer}.{_diffusers_leaf(match['leaf'])}"
    if match := COMFY_PART.match(name):
        leaf = match["leaf"] if match["part"] == "norm_out" else _diffusers_leaf(match["leaf"])
        return f"{match['side']}.{DIFFUSERS_PARTS[match['part']]}.{leaf}"
    return name


def _diffusers_leaf(leaf: str) -> str:
    head, dot, rest = leaf.partition(".")
    return DIFFUSERS_LEAVES.get(head, head) + dot + rest


# --- format ----------------------------------------------------------------------------------------------

# Accepts diffusers' layout (the official and Kijai's files) and ComfyUI's; other autoencoders lack one of the markers.
HUNYUAN_FORMAT = VaeFormat(
    title="a HunyuanVideo VAE",
    advice=f"Choose {HUNYUAN_VAE.file_name}.",
    markers=(("decoder.conv_in.conv.weight", "post_quant_conv.weight"),),
    rename=to_diffusers_names,
    infer_config=infer_config,
    network=HunyuanVAE,
    decoder=("decoder.", "post_quant_conv."),
    encoder=("encoder.", "quant_conv."),
)
