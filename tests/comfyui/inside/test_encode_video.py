"""Encode Video (Tiled, Low VRAM) beside core's VAE Encode, and tiny decoders beside core's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from lowvram_pack.framepack.vae.model import HUNYUAN_VAE, HunyuanVAE
from lowvram_pack.nodes.bridge import host
from lowvram_pack.nodes.decode import DecodeVideo
from lowvram_pack.nodes.encode import EncodeVideo
from lowvram_pack.vae.tiny import TINY_16, TINY_48, TinyConfig, TinyVAE
from lowvram_pack.wanvideo.vae.blocks import ResidualBlock
from lowvram_pack.wanvideo.vae.model import WanVAE
from test_nodes import random_latent, tiny_vae
from tiny_models import relative_error
from torch import Tensor

import nodes


@pytest.fixture(scope="module")
def vae() -> Any:
    return tiny_vae("2.1")


def pictures(num_frames: int = 9, height: int = 64, width: int = 96, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, channels, num_frames, height // 8 + 1, width // 8 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(num_frames, height, width), mode="trilinear")
    return smooth[0].permute(1, 2, 3, 0)


def encoded(vae: Any, images: Tensor, tile: int = 0) -> Tensor:
    return EncodeVideo.execute(images, vae, tile).result[0]["samples"]


# --- encoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [pictures(), pictures(1), pictures(8), pictures(5, 75, 100), pictures(5, channels=4)],
    ids=["video", "picture", "8 frames", "odd sides", "transparency"],
)
def test_the_latent_is_cores(vae: Any, images: Tensor) -> None:
    want = nodes.VAEEncode().encode(vae, images)[0]["samples"]
    got = encoded(vae, images)
    assert got.shape == want.shape and got.std() > 0.05
    error = relative_error(got, want)
    print(f"encode: relative error to core's {error:.2e}")
    assert error < 2e-3


@pytest.mark.parametrize("images", [pictures()[:0], pictures()[0]], ids=["none", "three dimensions"])
def test_what_is_no_video_is_told(vae: Any, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the pictures are \[.*\]; expected \[frames, height, width, channels\]"):
        encoded(vae, images)


def test_framepacks_vae() -> None:
    config = replace(HUNYUAN_VAE, block_out_channels=(8, 8, 8, 8), num_groups=8, layers_per_block=1)
    torch.manual_seed(0)
    network = HunyuanVAE(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    class Native:
        first_stage_model, vae_dtype = network, torch.float32

    images = pictures()
    video = images.movedim(3, 0)[None] * 2 - 1
    want = network.encode(video) / config.scaling_factor
    assert relative_error(encoded(Native(), images), want) < 1e-5
    assert encoded(Native(), images, 32).shape == want.shape


@pytest.mark.newest
def test_tiles_are_seamless_within_their_overlap(vae: Any) -> None:
    images = pictures(5, 192, 192)
    whole, tiled = encoded(vae, images), encoded(vae, images, 128)
    error = relative_error(tiled, whole)
    print(f"encode in tiles of 128: relative difference {error:.2e}")
    assert error < 0.1


@pytest.mark.newest
def test_a_video_that_the_device_does_not_hold_is_encoded_in_strips(
    vae: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, asked = pictures(5, 144, 64), []
    want = encoded(vae, images)

    def scarce(network: WanVAE, video: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(WanVAE, "encode", scarce)
    monkeypatch.setattr(host, "make_room", lambda size, device: asked.append(size))
    assert (encoded(vae, images) - want).abs().max() <= 1e-5
    assert "out of VRAM while encoding 5 frames whole: next in strips of" in caplog.text
    assert len(asked) == 2 and asked[1] >= host.EVERYTHING  # idle models leave before the second way


@pytest.mark.newest
def test_tiles_are_encoded_where_no_strip_fits(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(5, 144, 64)
    want = encoded(vae, images, 128)
    encode = WanVAE.encode

    def no_strips(network: WanVAE, video: Tensor, *rest: Any) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    def small_tiles_only(network: WanVAE, video: Tensor) -> Tensor:
        return encode(network, video) if video.shape[-2] <= 128 else no_strips(network, video)

    monkeypatch.setattr(WanVAE, "encode", small_tiles_only)
    monkeypatch.setattr(WanVAE, "encode_strips", no_strips)
    assert torch.equal(encoded(vae, images), want)


@pytest.mark.parametrize("tile", [0, 32])
def test_an_interrupt_ends_it_at_the_next_frame(vae: Any, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    forward, done = ResidualBlock.forward, []

    def interrupted(block: ResidualBlock, *given: Any, **named: Any) -> Any:
        done.append(block)
        mm.interrupt_current_processing()
        return forward(block, *given, **named)

    monkeypatch.setattr(ResidualBlock, "forward", interrupted)
    with pytest.raises(mm.InterruptProcessingException):
        encoded(vae, pictures(9), tile)
    mm.interrupt_current_processing(False)
    blocks = [block for block in vae.first_stage_model.encoder.modules() if type(block).__name__ == "ResidualBlock"]
    assert 0 < len(done) <= len(blocks)  # of the first frame alone


def test_there_and_back_is_what_core_makes_of_it(vae: Any) -> None:
    images = pictures()
    got = DecodeVideo.execute({"samples": encoded(vae, images)}, vae, 0, 0, False).result[0]
    want = vae.decode(nodes.VAEEncode().encode(vae, images)[0]["samples"])[0]
    assert relative_error(got, want) < 2e-3


@pytest.mark.parametrize(("height", "width", "channels"), [(4, 64, 3), (64, 64, 1)])
def test_pictures_that_cannot_be_encoded_are_said(vae: Any, height: int, width: int, channels: int) -> None:
    with pytest.raises(ValueError, match=rf"{width}x{height} of {channels} channels.*at least 8x8 of 3"):
        encoded(vae, torch.rand(1, height, width, channels))


def test_vaes_that_do_not_encode_are_named() -> None:
    class Other:
        first_stage_model = torch.nn.Conv2d(3, 3, 3)

    for each in (Other(), tiny_decoder(TINY_16, torch.float32)):
        with pytest.raises(ValueError, match=r"needs a Wan or HunyuanVideo VAE.*tiny decoders only decode"):
            encoded(each, pictures())


# --- tiny decoders ---------------------------------------------------------------------------------------


def tiny_decoder(config: TinyConfig, dtype: torch.dtype) -> Any:
    """Core's VAE of a file with random weights, as large as the released ones."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in TinyVAE(config, device="meta").state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        weights[name] = (values * (0.9 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1)).to(dtype)
    core = comfy.taesd.taehv.TAEHV(latent_channels=config.latent_channels)
    weights |= {name: each.to(dtype) for name, each in core.encoder.state_dict(prefix="encoder.").items()}
    return comfy.sd.VAE(sd=weights)


