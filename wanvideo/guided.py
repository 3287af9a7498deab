"""One expert's Denoiser: its velocity under what it is shown, and classifier-free guidance."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..sampling.guidance import Guidance
from ..sampling.solver import Denoiser
from .conditioning import Conditions
from .network.model import Extras
from .streamed import StreamedWan


def guided(model: StreamedWan, conditions: Conditions, scale: float, batched: bool) -> Denoiser:
    """The model under these conditions; `batched` makes both passes of a step in one batch."""
    channels, first_frame = conditions.channels, conditions.first_frame
    both = None if conditions.uncond is None else torch.cat([conditions.cond, conditions.uncond])
    tokens = {size: _repeated(conditions.image_tokens, size) for size in (1, 2)}
    extras = {size: _for_batch(conditions.extras, size) for size in (1, 2)}

    def velocity(latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if channels is not None:
            latent = torch.cat([latent, channels.expand(latent.shape[0], -1, -1, -1, -1)], dim=1)
        if first_frame is not None:  # the given frame is clean: timestep 0
            timestep = timestep[:, None].repeat(1, latent.shape[2])
            timestep[:, 0] = 0
        if both is not None and len(text) == 2:
            text = both  # one tensor for all steps, so that it is embedded once
        shown = extras[len(text)]
        if conditions.nag is not None and text is not conditions.uncond:
            shown = replace(shown, nag=replace(conditions.nag, samples=(True, False)[: len(text)]))
        prompts = ((0, 0), (1, 0)) if len(text) == 2 else ((int(text is conditions.uncond), 0),)
        return model(latent, timestep, text, tokens[len(text)], replace(shown, prompts=prompts))

    both_passes = Guidance(velocity, conditions.cond, conditions.uncond, scale, batched)
    if first_frame is None:
        return both_passes

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x = torch.cat([first_frame, x[:, :, 1:]], dim=2)
        denoised = both_passes(x, sigma)
        return torch.cat([first_frame, denoised[:, :, 1:]], dim=2)

    return denoise


def _repeated(tensor: Tensor | None, size: int) -> Tensor | None:
    """One sample's tensor for a batch of `size`."""
    return None if tensor is None else tensor.expand(size, *tensor.shape[1:])


def _for_batch(extras: Extras, size: int) -> Extras:
    frames = tuple(each.expand(size, *each.shape[1:]) for each in extras.vace_frames)
    return replace(extras, vace_frames=frames, reference=_repeated(extras.reference, size))
