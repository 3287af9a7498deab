"""Files of the Wan video autoencoders: which one a file holds, under which layout, and how large it is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...vae.checks import Shapes
from ...vae.files import VaeFormat
from ...weights.files.checkpoint import Checkpoint, CheckpointError
from .model import WAN21_VAE, WAN22_VAE, VAEConfig, WanVAE

# --- dimensions ------------------------------------------------------------------------------------------

ENCODER_LAYER = re.compile(
    r"encoder\.downsamples\.(?P<outer>[0-9]{1,4})\.(?:downsamples\.(?P<inner>[0-9]{1,4})\.)?"
    r"(?P<part>residual\.2|resample\.1|time_conv)\.weight$"
)


def infer_config(checkpoint: Checkpoint) -> VAEConfig:
    """The dimensions of a VAE with official names, from its tensors' names and shapes alone.

    Raises CheckpointError when a tensor that tells them is missing or no known VAE has such dimensions.
    """
    shapes = checkpoint.shapes
    for name in ("conv2.weight", "encoder.conv1.weight", "decoder.conv1.weight", "decoder.head.2.weight"):
        if len(shapes.get(name, ())) != 5:
            raise CheckpointError(
                f"{checkpoint.path}: a Wan VAE without a 3-D convolution {name} (found {shapes.get(name, 'nothing')}); "
                f"expected encoder and decoder in one file. "
                f"Download {WAN21_VAE.file_name} or {WAN22_VAE.file_name} again."
            )
    z_dim = shapes["conv2.weight"][0]
    encoder_dim, pixel_channels = shapes["encoder.conv1.weight"][:2]
    patch = math.isqrt(pixel_channels // 3)  # 3 or 4 channels of each pixel
    base = next((known for known in (WAN21_VAE, WAN22_VAE) if known.z_dim == z_dim), None)
    if base is None:
        raise CheckpointError(
            f"{checkpoint.path}: a VAE of {z_dim} latent channels; expected {WAN21_VAE.z_dim} ({WAN21_VAE.name}) or "
            f"{WAN22_VAE.z_dim} ({WAN22_VAE.name}). Choose {WAN21_VAE.file_name} or {WAN22_VAE.file_name}."
        )
    if not patch:
        raise CheckpointError(
            f"{checkpoint.path}: a {base.name} VAE that encodes {pixel_channels} channels of a pixel; expected 3, or 4 "
            f"with transparency. Choose {base.file_name}."
        )
    stage_dims, temporal_downsample, num_res_blocks = read_encoder_stages(shapes)
    if not stage_dims or any(dim % encoder_dim for dim in stage_dims):
        raise CheckpointError(
            f"{checkpoint.path}: a {base.name} VAE whose encoder has resolutions of {stage_dims} channels; expected "
            f"multiples of its first convolution's {encoder_dim}. Download {base.file_name} again."
        )
    dim_mult = tuple(dim // encoder_dim for dim in stage_dims)
    return replace(
        base,
        encoder_dim=encoder_dim,
        decoder_dim=shapes["decoder.conv1.weight"][0] // dim_mult[-1],
        dim_mult=dim_mult,
        num_res_blocks=num_res_blocks,
        temporal_downsample=temporal_downsample,
        patch_size=patch,
        encoded_channels=pixel_channels // patch**2,
        decoded_channels=shapes["decoder.head.2.weight"][0] // patch**2,
        residual_shortcuts="encoder.downsamples.0.downsamples.0.residual.2.weight" in shapes,
    )


def read_encoder_stages(shapes: Shapes) -> tuple[list[int], tuple[bool, ...], int]:
    """Channels of each resolution, whether time is halved after each but the last, and residual blocks in each."""
    layers: dict[tuple[int, int], dict[str, int]] = {}
    for name, shape in shapes.items():
        if match := ENCODER_LAYER.match(name):
            position = (int(match["outer"]), int(match["inner"] or 0))
            layers.setdefault(position, {})[match["part"]] = shape[0]
    stages: list[list[int]] = [[]]
    halves_time: list[bool] = []
    for _, parts in sorted(layers.items()):
        if "residual.2" in parts:
            stages[-1].append(parts["residual.2"])
        else:
            halves_time.append("time_conv" in parts)
            stages.append([])
    return [stage[-1] for stage in stages if stage], tuple(halves_time), len(stages[0])


# --- layouts ---------------------------------------------------------------------------------------------

DIFFUSERS_LAYER = re.compile(
    r"(?P<side>encoder\.down|decoder\.up)_blocks\.(?P<stage>[0-9]{1,4})\."
    r"(?:resnets\.(?P<block>[0-9]{1,4})\.|(?P<resampler>(?:down|up)samplers?)\.(?:0\.)?)?(?P<leaf>.+)$"
)
DIFFUSERS_PART = re.compile(
    r"(?P<side>(?:encoder|decoder)\.)?(?P<part>\w+conv|conv_in|conv_out|norm_out|mid_block\.\w+\.\d)\.(?P<leaf>.+)$"
)
OFFICIAL_PARTS = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "conv_in": "conv1",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
    "norm_out": "head.0",
    "conv_out": "head.2",
}
OFFICIAL_LEAVES = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def to_official_names(names: Iterable[str]) -> dict[str, str]:
    """`{name: official name}` for the tensors of a Wan 2.1 or 2.2 VAE in the layout of diffusers' AutoencoderKLWan.

    A name that is official already, or unknown, maps to itself. The inverse dict turns official names into diffusers'.
    """
    names = list(names)
    if "decoder.conv_in.weight" not in names:
        return {name: name for name in names}
    nested = any(name.startswith("encoder.down_blocks.0.resnets.") for name in names)  # Wan 2.2
    num_blocks = {"encoder.down": 0, "decoder.up": 0}  # residual blocks per resolution
    for name in names:
        if (match := DIFFUSERS_LAYER.match(name)) and match["block"]:
            num_blocks[match["side"]] = max(num_blocks[match["side"]], int(match["block"]) + 1)
    return {name: _official_layer(name, nested, num_blocks) or _official_part(name) for name in names}


def _official_layer(name: str, nested: bool, num_blocks: Mapping[str, int]) -> str | None:
    """The official name of a layer in the list of resolutions: "encoder.down_blocks.0.norm1.gamma"."""
    match = DIFFUSERS_LAYER.match(name)
    if match is None:
        return None
    side, stage, leaf = match["side"], int(match["stage"]), _official_leaf(match["leaf"])
    if not match["block"] and not match["resampler"]:  # Wan 2.1's encoder: one flat list in both layouts
        return f"{side}samples.{stage}.{leaf}"
    # The resampling comes after the residual blocks of its resolution.
    block = int(match["block"]) if match["block"] else num_blocks[side]
    if nested:
        return f"{side}samples.{stage}.{side.partition('.')[2]}samples.{block}.{leaf}"
    return f"{side}samples.{stage * (num_blocks[side] + 1) + block}.{leaf}"


def _official_part(name: str) -> str:
    """The official name of any other tensor: "decoder.mid_block.resnets.0.conv1.weight", "quant_conv.bias"."""
    match = DIFFUSERS_PART.match(name)
    if match is None or match["part"] not in OFFICIAL_PARTS:
        return name
    return f"{match['side'] or ''}{OFFICIAL_PARTS[match['part']]}.{_official_leaf(match['leaf'])}"


def _official_leaf(leaf: str) -> str:
    head, dot, rest = leaf.partition(".")
    return OFFICIAL_LEAVES.get(head, head) + dot + rest


# --- format ----------------------------------------------------------------------------------------------

# Accepts the official layout and that of diffusers' AutoencoderKLWan.
WAN_FORMAT = VaeFormat(
    title="a Wan VAE",
    advice=f"Choose {WAN21_VAE.file_name} for {WAN21_VAE.models} models, {WAN22_VAE.file_name} for {WAN22_VAE.models}.",
    markers=(("decoder.middle.0.residual.0.gamma",), ("decoder.mid_block.resnets.0.norm1.gamma",)),
    rename=to_official_names,
    infer_config=infer_config,
    network=WanVAE,
    decoder=("decoder.", "conv2."),
    encoder=("encoder.", "conv1."),
)
