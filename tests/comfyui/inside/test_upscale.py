"""Upscale Video (Low VRAM): of core's VIDEO and IMAGE, with its sound, paused and taken up again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import comfy.model_management as mm
import folder_paths
import pytest
import torch
from comfy_api.latest import InputImpl
from lowvram_pack.nodes.upscale import BESIDE, LoadFlashVSRModel, UpscaleVideo
from lowvram_pack.vae.tiny import TinyVAE
from lowvram_pack.video.sound import Sound
from lowvram_pack.video.writer import VideoWriter
from lowvram_pack.wanvideo.network.config import WanConfig
from lowvram_pack.wanvideo.network.model import WanModel
from lowvram_pack.wanvideo.upscale.decoder import CONDITIONAL
from lowvram_pack.wanvideo.upscale.projection import LowQualityProjection, ProjectionConfig
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG = WanConfig("t2v", 128, 128, 1, 2, text_dim=32, freq_dim=32)
WIDGETS = {
    "scale": "2", "seed": 3, "vram_budget_gb": 0.0, "fps": 10.0, "filename_prefix": "video/Large", "crf": 16,
    "resume": True, "colour": "adain", "sparse_ratio": 0.5, "local_range": "9", "kept_windows": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path / "video"


@pytest.fixture(scope="module")
def flashvsr(models: Path) -> Any:
    parts = {
        "FlashVSR1_1": WanModel(CONFIG),
        "LQ_proj_in": LowQualityProjection(ProjectionConfig((16, 16), CONFIG.dim)),
        "TCDecoder": TinyVAE(replace(CONDITIONAL, widths=(8, 8, 8, 8))),
    }
    folder = models / "flashvsr"
    folder.mkdir()
    for name, module in parts.items():
        save_file(random(module), folder / f"{name}.safetensors")
    save_file({"context": torch.randn(1, 8, 32)}, folder / "Prompt.safetensors")
    name = str(Path("flashvsr") / "FlashVSR1_1.safetensors")
    return LoadFlashVSRModel.execute(name, "1.1", BESIDE, BESIDE, BESIDE, "fp32", "sdpa", "none").result[0]


def random(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, tensor in module.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        made[name] = values * (0.7 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1)
    return made


def pictures(num_frames: int) -> Tensor:
    noise = torch.rand(num_frames, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, size=(64, 64), mode="bilinear").permute(0, 2, 3, 1)


def a_video(path: Path, num_frames: int) -> Any:
    with VideoWriter(path, 12.5, sound=Sound(torch.zeros(1, 44100 * num_frames // 12), 44100)) as writer:
        writer.write((pictures(num_frames) * 255).byte())
    return InputImpl.VideoFromFile(str(path))


def upscaled(flashvsr: Any, **given: Any) -> Any:
    return UpscaleVideo.execute(flashvsr, **(WIDGETS | given))


def told(path: Path) -> tuple[int, float, int, int]:
    """Frames, their rate, width, and streams of sound."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        count = sum(1 for _ in container.decode(video=0))
        return count, float(stream.average_rate), stream.width, len(container.streams.audio)


def read(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])


def test_a_video_keeps_its_rate_and_sound(flashvsr: Any, tmp_path: Path, output: Path) -> None:
    made = upscaled(flashvsr, video=a_video(tmp_path / "small.mp4", 23))
    (path,) = output.glob("*.mp4")
    assert told(path) == (23, 12.5, 128, 1)
    video = made.result[0]
    assert video.get_dimensions() == (128, 128)
    assert made.ui.as_dict()["images"][0]["filename"] == path.name
    assert not (tmp_path / "upscale").exists()


def test_pictures_with_a_sound(flashvsr: Any, output: Path) -> None:
    audio = {"waveform": torch.zeros(1, 2, 22050), "sample_rate": 22050}
    upscaled(flashvsr, images=pictures(5), audio=audio)
    (path,) = output.glob("*.mp4")
    assert told(path) == (5, 10.0, 128, 1)


def test_paused_and_queued_again_it_is_the_same(
    flashvsr: Any, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = a_video(tmp_path / "small.mp4", 40)
    upscaled(flashvsr, video=video)
    (whole,) = output.glob("*.mp4")
    passes = [0]
    forward = WanModel.forward

    def interrupting(self: WanModel, *args: Any, **named: Any) -> Tensor:
        passes[0] += 1
        if passes[0] == 3:
            mm.interrupt_current_processing()
        return forward(self, *args, **named)

    with monkeypatch.context() as stopped:
        stopped.setattr(WanModel, "forward", interrupting)
        with pytest.raises(mm.InterruptProcessingException):
            upscaled(flashvsr, video=video, filename_prefix="video/Paused")
    mm.interrupt_current_processing(False)
    assert list((tmp_path / "upscale").glob("*/state_*"))
    upscaled(flashvsr, video=video, filename_prefix="video/Paused")
    (paused,) = output.glob("Paused*.mp4")
    assert torch.equal(read(paused), read(whole))
    assert not (tmp_path / "upscale").exists()


def test_a_lora_changes_what_is_made(flashvsr: Any, tmp_path: Path, output: Path) -> None:
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    name = "diffusion_model.blocks.0.ffn.0.lora"
    parts = {
        f"{name}_{part}.weight": torch.randn(128, 128, generator=generator)[:rows, :columns].clone()
        for part, rows, columns in (("down", 4, 128), ("up", 128, 4))
    }
    save_file(parts, tmp_path / "style.safetensors")
    model = str(Path("flashvsr") / "FlashVSR1_1.safetensors")
    files = [model, "1.1", BESIDE, BESIDE, BESIDE, "fp32", "sdpa", "none"]
    for strength in (0.0, 1.0):
        loaded = LoadFlashVSRModel.execute(*files, "style.safetensors", strength).result[0]
        upscaled(loaded, images=pictures(5), filename_prefix=f"video/By{strength:.0f}")
    upscaled(flashvsr, images=pictures(5), filename_prefix="video/Plain")
    plain, without, with_it = (read(next(output.glob(f"{name}*.mp4"))) for name in ("Plain", "By0", "By1"))
    assert torch.equal(plain, without) and not torch.equal(plain, with_it)


def test_what_is_connected_must_be_one_of_two(flashvsr: Any) -> None:
    with pytest.raises(ValueError, match="either a video or images"):
        upscaled(flashvsr)


def test_its_seeds_end_where_cores_do() -> None:
    seed = next(each for each in UpscaleVideo.GET_SCHEMA().inputs if each.id == "seed")
    assert seed.max == 0xFFFFFFFFFFFFFFFF
