"""FlashVSR's small decoder, which sees the small video beside the latent.

Source: OpenImagingLab/FlashVSR, `examples/WanVSR/utils/TCDecoder.py`: TAEHV, wider and deeper; names are theirs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from ...vae.files import VaeFormat, own_names
from ...vae.tiny import Memory, TinyConfig, TinyVAE
from ...weights.files.checkpoint import Checkpoint, CheckpointError

FRAMES, SIDE = 4, 8  # of the pixels that stand beside a latent position
SHOWN_CHANNELS = 3 * FRAMES * SIDE**2
CONDITIONAL = TinyConfig(
    "FlashVSR decoder",
    "FlashVSR",
    "TCDecoder.safetensors or Wan2_1_FlashVSR_TCDecoder_fp32.safetensors",
    16 + SHOWN_CHANNELS,
    widths=(512, 256, 128, 128),
    deep=True,
    piece_pixels=1 << 18,
)
ENTRANCES = ("decoder.1.weight", "decoder.10.weight", "decoder.16.weight", "decoder.22.weight")


def decode_next(decoder: TinyVAE, latent: Tensor, shown: Tensor, memory: Memory) -> Tensor:
    """Frames `[1, 3, t, H, W]`, about 0 to 1, of the next latent frame `[1, 16, h, w]`; `memory` is kept for the one
    after it.

    `shown` are as many of the small video's frames in -1 ... 1, as large as those that are made: 4, but 1 at the
    beginning, when nothing is remembered.
    """
    num_frames = shown.shape[2]
    if num_frames < FRAMES:
        shown = torch.cat([shown[:, :, :1].expand(-1, -1, FRAMES - num_frames, -1, -1), shown], dim=2)
    beside = rearrange(shown, "b c t (h hh) (w ww) -> b (c t hh ww) h w", hh=SIDE, ww=SIDE)
    frames = decoder.frames_of(torch.cat([beside.to(latent.dtype), latent], dim=1), memory)
    return frames[:, :, FRAMES - num_frames :]


def memory_bytes(config: TinyConfig, height: int, width: int, itemsize: int) -> int:
    """What is remembered of frames of so many pixels."""
    first, second, third, _ = config.widths
    return height * width * (3 * first // 64 + 3 * second // 16 + 3 * third // 4) * itemsize


def decode_bytes(config: TinyConfig, height: int, width: int, itemsize: int) -> int:
    """What decoding takes beside weights and what is remembered, for frames of so many pixels."""
    first, second, third, fourth = config.widths
    # a frame of each resolution, and what becomes of it
    moving = 2 * config.latent_channels // 64 + 3 * first // 64 + 2 * second // 16 + 3 * third // 4
    frames = 2 * 3 * FRAMES
    piece = (4 * third + 3 * fourth) * config.piece_pixels
    return (height * width * (moving + frames) + piece) * itemsize


def infer_config(checkpoint: Checkpoint) -> TinyConfig:
    """Its widths, from shapes. CheckpointError for a file that lacks what tells, or takes other latents."""
    shapes = checkpoint.shapes
    if missing := [name for name in ENTRANCES if len(shapes.get(name, ())) != 4]:
        raise CheckpointError(
            f"{checkpoint.path}: a FlashVSR decoder without a convolution {missing[0]}; expected the layers of "
            f"TCDecoder; download {CONDITIONAL.file_name} again"
        )
    first, second, third, last = (shapes[name][0] for name in ENTRANCES)
    channels = shapes[ENTRANCES[0]][1]
    if channels != CONDITIONAL.latent_channels:
        raise CheckpointError(
            f"{checkpoint.path}: a decoder of {channels} channels; expected FlashVSR's, of {16} of a latent and "
            f"{SHOWN_CHANNELS} of the small video; choose {CONDITIONAL.file_name}"
        )
    return replace(CONDITIONAL, widths=(first, second, third, last))


DECODER_FORMAT = VaeFormat(
    title="FlashVSR's decoder",
    advice=f"Choose {CONDITIONAL.file_name}.",
    markers=(("decoder.26.bias", "decoder.9.conv.weight", "decoder.5.conv.0.weight"),),
    rename=own_names,
    infer_config=infer_config,
    network=TinyVAE,
    decoder=("decoder.",),
)
