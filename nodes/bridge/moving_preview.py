"""A preview that moves: all frames of the latent that a sampler is at, played in its node on ComfyUI's channel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import latent_preview
from comfy.cli_args import LatentPreviewMethod, args
from comfy_api import feature_flags
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image
from protocol import BinaryEventTypes
from torch import Tensor

from ...video.latent_pictures import latent_pictures
from .page import running_server

LATENTS_PER_SECOND = 6.0  # Wan's latents are 4 a second of video, TI2V's 6, FramePack's 7.5
SHARE = 0.01  # of a run's time, at most, goes into making previews

Send = Callable[[Image.Image], None]


class MovingPreview:
    """Plays what `show` was last given, over and over, from a thread of its own until it is left.

    Frames are made of a latent by ComfyUI's latent-to-RGB factors, as its own stills are. What that takes is measured:
    a step whose preview would bring it above `SHARE` of the time since the beginning has none. `send` takes each frame;
    None: previews are off, or there is nobody to see them.
    """

    def __init__(self, latent_format: Any, send: Send | None, clock: Callable[[], float] = time.perf_counter):
        self._format, self._clock = latent_format, clock
        self._send = send if getattr(latent_format, "latent_rgb_factors", None) is not None else None
        self._begun, self._spent, self._last = clock(), 0.0, 0.0
        self._frames: Sequence[Image.Image] = ()
        self._news = threading.Condition()
        self._is_over = False
        self._player: threading.Thread | None = None

    def __enter__(self) -> MovingPreview:
        return self

    def __exit__(self, *_: object) -> None:
        with self._news:
            self._is_over = True
            self._news.notify()
        if self._player is not None:
            self._player.join()

    def show(self, denoised: Any) -> None:
        """Another step's latent `[B, C, T, h, w]`; of one frame ComfyUI's own still is enough."""
        if self._send is None or not isinstance(denoised, Tensor) or denoised.is_nested or denoised.ndim != 5:
            return
        begin = self._clock()
        if denoised.shape[2] < 2 or self._spent + self._last > SHARE * (begin - self._begun):
            return
        frames = rgb_frames(self._format, denoised)
        self._last = self._clock() - begin
        self._spent += self._last
        with self._news:
            self._frames = frames
            self._news.notify()
        if self._player is None:
            self._player = threading.Thread(target=self._play, name="moving-preview", daemon=True)
            self._player.start()

    def _play(self) -> None:
        number = 0
        while True:
            with self._news:
                if self._is_over:
                    return
                frame = self._frames[number % len(self._frames)]
            assert self._send is not None
            self._send(frame)
            with self._news:  # woken by a new latent: its frame follows at once, over the still of that step
                woken = self._is_over or self._news.wait(1 / LATENTS_PER_SECOND)
            number += not woken


def rgb_frames(latent_format: Any, latent: Tensor) -> list[Image.Image]:
    """Each frame of the first latent of `[B, C, T, h, w]` in its own small size, as core's Latent2RGB makes one."""
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    latent = latent if reshape is None else reshape(latent)
    return latent_pictures(latent[0], latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)


def sender() -> Send | None:
    """What shows a picture in the node that runs, until another one does; None where previews are off."""
    server, context = running_server(), get_executing_context()
    if server is None or context is None or args.preview_method == LatentPreviewMethod.NoPreviews:
        return None
    client, graph = server.client_id, get_progress_state().dynprompt
    if client is None:
        return None
    node = context.node_id
    told = {
        "node_id": node,
        "prompt_id": context.prompt_id,
        "display_node_id": graph.get_display_node_id(node),
        "parent_node_id": graph.get_parent_node_id(node),
        "real_node_id": graph.get_real_node_id(node),
    }
    knows_nodes = feature_flags.supports_feature(server.sockets_metadata, client, "supports_preview_metadata")

    def send(picture: Image.Image) -> None:
        preview = ("JPEG", picture, latent_preview.MAX_PREVIEW_RESOLUTION)
        if knows_nodes:
            server.send_sync(BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, (preview, told), client)
        else:
            server.send_sync(BinaryEventTypes.UNENCODED_PREVIEW_IMAGE, preview, client)

    return send
