"""A preview that moves: all frames of the latent that a sampler is at, played in its node on ComfyUI's channel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_api import feature_flags
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image
from protocol import BinaryEventTypes
from torch import Tensor

from ...video.latent_pictures import latent_pictures
from .engine import Engine
from .page import running_server
from .tiny_preview import room_beside, tiny_preview

LATENTS_PER_SECOND = 6.0  # Wan's latents are 4 a second of video, TI2V's 6, FramePack's 7.5
SHARE = 0.01  # of a run's time, at most, goes into making previews
TINY_PART = 0.8  # of that is a tiny decoder's, so that the first steps have pictures too while it warms up
FEW_LATENTS_FIRST = 2  # trials of a decoder with one latent frame: on a GPU the first takes much longer than all others

Send = Callable[[Image.Image], None]
Draw = Callable[[Tensor], Sequence[Image.Image]]  # of a latent `[B, C, T, h, w]`; none: it never can


class MovingPreview:
    """Plays what `show` was last given, over and over, from a thread of its own until it is left.

    Frames are made of a latent by `tiny`, a tiny decoder, where it is given and there is time for it, else by ComfyUI's
    latent-to-RGB factors, as its own stills are. What that takes is measured: a step whose preview would bring it above
    `SHARE` of the time since the beginning has none. `send` takes each frame; None: previews are off, or there is
    nobody to see them.
    """

    def __init__(
        self,
        latent_format: Any,
        send: Send | None,
        clock: Callable[[], float] = time.perf_counter,
        tiny: Draw | None = None,
    ):
        self._clock, self._send = clock, send
        self._drawers = [] if tiny is None else [_Drawer(tiny, SHARE * TINY_PART, FEW_LATENTS_FIRST)]
        if getattr(latent_format, "latent_rgb_factors", None) is not None:
            share = SHARE if tiny is None else SHARE * (1 - TINY_PART)
            self._drawers.append(_Drawer(partial(rgb_frames, latent_format), share))
        self._last: _Drawer | None = None
        self._begun = clock()
        self.frames: Sequence[Image.Image] = ()
        self._seconds = 0.0  # that each is shown
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
        frames = self._drawn(denoised) if denoised.shape[2] > 1 else ()
        if not frames:
            return
        with self._news:
            self.frames, self._seconds = frames, denoised.shape[2] / len(frames) / LATENTS_PER_SECOND
            self._news.notify()
        if self._player is None:
            self._player = threading.Thread(target=self._play, name="moving-preview", daemon=True)
            self._player.start()

    def _drawn(self, latent: Tensor) -> Sequence[Image.Image]:
        """The pictures of the best drawer that there is time for, but of none that is worse than the last one's."""
        begin = self._clock()
        for drawer in tuple(self._drawers):
            if drawer.may_draw(latent.shape[2], begin - self._begun):
                is_trial = drawer.num_trials > 0
                frames = drawer.draw(latent[:, :, :1] if is_trial else latent)
                end = self._clock()
                drawer.took(end - begin, 1 if is_trial else latent.shape[2])
                begin = end
                if not frames:
                    self._drawers.remove(drawer)
                elif not is_trial:
                    self._last = drawer
                    return frames
            elif drawer is self._last:
                break
        return ()

    def _play(self) -> None:
        number = 0
        while True:
            with self._news:
                if self._is_over:
                    return
                frame = self.frames[number % len(self.frames)]
            assert self._send is not None
            self._send(frame)
            with self._news:  # woken by a new latent: its frame follows at once, over the still of that step
                woken = self._is_over or self._news.wait(self._seconds)
            number += not woken


class _Drawer:
    """One way of making pictures, which may take a share of a run's time, after some trials with one latent frame."""

    def __init__(self, draw: Draw, share: float, num_trials: int = 0):
        self.draw, self.num_trials = draw, num_trials
        self._share = share
        self._spent = self._each = 0.0  # seconds in all, and for a latent frame

    def may_draw(self, num_latents: int, elapsed: float) -> bool:
        """Whether there is time for pictures of so many latent frames."""
        expected = self._each * (1 if self.num_trials else num_latents)
        return self._spent + expected <= self._share * elapsed

    def took(self, seconds: float, num_latents: int) -> None:
        """So long for so many latent frames; what a decoder's first trial took says nothing about later ones."""
        self._spent += seconds
        self._each = 0.0 if self.num_trials == FEW_LATENTS_FIRST else seconds / num_latents
        self.num_trials = max(0, self.num_trials - 1)


def rgb_frames(latent_format: Any, latent: Tensor) -> list[Image.Image]:
    """Each frame of the first latent of `[B, C, T, h, w]` in its own small size, as core's Latent2RGB makes one."""
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    latent = latent if reshape is None else reshape(latent)
    return latent_pictures(latent[0], latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)


def moving_preview(latent_format: Any, engine: Engine[Any]) -> MovingPreview:
    """Of the node that runs, which samples latents of this format with a model of this engine."""
    send = sender()
    if send is None:
        return MovingPreview(latent_format, None)

    def room(device: torch.device) -> int:
        return room_beside(device, engine.vram_left())

    tiny = tiny_preview(latent_format, engine.streamed.settings.compute_dtype, room)
    return MovingPreview(latent_format, send, tiny=tiny)


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
