"""Previews that move: every frame of a latent, as ComfyUI's own stills show one, and what they may cost."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import latent_preview
import numpy as np
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_execution.utils import CurrentNodeContext
from lowvram_pack.nodes.bridge.moving_preview import SHARE, MovingPreview, rgb_frames, sender
from protocol import BinaryEventTypes

FORMATS = [comfy.latent_formats.Wan21(), comfy.latent_formats.Wan22(), comfy.latent_formats.HunyuanVideo()]
BY_NAME = pytest.mark.parametrize("latent_format", FORMATS, ids=lambda each: type(each).__name__)


def latent_of(latent_format: Any, frames: int = 5) -> torch.Tensor:
    return torch.randn(1, latent_format.latent_channels, frames, 6, 8, generator=torch.Generator().manual_seed(3))


@BY_NAME
def test_a_frame_is_what_comfyuis_own_still_of_it_is(latent_format: Any) -> None:
    core = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        getattr(latent_format, "latent_rgb_factors_reshape", None),
    )
    latent = latent_of(latent_format)
    made = rgb_frames(latent_format, latent)
    assert len(made) == latent.shape[2]
    for number, frame in enumerate(made):
        wanted = np.asarray(core.decode_latent_to_preview(latent[:, :, number : number + 1]), dtype=int)
        assert np.abs(np.asarray(frame, dtype=int) - wanted).max() <= 1


def seen(count: int) -> tuple[list[np.ndarray], Any, threading.Event]:
    """Pictures that are sent, what takes them, and a sign once there are so many."""
    pictures: list[np.ndarray] = []
    enough = threading.Event()

    def send(picture: Any) -> None:
        pictures.append(np.asarray(picture))
        if len(pictures) >= count:
            enough.set()

    return pictures, send, enough


def test_all_frames_are_played_over_and_over_until_it_is_left() -> None:
    latent, frames = latent_of(FORMATS[0], 3), 3
    pictures, send, enough = seen(2 * frames)
    with MovingPreview(FORMATS[0], send) as preview:
        preview.show(latent)
        assert enough.wait(20)
    wanted = [np.asarray(frame) for frame in rgb_frames(FORMATS[0], latent)]
    assert all((picture == wanted[n % frames]).all() for n, picture in enumerate(pictures[: 2 * frames]))
    assert "moving-preview" not in {thread.name for thread in threading.enumerate()}
    count = len(pictures)
    time.sleep(0.4)
    assert len(pictures) == count


def test_a_step_has_none_where_that_would_cost_more_than_its_share() -> None:
    ticks = iter([0.0, 1.0, 3.0, 4.0, 1.0 / SHARE, 2.0 / SHARE + 5, 2.0 / SHARE + 7])  # a preview takes two seconds
    pictures, send, enough = seen(1)
    first, second, third = (latent_of(FORMATS[0], 2) + number for number in range(3))
    with MovingPreview(FORMATS[0], send, clock=lambda: next(ticks)) as preview:
        preview.show(first)  # takes from 1 to 3
        assert enough.wait(20)
        preview.show(second)  # at 4: two more seconds are not the share of 4
        preview.show(second)  # nor of 100
        preview.show(third)
        time.sleep(0.4)
    shown = {picture.tobytes() for picture in pictures}
    assert not shown & {np.asarray(frame).tobytes() for frame in rgb_frames(FORMATS[0], second)}


@pytest.mark.parametrize("given", [torch.zeros(1, 16, 1, 4, 4), torch.zeros(1, 16, 4, 4), None])
def test_what_does_not_move_is_left_to_comfyui(given: Any) -> None:
    pictures, send, _ = seen(1)
    with MovingPreview(FORMATS[0], send) as preview:
        preview.show(given)
    assert pictures == []


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a server that has one page is asked to send."""
    sent: list[Any] = []
    server = SimpleNamespace(
        client_id="page",
        sockets_metadata={"page": {"feature_flags": {"supports_preview_metadata": True}}},
        send_sync=lambda *what: sent.append(what),
    )
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    return sent


def test_pictures_go_to_the_node_that_runs_over_comfyuis_channel(
    told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    assert sender() is None, "no node runs"
    with CurrentNodeContext("prompt", "7"):
        send = sender()
    assert send is not None
    picture = rgb_frames(FORMATS[0], latent_of(FORMATS[0], 2))[0]
    send(picture)
    ((event, (preview, about), client),) = told
    assert (event, client) == (BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, "page")
    assert preview == ("JPEG", picture, latent_preview.MAX_PREVIEW_RESOLUTION)
    assert (about["node_id"], about["prompt_id"]) == ("7", "prompt")


def test_comfyuis_flag_switches_them_off(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.NoPreviews)
    with CurrentNodeContext("prompt", "7"):
        assert sender() is None
    latent = latent_of(FORMATS[0])
    with MovingPreview(FORMATS[0], None) as preview:
        preview.show(latent)
    assert told == []
