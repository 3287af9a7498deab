"""Decoded frames that are no numbers are told at the end of a decoding, whatever way it goes; black ones are right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lowvram_video.framepack.vae import decoding
from lowvram_video.framepack.vae.decoding import DecodeBudget, decode_section
from lowvram_video.framepack.vae.model import HUNYUAN_VAE, HunyuanVAE
from lowvram_video.vae.frame_watch import BadFrames, FrameWatch
from lowvram_video.vae.strips import Strips
from lowvram_video.vae.tiling import WHOLE, Tile, decode_in
from lowvram_video.vae.tiny import TINY_16, TinyVAE
from lowvram_video.video.pictures import to_levels
from lowvram_video.wanvideo.vae.model import WanVAE
from torch import Tensor

from .test_vae_cards import on
from .test_vae_strips import TINY, random_latent, tiny

NO_NUMBERS = r"{}: decoded frames have NaN or infinite numbers: likely damaged weights \(download .* again\)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_of_all_numbers_is_seen(dtype: torch.dtype) -> None:
    decoder = SimpleNamespace(config=TINY_16, dtype=dtype)
    watch = FrameWatch(decoder)
    for frames in (torch.zeros(1, 3, 2, 4, 4), torch.full((1, 3, 1, 4, 2), -1.0), torch.rand(1, 3, 1, 4, 4) * 6e4):
        watch.see(frames.to(dtype))
    watch.end()
    for value in (math.nan, math.inf, -math.inf):
        spoiled, watch = torch.rand(1, 3, 2, 5, 7).to(dtype), FrameWatch(decoder)
        spoiled[0, 1, 1, 4, 6] = value
        for frames in (torch.zeros(3, dtype=dtype), spoiled, torch.ones(2, dtype=dtype)):
            assert watch.over(lambda piece: piece)(frames) is frames
        with pytest.raises(BadFrames) as raised:
            watch.end()
        assert ("fp16, whose numbers end at 65504" in str(raised.value)) == (dtype == torch.float16)


@pytest.fixture(scope="module", params=[math.nan, math.inf])
def spoiled(request: pytest.FixtureRequest) -> WanVAE:
    """Whose last convolution has a bias that is none."""
    vae = tiny(TINY["2.1"])
    vae.decoder.head[2].bias[1] = request.param
    return vae


@pytest.mark.parametrize("finish", [None, to_levels])
@pytest.mark.parametrize("way", [WHOLE, Strips(12), Tile(16)], ids=str)
def test_wans_decoder_in_every_way(spoiled: WanVAE, way: Strips | Tile, finish: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(BadFrames, match=NO_NUMBERS.format("Wan 2.1")):
        list(decode_in(spoiled, random_latent(spoiled, 2, 4, 2), way, finish=finish))


def test_wans_decoder_on_two_cards(spoiled: WanVAE) -> None:
    with pytest.raises(BadFrames, match=NO_NUMBERS.format("Wan 2.1")):
        on(2, spoiled, random_latent(spoiled, 2, 4, 2), 12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", [WHOLE, Tile(16)], ids=str)
def test_a_draft(way: Tile, value: float) -> None:
    vae = TinyVAE(replace(TINY_16, widths=(16, 12, 8, 8)))
    vae.decoder[22].bias[0] = value
    with pytest.raises(BadFrames, match=NO_NUMBERS.format(re.escape(TINY_16.name))):
        list(decode_in(vae, torch.zeros(1, 16, 1, 2, 3), way))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("room", [None, DecodeBudget(decoding.HEADROOM_BYTES + 16 << 20, 1 << 30), DecodeBudget(0)])
def test_a_section(room: DecodeBudget | None, value: float) -> None:
    vae = HunyuanVAE(replace(HUNYUAN_VAE, block_out_channels=(8, 8, 8, 8), num_groups=4, layers_per_block=1))
    vae.decoder.conv_out.conv.bias[2] = value
    with pytest.raises(BadFrames, match=NO_NUMBERS.format("HunyuanVideo")):
        decode_section(vae, torch.zeros(1, 16, 1, 4, 2), room)
