"""What decoding or encoding by a video autoencoder costs, for the plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VaeFootprint:
    """Decoding costs: what convolutions remember and the working set grow with the pixels of a frame, strip or tile.

    Of a VAE that decodes in strips, a strip takes `strip_bytes_per_column` more for each column of pixels, as lower
    resolutions are ahead of it and convolutions see rows of its neighbours; it leaves `seam_bytes_per_column` to the
    strip below for each latent frame. Frames at the latent's size wait too: `waiting_bytes_per_position` of them.
    `whole_bytes_per_pixel` of what convolutions remember is of layers at that size, which are not there beside strips.
    """

    weight_bytes: int
    cache_bytes_per_pixel: int
    working_bytes_per_pixel: int
    strip_bytes_per_column: int = 0
    seam_bytes_per_column: int = 0
    waiting_bytes_per_position: int = 0
    whole_bytes_per_pixel: int = 0

    @property
    def has_strips(self) -> bool:
        return self.strip_bytes_per_column > 0
