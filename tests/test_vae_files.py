"""The one way to build a VAE, and the one table of tiles."""

from itertools import pairwise

import pytest
import torch
from lowvram_video.memory.plan.tiles import TILES, fitting_tile, smaller_tiles
from lowvram_video.vae.files import runs_channels_last, to_channels_last


@pytest.mark.parametrize(
    ("device", "dtype", "hip", "wanted"),
    [
        ("cuda", torch.bfloat16, None, True),
        ("cuda:1", torch.float16, None, True),
        ("cuda", torch.float32, None, False),
        ("cuda", torch.bfloat16, "6.2", False),
        ("cpu", torch.bfloat16, None, False),
    ],
)
def test_convolutions_are_channels_last_where_cudnn_runs_them_in_half_precision(device, dtype, hip, wanted):
    assert runs_channels_last(torch.device(device), dtype, hip) is wanted


def test_only_weights_of_convolutions_are_laid_out():
    for shape in ((8, 4, 3, 3), (8, 4, 3, 3, 3)):
        weight = torch.randn(shape)
        assert to_channels_last(weight).stride(1) == 1 and torch.equal(to_channels_last(weight), weight)
    matrix = torch.randn(8, 4)
    assert to_channels_last(matrix) is matrix


def test_the_largest_tile_that_fits():
    assert fitting_tile(832, lambda tile: tile or 832, 900) == 0
    assert fitting_tile(832, lambda tile: tile or 832, 800) == 768
    assert fitting_tile(832, lambda tile: tile or 832, 127) is None


@pytest.mark.parametrize("side", [1280, 832, 1024, 512, 160, 128])
def test_retries_shrink_to_the_smallest_tile(side):
    sizes = smaller_tiles(side)
    assert set(sizes) <= set(TILES) and all(small < large for large, small in pairwise((side, *sizes)))
    assert (sizes[-1:] or (side,)) == (128,)
    assert all(4 * small <= 3 * large for large, small in pairwise(sizes[:-1]))
