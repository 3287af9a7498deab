"""Drafts of Wan videos by a tiny decoder, in place of the VAE's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..memory.plan.tiles import smaller_tiles
from ..runtime.settings import RunSettings
from ..vae.retries import at_work, pieces_fitting
from ..vae.tiling import OnChunk, Tile, decode_in
from ..vae.tiny_files import TINY_FORMAT, takes_raw_latents
from ..video.pictures import to_uint8
from ..weights.files.checkpoint import CheckpointError
from .vae.model import VAEConfig


class DraftDecoder:
    """A tiny decoder's file, for the latents of one VAE. CheckpointError for another model's, or no such file."""

    def __init__(self, path: Path, vae: VAEConfig) -> None:
        self._opened, self._vae = TINY_FORMAT.open_file(path), vae
        if self._opened.config.latent_channels != vae.z_dim:
            raise CheckpointError(
                f"{path}: a tiny decoder of {self._opened.config.latent_channels} latent channels, and {vae.models} "
                f"make {vae.z_dim}: {self._opened.config.advice(vae.z_dim)}"
            )

    def frames(self, latent: Tensor, settings: RunSettings, on_chunk: OnChunk) -> Iterator[Tensor]:
        """Frames, uint8 `[t, H, W, 3]`, of a normalised latent `[1, z, T, h, w]` as they come.

        Where the device runs out of memory, what is missing is decoded in smaller tiles.
        """
        if takes_raw_latents(self._opened):
            mean, std = (torch.tensor(each) for each in (self._vae.latent_mean, self._vae.latent_std))
            latent = latent.float().cpu() * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)
        side = self._vae.spatial_stride * max(latent.shape[3:])
        with at_work(lambda: self._opened.build(settings.compute_dtype, settings.device, only="decoder")) as decoder:

            def pieces(tile: Tile) -> Iterator[Tensor]:
                return map(to_uint8, decode_in(decoder, latent, tile, on_chunk))

            yield from pieces_fitting([Tile(), *map(Tile, smaller_tiles(side))], pieces, "decoding a draft")
