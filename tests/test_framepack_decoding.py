"""How a section is decoded in little memory: the most exact way that fits, and what falls back to what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lowvram_video.framepack.vae import decoding
from lowvram_video.framepack.vae.decoding import DecodeBudget, DecodeWay, decode_section, decode_ways
from lowvram_video.framepack.vae.model import HUNYUAN_VAE, HunyuanVAE, decode_footprint
from lowvram_video.video.pictures import to_uint8
from torch import Tensor

GIB = 2**30
FULL = HunyuanVAE(device="meta", dtype=torch.bfloat16)
SECTION = torch.empty(1, 16, 18, 608 // 8, 640 // 8)


@pytest.fixture(scope="module")
def tiny() -> HunyuanVAE:
    config = replace(HUNYUAN_VAE, block_out_channels=(8, 8, 8, 8), num_groups=4, layers_per_block=1)
    vae = HunyuanVAE(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return vae


def test_a_large_card_decodes_whole() -> None:
    assert decode_ways(FULL, SECTION, None) == [DecodeWay()]
    assert decode_ways(FULL, SECTION, DecodeBudget(24 * GIB))[0] == DecodeWay()


def test_a_small_card_keeps_clips_in_host_memory_where_there_is_some() -> None:
    assert decode_ways(FULL, SECTION, DecodeBudget(3 * GIB, 32 * GIB))[0] == DecodeWay(spill=True)


def test_else_it_takes_tiles_over_the_whole_time() -> None:
    ways = decode_ways(FULL, SECTION, DecodeBudget(3 * GIB))
    assert ways[0].tile.pixels >= 256 and ways[0].tile.latents is None
    tiles = [way.tile.pixels for way in ways if way.tile.latents is None]
    assert tiles == sorted(tiles, reverse=True)
    assert decode_ways(FULL, SECTION, DecodeBudget(GIB // 2))[0].tile.latents == 16


@torch.inference_mode()
def test_every_way_gives_the_video(tiny: HunyuanVAE) -> None:
    latents = torch.randn(1, 16, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    want = to_uint8(tiny.decode(latents))
    assert torch.equal(decode_section(tiny, latents), want)
    spilled = decode_section(tiny, latents, DecodeBudget(decoding.HEADROOM_BYTES + 16 << 20, GIB))
    assert torch.equal(spilled, want)
    tiled = decode_section(tiny, latents, DecodeBudget(0))
    error = float((tiled.float() - want.float()).abs().mean() / want.float().std())
    print(f"tiles of 256 pixels: mean error {error:.2f} of the deviation")
    assert tiled.shape == want.shape and error < 1.0


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, MemoryError])
@torch.inference_mode()
def test_running_out_of_memory_is_answered_by_the_next_way(
    tiny: HunyuanVAE, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(1, 16, 2, 40, 24)
    tried = []
    real = decoding._decode

    def failing(vae: HunyuanVAE, latents: Tensor, way: DecodeWay, *rest: object) -> Tensor:
        tried.append(way)
        if len(tried) < 3:
            raise error("pretended")
        return real(vae, latents, way, *rest)

    monkeypatch.setattr(decoding, "_decode", failing)
    size = decode_footprint(tiny.config, 2, 320, 192, 4).total_bytes
    frames = decode_section(tiny, latents, DecodeBudget(size + decoding.HEADROOM_BYTES, GIB))
    assert frames.shape == (5, 320, 192, 3)
    assert tried[0] == DecodeWay() and tried[1].spill and tried[2].tile.pixels
