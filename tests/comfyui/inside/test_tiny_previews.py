"""Previews by a tiny decoder: its pictures are those of ComfyUI's own, where it has time and room for them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import comfy.latent_formats
import folder_paths
import latent_preview
import numpy as np
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.taesd.taehv import TAEHV
from lowvram_pack.nodes.bridge import host
from lowvram_pack.nodes.bridge.moving_preview import SHARE, MovingPreview, rgb_frames
from lowvram_pack.nodes.bridge.tiny_preview import TinyPreview, room_beside, tiny_preview
from PIL import Image
from safetensors.torch import save_file

WAN, TI2V, HUNYUAN = comfy.latent_formats.Wan21(), comfy.latent_formats.Wan22(), comfy.latent_formats.HunyuanVideo()
PLENTY = 2**40


def room(_: torch.device) -> int:
    return PLENTY


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's models/vae_approx, empty."""
    types = folder_paths.folder_names_and_paths["vae_approx"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], types))
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    return tmp_path


def core_decoder(channels: int) -> TAEHV:
    torch.manual_seed(0)
    decoder = TAEHV(channels)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=(0.8 / parameter[0].numel() ** 0.5) if parameter.ndim > 1 else 0.1)
    torch.nn.init.constant_(decoder.decoder[22].bias, 0.5)  # grey
    return decoder


def saved(decoder: TAEHV, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}, path)
    return path


def latent_of(latent_format: Any, frames: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, latent_format.latent_channels, frames, 4, 6, generator=generator)


