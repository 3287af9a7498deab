"""Tiny files of every kind, and commands over them."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from lowvram_video.framepack.vae.model import HunyuanVAE, VAEConfig
from lowvram_video.video.writer import VideoWriter
from lowvram_video.wanvideo.network.model import WanModel
from PIL import Image
from safetensors.torch import load_file, save_file

from ..test_cli_framepack import CONFIG, TEXT_DIM, save_encoders
from ..tiny import CONFIGS, randomize, save_files, save_wan
from ..tiny_flashvsr import save_flashvsr, small_video
from ..tiny_framepack import save_framepack

WIDTH, HEIGHT = 48, 32
SMALL_FRAMES, SMALL_SIDE = 79, 64  # of a video that is made larger: sections of 45 and 32 frames, and some more


@dataclass(frozen=True)
class Files:
    """Where they are: models of every family with what belongs to them, and a larger one to convert."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "wan_t2v.safetensors"

    @property
    def model_low(self) -> Path:
        return self.folder / "wan_low.safetensors"

    @property
    def picture_model(self) -> Path:
        """Of image-to-video."""
        return self.folder / "wan_i2v.safetensors"

    @property
    def framepack(self) -> Path:
        return self.folder / "framepack.safetensors"

    @property
    def large(self) -> Path:
        """A Wan model whose blocks are worth streaming from the disk."""
        return self.folder / "large.safetensors"

    @property
    def other_large(self) -> Path:
        """The same with other weights."""
        return self.folder / "other_large.safetensors"

    def wan(self, output: Path, *more: Any, model: Path | None = None, frames: int = 9, steps: int = 3) -> list[str]:
        """The command of a video by Wan."""
        return _words(
            "generate", "--model", model or self.model, "--text-encoder", self.folder / "umt5.safetensors",
            "--vae", self.folder / "vae.safetensors", "--prompt", "a red ball moves left", "--output", output,
            "--device", "cpu", "--width", WIDTH, "--height", HEIGHT, "--frames", frames, "--steps", steps, *more,
        )  # fmt: skip

    def make_framepack(self, output: Path, *more: Any, seconds: float = 1.0, model: Path | None = None) -> list[str]:
        """The command of a video by FramePack."""
        folder = self.folder
        return _words(
            "generate", "--model", model or self.framepack, "--text-encoder", folder / "llava_llama3.safetensors",
            "--clip-l", folder / "clip_l.safetensors", "--clip-vision", folder / "sigclip.safetensors",
            "--vae", folder / "hyvae.safetensors", "--prompt", "she stands still", "--output", output,
            "--device", "cpu", "--width", WIDTH, "--height", HEIGHT, "--window", 2, "--steps", 3,
            "--image", folder / "girl.png", "--seconds", seconds, *more,
        )  # fmt: skip

    def upscale(self, output: Path, *more: Any) -> list[str]:
        """The command that makes a video twice as large."""
        return _words(
            "upscale", self.folder / "small.mp4", "--model", self.folder / "flashvsr" / "FlashVSR1_1.safetensors",
            "--output", output, "--device", "cpu", "--seed", 1, "--sparse-ratio", 0.1, "--local-range", 9,
            "--kept-windows", 2, *more,
        )  # fmt: skip

    def convert(self, target: Path, kind: str = "fp8") -> list[str]:
        """The command that writes a quantised copy."""
        return _words("convert", self.large, target, "--to", kind, "--device", "cpu")


def make_files(folder: Path) -> Files:
    """All of them, in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_encoders(folder, TEXT_DIM)
    save_framepack(folder / "framepack.safetensors", CONFIG)
    vae = randomize(HunyuanVAE(VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=8)))
    save_file({name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, folder / "hyvae.safetensors")
    pixels = np.random.default_rng(1).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / "girl.png")
    save_files(folder, experts=True)
    save_flashvsr(folder / "flashvsr")
    with VideoWriter(folder / "small.mp4", 16) as writer:
        writer.write(small_video(SMALL_FRAMES, SMALL_SIDE, SMALL_SIDE))
    files = Files(folder)
    save_wan(files.picture_model, "i2v")
    large = randomize(WanModel(replace(CONFIGS["t2v"], dim=512, ffn_dim=2048, num_heads=4, num_layers=16)))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in large.state_dict().items()}
    save_file(tensors, files.large)
    save_file({name: -tensor for name, tensor in tensors.items()}, files.other_large)
    return files


def _words(*words: Any) -> list[str]:
    return [str(word) for word in words]


# --- what was made ---------------------------------------------------------------------------------------


def frames_of(video: Path) -> tuple[str, int]:
    """A hash of its decoded frames, and how many of WIDTH x HEIGHT they are; ("", 0) where nothing plays."""
    if not video.is_file():
        return "", 0
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video), "-f", "rawvideo", "-pix_fmt", "rgb24"]
    pixels = subprocess.run([*command, "-"], capture_output=True, check=False).stdout
    return hashlib.sha256(pixels).hexdigest(), len(pixels) // (WIDTH * HEIGHT * 3)


def tensors_of(path: Path) -> str:
    """A hash of a safetensors file's tensors: the order of its header is another in every process."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + str((tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def left_beside(folder: Path, wanted: set[str]) -> list[str]:
    """Files of a folder that should not be there."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(found - wanted)
