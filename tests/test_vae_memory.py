"""What a VAE does when the device runs out of memory, whichever library says so: loading, encoding, decoding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.framepack.pipeline import FramePackFiles, FramePackPipeline
from lowvram_video.framepack.vae.checkpoint import HUNYUAN_FORMAT
from lowvram_video.framepack.vae.decoding import DecodeBudget, decode_section
from lowvram_video.framepack.vae.model import HunyuanVAE, VAEConfig
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.vae.tiling import encode_fitting
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WanVAE
from lowvram_video.weights.files.checkpoint import Checkpoint
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from .tiny import randomize, save_files, save_vae
from .tiny_framepack import save_framepack

ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
all_errors = pytest.mark.parametrize("error", ERRORS, ids=["allocator", "cuDNN", "cuBLAS"])
REQUEST = WanRequest("a red ball", width=160, height=32, num_frames=9, num_steps=1)


def tiny_hunyuan() -> HunyuanVAE:
    vae = HunyuanVAE(VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4))
    randomize(vae)
    return vae


def failing_once(real: Callable[..., Tensor], error: Exception) -> Callable[..., Tensor]:
    """The method, which raises the error instead when it is called first."""
    left = [error]

    def method(*args: object, **named: object) -> Tensor:
        if left:
            raise left.pop()
        return real(*args, **named)

    return method


def failing_at_the_third_latent(error: Exception) -> Callable[..., Iterator[Tensor]]:
    decode, left = WanVAE.decode_pieces, [error]

    def method(vae: WanVAE, latent: Tensor) -> Iterator[Tensor]:
        for index, frames in enumerate(decode(vae, latent)):
            if left and index == 2:
                raise left.pop()
            yield frames

    return method


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[WanFiles, Tensor]:
    """Files, and the frames of the request by them."""
    files = save_files(tmp_path_factory.mktemp("wan"))
    return files, torch.cat(list(WanPipeline(files, RunSettings()).generate(REQUEST)))


@all_errors
def test_frames_that_are_missing_are_decoded_again(
    made: tuple[WanFiles, Tensor], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    files, want = made
    monkeypatch.setattr(WanVAE, "decode_pieces", failing_at_the_third_latent(error))
    got = torch.cat(list(WanPipeline(files, RunSettings()).generate(REQUEST)))
    assert got.shape == want.shape and torch.equal(got[:5], want[:5])


@all_errors
def test_a_start_image_is_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    files = save_files(tmp_path, "ti2v")
    Image.new("RGB", (256, 64), "red").save(tmp_path / "red.png")
    request = replace(REQUEST, width=256, height=64, num_frames=5, image=tmp_path / "red.png")
    monkeypatch.setattr(WanVAE, "encode", failing_once(WanVAE.encode, error))
    assert sum(len(frames) for frames in WanPipeline(files, RunSettings()).generate(request)) == 5


def test_a_vae_that_finds_no_room_leaves_nobody_reading_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the error is known, and with it the frames that it came through."""
    opened = WAN_FORMAT.open_file(save_vae(tmp_path / "vae.safetensors"))
    read: list[Tensor] = []
    to = Tensor.to

    def full(tensor: Tensor, *args: Any, **named: Any) -> Tensor:
        read.extend([] if tensor.is_meta else [tensor])
        if len(read) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return to(tensor, *args, **named)

    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(torch.cuda.OutOfMemoryError) as error:
        opened.build(torch.float32, torch.device("cpu"), "decoder")
    assert error.value.__traceback__ is not None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vae-reader")]


@all_errors
def test_a_vae_that_finds_no_room_on_the_device_is_loaded_again(
    made: tuple[WanFiles, Tensor], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """In `Checkpoint.read`, as what is read goes to the device at once."""
    (files, want), left = made, [error]
    read = Checkpoint.read

    def scarce(checkpoint: Checkpoint, name: str) -> Tensor:
        if checkpoint.path == files.vae and name.startswith("decoder.") and left:
            raise left.pop()
        return read(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "read", scarce)
    assert torch.equal(torch.cat(list(WanPipeline(files, RunSettings()).generate(REQUEST))), want)


@all_errors
def test_framepacks_decoder_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    latents = torch.randn(1, 16, 3, 4, 6)
    save_framepack(tmp_path / "framepack.safetensors")
    save_file(
        {name: each.contiguous() for name, each in tiny_hunyuan().state_dict().items()}, tmp_path / "vae.safetensors"
    )
    pipeline = FramePackPipeline(FramePackFiles(tmp_path / "framepack.safetensors", tmp_path / "vae.safetensors"))
    want = decode_section(
        HUNYUAN_FORMAT.open_file(tmp_path / "vae.safetensors").build(torch.float32, torch.device("cpu")), latents
    )
    read, left = Checkpoint.read, [error]

    def scarce(checkpoint: Checkpoint, name: str) -> Tensor:
        if checkpoint.path == tmp_path / "vae.safetensors" and left:
            raise left.pop()
        return read(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "read", scarce)
    with pipeline.running(1), pipeline.decoder(latents) as (vae, room):
        assert torch.equal(decode_section(vae, latents, room), want)
    assert not left


@all_errors
def test_a_wan_video_is_encoded_in_tiles(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    torch.manual_seed(0)
    vae = WanVAE(replace(WAN21_VAE, encoder_dim=8, decoder_dim=8))
    video = torch.rand(1, 3, 1, 32, 256) * 2 - 1
    monkeypatch.setattr(vae, "encode", failing_once(vae.encode, error))
    assert encode_fitting(vae, video).shape == (1, 16, 1, 4, 32)


@all_errors
def test_a_framepack_clip_is_encoded_in_tiles(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    vae = tiny_hunyuan()
    monkeypatch.setattr(vae, "encode", failing_once(vae.encode, error))
    assert encode_fitting(vae, torch.rand(1, 3, 1, 32, 256) * 2 - 1).shape == (1, 16, 1, 4, 32)


@all_errors
def test_a_section_is_decoded_in_tiles(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    vae = tiny_hunyuan()
    monkeypatch.setattr(vae, "decode", failing_once(vae.decode, error))
    assert decode_section(vae, torch.randn(1, 16, 1, 4, 40), DecodeBudget(1 << 30)).shape == (1, 32, 320, 3)
