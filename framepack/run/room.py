"""The room that a run takes on the disk."""

from __future__ import annotations

from ...video.growing_video import film_bytes
from ..request import Material, Sampling
from ..sections import FRAMES_PER_LATENT, SPATIAL_STRIDE, num_frames
from .folder import RunStore


def check_room(store: RunStore, sampling: Sampling, material: Material, with_film: bool) -> None:
    """ValueError where the disk has no room for what a run keeps: its sections, and the film where it has one."""
    height, width = material.latent_size
    window, film = sampling.window, 0
    if with_film:
        total = FRAMES_PER_LATENT * window * store.total_sections
        film = film_bytes(total, SPATIAL_STRIDE * height, SPATIAL_STRIDE * width, num_frames(window))
    store.check_room(4 * 16 * (window + 1) * height * width, film)