@pytest.mark.parametrize(
    ("latent_format", "name", "raw"),
    [
        (WAN, "lighttaew2_1.safetensors", True),
        (WAN, "taew2_1.safetensors", False),
        (TI2V, "taew2_2.safetensors", False),
        (HUNYUAN, "taehv.safetensors", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_are_those_of_comfyuis_own_decoder(folder: Path, latent_format: Any, name: str, raw: bool) -> None:
    core = core_decoder(latent_format.latent_channels)
    saved(core, folder / name)
    preview = tiny_preview(latent_format, torch.float32, room)
    assert preview is not None
    latent = latent_of(latent_format)
    made = [np.asarray(picture, dtype=int) for picture in preview(latent)]
    with torch.inference_mode():  # [1, 3, 9, H, W]
        video = core.decode(latent_format.process_out(latent) if raw else latent)
    wanted = video[0].clamp(0, 1).mul(255).round().int().permute(1, 2, 3, 0)[[0, 2, 4, 6, 8]].numpy()
    assert len(made) == len(wanted) and wanted.std() > 3
    assert all(np.abs(frame - core_frame).max() <= 1 for frame, core_frame in zip(made, wanted, strict=True))


@pytest.mark.newest
def test_they_are_no_larger_than_comfyui_shows_previews(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(core_decoder(16), folder / "taew2_1.safetensors")
    monkeypatch.setattr(latent_preview, "MAX_PREVIEW_RESOLUTION", 40)
    preview = tiny_preview(WAN, torch.float32, room)
    assert preview is not None
    latent = torch.zeros(1, 16, 1, 5, 10)
    latent[..., 5:] = 2.0
    (picture,) = preview(latent)
    assert picture.size == (40, 16)  # of 80 x 40: whole latents are wider than that
    wide = torch.nn.functional.interpolate(latent[:, :, 0], (2, 5), mode="area")[:, :, None]
    (wanted,) = preview(wide)
    assert np.array_equal(np.asarray(picture), np.asarray(wanted))


def test_the_file_is_comfyuis_or_the_one_without_light(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(latent_format: Any) -> str | None:
        preview = tiny_preview(latent_format, torch.float32, room)
        return None if preview is None else preview.path.name

    def there(*names: str) -> None:
        monkeypatch.setattr(folder_paths, "get_filename_list", lambda _: list(names))
        for name in names:
            (folder / name).touch()

    there("taesd_decoder.pth", "taew2_2.safetensors")
    assert chosen(WAN) is None
    there("taehv.pth", "taehv.safetensors", "taew2_1.safetensors", "lighttaew2_1.pth")
    assert chosen(HUNYUAN) == "taehv.safetensors"
    assert chosen(WAN) == "lighttaew2_1.pth"  # as ComfyUI's own still; what it holds is told when it is opened
    assert chosen(comfy.latent_formats.SD15()) is None
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    assert chosen(HUNYUAN) is None


@pytest.mark.parametrize("content", [b"no model", None])
def test_without_a_decoder_or_its_room_there_is_a_word_and_no_picture(
    folder: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    path = folder / "taew2_1.safetensors"
    if content is None:
        saved(core_decoder(16), path)
    else:
        path.write_bytes(content)
    preview = tiny_preview(WAN, torch.float32, lambda _: 2**20)
    assert preview is not None and preview(latent_of(WAN)) == []
    assert "taew2_1.safetensors" in caplog.text and "sums of the latent's channels instead" in caplog.text
    assert content is not None or "1.0 MiB is free" in caplog.text


@pytest.mark.newest
def test_an_out_of_memory_of_the_device_ends_them_and_not_the_run(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    saved(core_decoder(16), folder / "taew2_1.safetensors")
    preview = tiny_preview(WAN, torch.float32, room)
    monkeypatch.setattr(TinyPreview, "_pictures", full)
    assert preview is not None and preview(latent_of(WAN)) == []
    assert "no VRAM" in caplog.text


@pytest.mark.newest
def test_a_budget_by_hand_counts_where_less_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "free_vram", lambda _: 1000)
    monkeypatch.setattr(host, "reserved_vram", lambda: 300)
    card = torch.device("cuda")
    assert [room_beside(card, left) for left in (None, 500, 900)] == [700, 500, 700]


class Steps:
    """A run of `seconds` a step, in which pictures of a latent frame take `cost` seconds, the first ones `first`."""

    def __init__(self, seconds: float, cost: float, first: float, works: bool = True):
        self.now, self.seconds, self.cost, self.first, self.works = 0.0, seconds, cost, first, works
        self.spent = 0.0
        self.shown: list[str] = []
        self.asked: list[int] = []

    def draw(self, latent: torch.Tensor) -> list[Image.Image]:
        took = self.cost * latent.shape[2] if self.asked else self.first
        self.now += took
        self.spent += took
        self.asked.append(latent.shape[2])
        return [Image.new("RGB", (8, 8), (len(self.asked), 0, 0))] * latent.shape[2] if self.works else []

    def run(self, num_steps: int, num_latents: int = 5) -> None:
        latent = latent_of(WAN, num_latents)
        with MovingPreview(WAN, lambda _: None, lambda: self.now, self.draw) as preview:
            for _ in range(num_steps):
                self.now += self.seconds
                preview.show(latent)
                sizes = {picture.size for picture in preview.frames}
                self.shown.append("decoder" if sizes == {(8, 8)} else "colours" if sizes else "")


@pytest.mark.newest
def test_colours_are_shown_until_there_is_time_for_the_decoder() -> None:
    steps = Steps(seconds=10.0, cost=0.02, first=0.5)
    steps.run(20)
    assert steps.asked[:3] == [1, 1, 5]  # what it takes is tried with one latent first
    begun = steps.shown.index("decoder")
    assert steps.shown == ["colours"] * begun + ["decoder"] * (20 - begun)
    assert 5 < begun < 12 and len(steps.asked) > 5


@pytest.mark.newest
@pytest.mark.parametrize("cost", [0.001, 0.05, 1.0])
def test_all_of_it_takes_its_share_of_the_run(cost: float) -> None:
    steps = Steps(seconds=3.0, cost=cost, first=0.02)
    steps.run(40)
    assert steps.spent <= SHARE * steps.now + max(0.02, cost)
    assert set(itertools.chain(steps.shown)) <= {"colours", "decoder"}


@pytest.mark.newest
def test_without_the_decoder_its_colours_go_on() -> None:
    steps = Steps(seconds=3.0, cost=0.001, first=0.001, works=False)
    steps.run(3)
    assert steps.shown == ["colours"] * 3 and steps.asked == [1]
    assert len(rgb_frames(WAN, latent_of(WAN))) == 3