@pytest.mark.parametrize(
    ("config", "dtype", "what"),
    [
        (TINY_16, torch.float16, "taehv"),  # core takes fp16 for HunyuanVideo's, and scales latents
        (TINY_16, torch.bfloat16, "lighttaew2_1"),
        (TINY_48, torch.bfloat16, "lighttaew2_2"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("num_latents", [1, 3])
def test_tiny_decoders_are_cores(config: TinyConfig, dtype: torch.dtype, what: str, num_latents: int) -> None:
    vae = tiny_decoder(config, dtype)
    vae.first_stage_model.to(torch.float32)
    vae.vae_dtype = torch.float32
    latent = random_latent(config.latent_channels, size=(num_latents, 6, 4))
    got = DecodeVideo.execute(latent, vae, 0, 0, False).result[0]
    want = vae.first_stage_model.decode(latent["samples"]).clamp(0, 1)[0].movedim(0, -1)
    assert got.shape == want.shape == (4 * num_latents - 3, 6 * config.spatial_stride, 4 * config.spatial_stride, 3)
    assert want.std() > 0.02
    error = float((got - want).abs().max())
    print(f"{what}: largest difference to core's {error:.1e}")
    assert error < 1e-4


@pytest.mark.newest
def test_a_tiny_decoder_in_tiles() -> None:
    vae = tiny_decoder(TINY_16, torch.bfloat16)
    latent = random_latent(size=(2, 24, 24))
    whole = DecodeVideo.execute(latent, vae, 0, 0, False).result[0]
    tiled = DecodeVideo.execute(latent, vae, 128, 0, False).result[0]
    assert relative_error(tiled, whole) < 0.1


@pytest.mark.newest
def test_lightvae_is_a_narrow_wan_vae() -> None:
    """Three of four channels are pruned everywhere: its shapes say so."""
    vae = tiny_vae("2.1", width=24)
    latent = random_latent()
    got = DecodeVideo.execute(latent, vae, 0, 0, False).result[0]
    assert relative_error(got, vae.decode(latent["samples"])[0]) < 2e-3
    images = pictures()
    assert relative_error(encoded(vae, images), nodes.VAEEncode().encode(vae, images)[0]["samples"]) < 2e-3
