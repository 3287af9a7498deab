"""Files of the HunyuanVideo autoencoder: whether a file holds it, under which layout, and how large it is."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.file_kinds import file_kind
from ..diffusion.vae_checks import check_tensors
from ..weights.reader import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from .vae import HUNYUAN_VAE, HunyuanVAE, VAEConfig

logger = logging.getLogger(__name__)


DECODER = ("decoder.", "post_quant_conv.")
PREFIXES = ("vae.", "first_stage_model.", "model.")

# Both layouts have them; other autoencoders do not have both.
MARKERS = ("decoder.conv_in.conv.weight", "post_quant_conv.weight")


def load_vae(path: str | Path, dtype: torch.dtype, device: torch.device | str) -> HunyuanVAE:
    """Load a HunyuanVideo autoencoder, in `dtype` on `device`.

    Tensors are read and converted one at a time, so that the file is never in memory twice.
    Raises CheckpointError when the file is not a complete HunyuanVideo VAE.
    """
    config, checkpoint = open_vae(path)
    return build_vae(config, checkpoint.read, dtype, device)


def build_vae(
    config: VAEConfig,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
    decode_only: bool = False,
) -> HunyuanVAE:
    """An autoencoder of what `read` has under its tensors' names; the encoder stays on meta where it only decodes."""
    vae = HunyuanVAE(config, device="meta", dtype=dtype)
    names = [name for name in vae.state_dict() if not decode_only or name.startswith(DECODER)]
    weights = {name: read(name).to(device=device, dtype=dtype) for name in names}
    vae.load_state_dict(weights, strict=not decode_only, assign=True)
    del weights  # or another layout would be a second copy
    uses_cudnn = torch.device(device).type == "cuda" and torch.version.hip is None
    return vae.to_channels_last() if uses_cudnn and dtype != torch.float32 else vae


def open_vae(path: str | Path) -> tuple[VAEConfig, Checkpoint]:
    """Open a HunyuanVideo VAE file: its dimensions, and its tensors under diffusers' names. Reads the header only.

    Accepts diffusers' layout (the official and Kijai's files) and ComfyUI's, each with or without a prefix ("vae.",
    "first_stage_model."). Raises CheckpointError, saying what the file is where that can be told.
    """
    checkpoint = open_checkpoint(path)
    prefix = find_prefix(checkpoint.tensors)
    if prefix is None:
        raise CheckpointError(
            f"{checkpoint.path} is {file_kind(checkpoint.tensors).title}; expected a HunyuanVideo VAE. "
            f"Choose {HUNYUAN_VAE.file_name}."
        )
    bare = {name: name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)}
    official = to_diffusers_names(bare.values())
    # What is outside the prefix belongs to another model of a merged file: None drops it.
    names = {name: official[bare[name]] if name in bare else None for name in checkpoint.tensors}
    return adopt_vae(checkpoint.renamed(names))


def adopt_vae(renamed: Checkpoint) -> tuple[VAEConfig, Checkpoint]:
    """The dimensions of a VAE with diffusers' names, and its tensors in the shapes that `HunyuanVAE` has.

    Raises CheckpointError where they are not a complete HunyuanVideo VAE's.
    """
    config = infer_config(renamed)
    model = HunyuanVAE(config, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    reshaped = {name: without_kernel(info, shapes.get(name)) for name, info in renamed.tensors.items()}
    fitting = Checkpoint(renamed.path, reshaped, renamed.metadata)
    check_tensors(fitting, config, shapes)
    return config, fitting


def find_prefix(names: Iterable[str]) -> str | None:
    """What stands before the VAE's names in a file, or None if it holds no HunyuanVideo VAE."""
    names = set(names)
    for prefix in ("", *PREFIXES):
        if all(prefix + marker in names for marker in MARKERS):
            return prefix
    return None


def without_kernel(info: TensorInfo, wanted: tuple[int, ...] | None) -> TensorInfo:
    """The weight of a 1x1x1 convolution as a matrix, where one is wanted: ComfyUI's attention has convolutions."""
    if wanted is not None and len(wanted) == 2 and info.shape == (*wanted, 1, 1, 1):
        return replace(info, shape=wanted)
    return info


# --- dimensions ------------------------------------------------------------------------------------------

ENCODER_CONV = re.compile(r"encoder\.down_blocks\.(?P<stage>\d+)\.resnets\.(?P<block>\d+)\.conv1\.conv\.weight$")


def infer_config(checkpoint: Checkpoint) -> VAEConfig:
    """The dimensions of a VAE with diffusers' names, from its tensors' names and shapes alone.

    Raises CheckpointError when a tensor that tells them is missing or the autoencoder is another generation's.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
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
    r"(?P<side>encoder\.down|decoder\.up)\.(?P<stage>\d+)\."
    r"(?:block\.(?P<block>\d+)|(?P<sampler>down|up)sample)\.(?P<leaf>.+)$"
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
