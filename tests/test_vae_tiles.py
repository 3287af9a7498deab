"""Tiled encoding and decoding: the arithmetic of tiles, equality with the untiled result, and the callback."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.vae.tiles import cut, plan_grid
from lowvram_video.vae.tiling import Tile, decode_tiled, encode_fitting, encode_tiled
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WAN22_VAE, WanVAE


@pytest.fixture(scope="module", params=[WAN21_VAE, WAN22_VAE], ids=lambda config: config.name)
def vae(request: pytest.FixtureRequest) -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(replace(request.param, encoder_dim=8, decoder_dim=8))


def random_latent(vae: WanVAE, num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, vae.config.z_dim, num_frames, height, width, generator=generator)


def random_video(num_frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, num_frames, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def untiled(vae: WanVAE, latent: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(vae.decode_pieces(latent)), dim=2)


# --- arithmetic ------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 60), length=st.integers(1, 40), overlap=st.integers(0, 39), scale=st.sampled_from([1, 8]))
def test_tiles_cover_overlap_and_sum_to_one(size, length, overlap, scale):
    if overlap >= length:
        return
    side = cut(size, length, overlap)
    assert side.starts[0] == 0
    assert side.starts[-1] + side.length == size
    for before, after in zip(side.starts, side.starts[1:], strict=False):
        assert before < after <= before + side.length - overlap
    total = torch.zeros(size * scale)
    weights = side.weights(scale)
    for index in range(len(side.starts)):
        total[side.window(index, scale)] += weights[index]
    assert (weights > 0).all()
    assert (total - 1).abs().max() < 1e-6


def test_two_tiles_meet_in_a_linear_ramp():
    left, right = cut(12, 8, 4).weights()
    ramp = torch.tensor([0.125, 0.375, 0.625, 0.875])
    assert torch.allclose(right, torch.cat([ramp, torch.ones(4)]))
    assert torch.allclose(left, torch.cat([torch.ones(4), ramp.flip(0)]))


def test_no_more_tiles_than_needed():
    assert cut(90, 32, 8).starts == (0, 19, 38, 58)
    assert cut(32, 32, 8).starts == (0,)
    assert cut(56, 32, 8).starts == (0, 24)


def test_a_tile_larger_than_the_video_is_the_video():
    grid = plan_grid(4, 6, tile=512, overlap=64, stride=8)
    assert grid.num_tiles == 1
    assert torch.equal(grid.weights((0, 0), 8), torch.ones(32, 48))


@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (64, 64), (64, 60), (64, -8)])
def test_an_impossible_tile_is_refused_with_the_fix(tile, overlap):
    with pytest.raises(ValueError, match=f"a tile of {tile} pixels that overlaps by {overlap}.*Try"):
        plan_grid(32, 32, tile, overlap, stride=8)


# --- video -----------------------------------------------------------------------------------------------


def test_one_tile_equals_untiled_exactly(vae):
    latent = random_latent(vae, 3, 3, 4)
    assert torch.equal(decode_tiled(vae, latent, Tile(512)), untiled(vae, latent))
    stride = vae.config.spatial_stride
    video = random_video(9, 2 * stride, 3 * stride)
    assert torch.equal(encode_tiled(vae, video, Tile(512)), vae.encode(video))


def test_every_tile_is_decoded_over_its_whole_time(vae):
    """Without overlap each tile is what decoding its latent alone gives, in every frame."""
    stride = vae.config.spatial_stride
    latent = random_latent(vae, 3, 4, 6)
    video = decode_tiled(vae, latent, Tile(2 * stride, overlap=0))
    for y in (0, 2):
        for x in (0, 2, 4):
            alone = untiled(vae, latent[..., y : y + 2, x : x + 2])
            assert torch.equal(video[..., y * stride : (y + 2) * stride, x * stride : (x + 2) * stride], alone)


def test_tiles_are_blended_by_their_weights(vae):
    stride = vae.config.spatial_stride
    latent = random_latent(vae, 2, 2, 6)
    video = decode_tiled(vae, latent, Tile(4 * stride, overlap=2 * stride))
    left, right = untiled(vae, latent[..., :4]), untiled(vae, latent[..., 2:])
    ramp = (torch.arange(2 * stride) + 0.5) / (2 * stride)
    middle = left[..., 2 * stride :] * (1 - ramp) + right[..., : 2 * stride] * ramp
    expected = torch.cat([left[..., : 2 * stride], middle, right[..., 2 * stride :]], dim=-1)
    error = (video - expected).abs().max().item()
    print(f"{vae.config.name} blended tiles: max error {error:.1e}")
    assert error < 1e-5


def test_encoded_tiles_are_those_of_their_pixels(vae):
    stride = vae.config.spatial_stride
    video = random_video(5, 2 * stride, 4 * stride)
    latent = encode_tiled(vae, video, Tile(2 * stride, overlap=0))
    assert latent.shape == (1, vae.config.z_dim, 2, 2, 4)
    assert torch.equal(latent[..., :2], vae.encode(video[..., : 2 * stride]))
    assert torch.equal(latent[..., 2:], vae.encode(video[..., 2 * stride :]))


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_video_that_the_device_does_not_hold_is_encoded_in_strips(vae, failures, monkeypatch, caplog):
    video = random_video(5, 64, 256)
    want = vae.encode(video)
    tries = []

    def trying(real):
        def encode(*given):
            tries.append(str(given[-1]) if len(given) > 1 else "whole")
            if len(tries) <= failures:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return real(*given)

        return encode

    monkeypatch.setattr(vae, "encode", trying(vae.encode))
    monkeypatch.setattr(vae, "encode_strips", lambda *given: trying(WanVAE.encode_strips)(vae, *given[:2]))
    got = encode_fitting(vae, video)
    assert got.device.type == "cpu" and got.dtype == torch.float32
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    ways = ["whole", *(f"in strips of {rows} rows, with their borders in RAM" for rows in (32, 16))]
    assert tries == ways[: failures + 1]
    assert caplog.text.count("out of VRAM while encoding 5 frames") == failures
    assert all(f"next {way}" in caplog.text for way in ways[1 : failures + 1])


def test_tiles_are_the_last_resort(vae, monkeypatch, caplog):
    """Where neither whole frames nor strips fit."""
    video = random_video(5, 64, 256)
    want = encode_tiled(vae, video, Tile(128))
    real = vae.encode

    def encode(pixels):
        if pixels.shape[-1] > 128:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(pixels)

    def no_strips(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(vae, "encode", encode)
    monkeypatch.setattr(vae, "encode_strips", no_strips)
    assert torch.equal(encode_fitting(vae, video), want)
    assert "next in tiles of 128 pixels" in caplog.text


def test_a_video_that_no_tile_fits_ends_in_the_devices_error(vae, monkeypatch):
    def encode(pixels):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(vae, "encode", encode)
    monkeypatch.setattr(vae, "encode_strips", lambda *given: encode(given))
    stride = vae.config.spatial_stride
    with pytest.raises(torch.cuda.OutOfMemoryError):
        encode_fitting(vae, random_video(5, 2 * stride, 2 * stride))


def test_a_half_precision_vae_gives_half_precision_video():
    vae = WanVAE(replace(WAN21_VAE, encoder_dim=4, decoder_dim=4), dtype=torch.bfloat16)
    latent = random_latent(vae, 2, 4, 4)
    video = decode_tiled(vae, latent, Tile(256))
    assert video.dtype == torch.float16
    assert torch.equal(video, untiled(vae, latent).to(torch.float16))
    white = vae.decoder.head[2]
    white.weight.zero_()
    white.bias.fill_(1.0)
    assert (decode_tiled(vae, latent, Tile(24, overlap=8)) - 1.0).abs().max() <= 0.001


def test_progress_counts_chunks_and_may_stop(vae):
    calls: list[tuple[int, int]] = []
    stride = vae.config.spatial_stride
    decode_tiled(vae, random_latent(vae, 2, 2, 3), Tile(2 * stride, overlap=stride), lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]

    class Stop(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        decode_tiled(vae, random_latent(vae, 2, 2, 3), Tile(2 * stride, overlap=stride), stop)


def test_wrong_latents_and_videos_are_refused(vae):
    with pytest.raises(ValueError, match="channels"):
        decode_tiled(vae, torch.zeros(1, 5, 1, 4, 4), Tile(64))
    with pytest.raises(ValueError, match="frames"):
        encode_tiled(vae, random_video(4, 32, 32), Tile(64))
