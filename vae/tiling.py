"""The ways to encode and decode: whole frames, exact strips of them, and tiles of space and time.

The Wan autoencoders are exact in strips of rows. Their tiles are of space alone, as time costs them little memory, and
are the last resort: neighbours are blended, where a strip knows its neighbours.

HunyuanVideo's is not exact in tiles: its group norms and its attention see the tile instead of the clip, and a
temporal tile lacks the frames before it. Mean difference from the untiled video over its standard deviation, with the
released dimensions, random weights, 69 frames of 640x608 and latents that are smooth over 3 to 12 positions: 0.015 to
0.019 in tiles of 512 pixels over the whole time, 0.022 to 0.044 in those of 256, 0.072 with temporal tiles of 16 too
(benchmarks/results/decode_parts_h200_2026-11-29.json). Learned weights are not measured. The bound that the tests hold
is 1. Where host memory is there, `HunyuanVAE.decode` with a `FrameStore` takes less of the device
than these tiles and is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..memory.plan.tiles import smaller_tiles, thinner_strips
from ..memory.stream.pinned import Registrar
from .checks import VaeConfig, check_latent, check_video
from .frame_watch import FrameWatch
from .outbox import Finish, in_ram
from .retries import MakeRoom, empty_cache, first_fitting
from .strips import Strips
from .tiles import Cut, Grid, cut, plan_grid

OnChunk = Callable[[int, int], None]  # (parts done, parts in all); may raise to stop

OVERLAP, LATENT_OVERLAP = 64, 4  # pixels, and latent frames


class VideoVae(Protocol):
    """A family's autoencoder on a device."""

    @property
    def config(self) -> VaeConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, video: Tensor) -> Tensor:
        """`video` [B, 3, T, H, W] in [-1, 1] to its latent [B, z, (T-1)//4+1, h, w]."""

    def decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        """Video [B, 3, t, H, W] in about [-1, 1] of `latent` [B, z, T, h, w], in order of time, as it is made."""

    def num_pieces(self, num_latents: int) -> int:
        """How many pieces of video come of so many latent frames."""


@runtime_checkable
class StripVae(VideoVae, Protocol):
    """An autoencoder that is exact in strips of rows."""

    def encode_strips(self, video: Tensor, way: Strips, on_chunk: OnChunk | None = None) -> Tensor:
        """As `encode`."""

    def decode_strips(
        self, latent: Tensor, way: Strips, finish: Finish, into: Tensor | None = None, on_chunk: OnChunk | None = None
    ) -> Iterator[Tensor]:
        """As `decode_pieces`, each piece `finish`ed, on the CPU, and part of `into` where given."""


@dataclass(frozen=True)
class Tile:
    """A part of a video that is coded at a time: `pixels` a side (0: whole frames), `latents` of time (None: all).

    A temporal tile is a latent frame to begin with and at most `latents` further ones. Tiles share at least `overlap`
    pixels (None: 64, at most half of the tile) and `latent_overlap` latent frames. Pixels are rounded to whole latent
    positions: the tile down, the overlap up.
    """

    pixels: int = 0
    latents: int | None = None
    overlap: int | None = None
    latent_overlap: int = LATENT_OVERLAP

    def __str__(self) -> str:
        space = f"in tiles of {self.pixels} pixels" if self.pixels else "whole"
        return space + ("" if self.latents is None else f", {self.latents} latents of time at once")

    @property
    def shared_pixels(self) -> int:
        return min(OVERLAP, self.pixels // 2) if self.overlap is None else self.overlap


WHOLE = Tile()
LAST_TILES = (256, 128)  # of a VAE that has strips: what is left to try

Way = Tile | Strips


def retry_ways(vae: VideoVae, failed: Way, size: tuple[int, int], registrar: Registrar | None = None) -> list[Way]:
    """What to try in turn after a way that did not fit, for pictures of `size` (height, width).

    Of a VAE that is exact in strips those, thinner and thinner, whose borders wait in RAM, pinned by `registrar`, and
    only then tiles; of another one smaller tiles.
    """
    height, width = size
    if not isinstance(vae, StripVae):
        side = failed.pixels if isinstance(failed, Tile) and failed.pixels else max(size)
        return list(retry_tiles(vae.config, min(side, max(size))))
    if isinstance(failed, Strips):
        rows, smallest = failed.rows, max(size)
    else:  # strips with the pixels of the tile
        smallest = min(failed.pixels or max(size), max(size))
        rows = height if smallest == max(size) else min(height, smallest**2 // width)
    strips = [Strips(thinner, True, registrar) for thinner in thinner_strips(rows)]
    if isinstance(failed, Strips) and not failed.in_ram:  # what waits between strips of this height leaves first
        strips = [Strips(rows, True, registrar), *strips]
    return [*strips, *(Tile(pixels) for pixels in LAST_TILES if pixels < smallest)]


def retry_tiles(config: VaeConfig, side: int) -> tuple[Tile, ...]:
    """What to try in turn after tiles (or whole frames) of `side` pixels over the whole time did not fit."""
    over_all_time = tuple(Tile(pixels) for pixels in smaller_tiles(side))
    if config.latents_at_once is None:
        return over_all_time
    return *over_all_time, Tile(256, config.latents_at_once), Tile(128, config.latents_at_once)


def decode_in(
    vae: VideoVae,
    latent: Tensor,
    way: Way,
    on_chunk: OnChunk | None = None,
    finish: Finish | None = None,
    into: Tensor | None = None,
) -> Iterator[Tensor]:
    """Decode `latent` to pieces [B, 3, t, H, W]: whole frames as they are made, or once all strips or tiles are done.

    `finish` makes of pieces, or rows or frames of them, what is wanted, on the device; they are in RAM then, each
    copied while the next is made, and where `into` [B, 3, T, H, W] is given, parts of that. Without it whole frames
    are on the device. Raises ValueError where the VAE has no strips, and BadFrames, at the end, where some are no
    numbers.
    """
    watch = FrameWatch(vae)
    if isinstance(way, Strips):
        if not isinstance(vae, StripVae):
            raise ValueError(f"the {vae.config.name} VAE cannot be decoded in strips: its norms see whole frames")
        yield from vae.decode_strips(latent, way, watch.over(finish or to_half(vae)), into, on_chunk)
    elif way.latents is not None or 0 < way.pixels < vae.config.spatial_stride * max(latent.shape[3:]):
        video = decode_tiled(vae, latent, way, on_chunk)
        yield video if finish is None else finished(video, finish, into)
    elif finish is None:
        yield from _reported(vae, latent, on_chunk, watch)
    else:
        yield from in_ram(_reported(vae, latent, on_chunk, watch), finish, into)
    watch.end()


def _reported(vae: VideoVae, latent: Tensor, on_chunk: OnChunk | None, watch: FrameWatch) -> Iterator[Tensor]:
    for index, frames in enumerate(vae.decode_pieces(latent)):
        watch.see(frames)
        yield frames
        if on_chunk is not None:
            on_chunk(index + 1, vae.num_pieces(latent.shape[2]))


def to_half(vae: VideoVae) -> Finish:
    """Numbers in which decoded video waits in RAM: their rounding is far below one step of eight-bit colour."""
    dtype = torch.float32 if vae.dtype == torch.float32 else torch.float16
    return lambda piece: piece.to(dtype)


def finished(video: Tensor, finish: Finish, into: Tensor | None = None) -> Tensor:
    """`finish` of every frame of a video [B, 3, T, H, W] on the CPU, in `into` where given."""
    for index in range(video.shape[2]):
        frame = finish(video[:, :, index : index + 1])
        if into is None:
            into = torch.empty(*frame.shape[:2], *video.shape[2:], dtype=frame.dtype)
        into[:, :, index : index + 1] = frame
    assert into is not None
    return into


def decode_tiled(vae: VideoVae, latent: Tensor, tile: Tile, on_chunk: OnChunk | None = None) -> Tensor:
    """Decode `latent` [B, z, T, h, w] tile by tile to video [B, 3, 4(T-1)+1, H, W] in about [-1, 1], on the CPU.

    Every tile is decoded alone; of a temporal one the frame of its first latent is dropped but at the start of the
    video. Neighbours are blended with linear ramps. One tile as large as the video gives exactly what the VAE does.
    The result is float32 for a float32 VAE, else float16, whose rounding is far below one step of eight-bit colour. A
    chunk is one piece of one tile. Raises ValueError for a latent of another VAE or an impossible tile, BadFrames where
    frames are no numbers.
    """
    check_latent(vae.config, latent)
    stride, step = vae.config.spatial_stride, vae.config.temporal_stride
    plan = plan_tiles(latent.shape[2:], tile, stride)
    dtype = torch.float32 if vae.dtype == torch.float32 else torch.float16
    num_frames = (latent.shape[2] - 1) * step + 1
    channels, sides = vae.config.decoded_channels, [side * stride for side in latent.shape[3:]]
    video = torch.zeros(latent.shape[0], channels, num_frames, *sides, dtype=dtype)
    num_done, num_pieces = 0, plan.num_tiles * vae.num_pieces(plan.time.length + 1)
    watch = FrameWatch(vae)
    for place in plan.places():
        weights = plan.grid.weights(place[1:], stride).to(vae.device)
        times = plan.time_weights(place, step).tolist()
        target = video[plan.kept_window(place, step, stride)]
        index = -plan.num_leading(place)
        for frames in vae.decode_pieces(latent[plan.window(place)]):
            watch.see(frames)
            for offset in range(max(0, -index), frames.shape[2]):
                blended = frames[:, :, offset] * (weights * times[index + offset])
                target[:, :, index + offset] += blended.to("cpu", dtype)
            index += frames.shape[2]
            del frames  # or the next tile is decoded beside it
            num_done += 1
            if on_chunk is not None:
                on_chunk(num_done, num_pieces)
    watch.end()
    return video


def encode_fitting(
    vae: VideoVae,
    video: Tensor,
    first: Way = WHOLE,
    on_chunk: OnChunk | None = None,
    make_room: MakeRoom = empty_cache,
    registrar: Registrar | None = None,
) -> Tensor:
    """The latent of `video`, float32 on the CPU; in leaner and leaner ways where the device runs out of memory.

    `registrar` pins the RAM in which borders of strips wait.
    """
    what = f"encoding {video.shape[2]} frame{'s' if video.shape[2] > 1 else ''}"
    ways = [first, *retry_ways(vae, first, (video.shape[3], video.shape[4]), registrar)]
    return first_fitting(ways, lambda way: encode_in(vae, video, way, on_chunk), what, make_room)


def encode_in(vae: VideoVae, video: Tensor, way: Way, on_chunk: OnChunk | None = None) -> Tensor:
    """The latent of `video`, float32 on the CPU. Raises ValueError where the VAE has no strips."""
    if isinstance(way, Strips):
        if not isinstance(vae, StripVae):
            raise ValueError(f"the {vae.config.name} VAE cannot be encoded in strips: its norms see whole frames")
        return vae.encode_strips(video, way, on_chunk).float().cpu()
    if way.pixels:
        return encode_tiled(vae, video, way, on_chunk)
    return vae.encode(video).float().cpu()


def encode_tiled(vae: VideoVae, video: Tensor, tile: Tile, on_chunk: OnChunk | None = None) -> Tensor:
    """Encode `video` [B, 3, T, H, W] in [-1, 1] tile by tile to a latent [B, z, (T-1)//4+1, h, w].

    The latent is float32 on the CPU. Tiles are as in `decode_tiled`; a chunk is one whole tile.
    Raises ValueError for a video that does not fit the VAE or an impossible tile.
    """
    check_video(vae.config, video)
    stride, step = vae.config.spatial_stride, vae.config.temporal_stride
    size = (video.shape[2] - 1) // step + 1, video.shape[3] // stride, video.shape[4] // stride
    plan = plan_tiles(size, tile, stride)
    latent = torch.zeros(video.shape[0], vae.config.latent_channels, *size)
    for number, place in enumerate(plan.places()):
        encoded = vae.encode(video[plan.window(place, step, stride)])[:, :, plan.num_leading(place) :]
        weights = plan.time_weights(place)[:, None, None] * plan.grid.weights(place[1:])
        latent[plan.kept_window(place)] += encoded.float().cpu() * weights
        if on_chunk is not None:
            on_chunk(number + 1, plan.num_tiles)
    return latent


# --- where tiles lie -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TilePlan:
    """Tiles over time and space; a place is (time, row, column).

    `time` cuts the latent frames after the first: a tile's latents are those and the one before them, as its start.
    """

    grid: Grid
    time: Cut

    @property
    def num_tiles(self) -> int:
        return len(self.time.starts) * self.grid.num_tiles

    def places(self) -> list[tuple[int, int, int]]:
        return [(index, *place) for index, place in product(range(len(self.time.starts)), self.grid.places())]

    def num_leading(self, place: tuple[int, int, int]) -> int:
        """Frames (or latent frames) of a tile that come from its start and are dropped."""
        return 0 if place[0] == 0 else 1

    def window(self, place: tuple[int, int, int], step: int = 1, stride: int = 1) -> tuple[slice, ...]:
        """What selects a tile, with its start, from latents (or from video, with the VAE's strides)."""
        time = self.time.window(place[0], step)
        return self._index(slice(time.start, time.stop + 1), place, stride)

    def kept_window(self, place: tuple[int, int, int], step: int = 1, stride: int = 1) -> tuple[slice, ...]:
        """Where the result of a tile belongs, without its start (but at the start of the video)."""
        time = self.time.window(place[0], step)
        return self._index(slice(time.start + self.num_leading(place), time.stop + 1), place, stride)

    def time_weights(self, place: tuple[int, int, int], step: int = 1) -> Tensor:
        """Blending weights of the frames of `kept_window`."""
        weights = self.time.weights(step)[place[0]]
        return weights if place[0] else torch.cat([torch.ones(1), weights])

    def _index(self, time: slice, place: tuple[int, int, int], stride: int) -> tuple[slice, ...]:
        _, rows, columns = self.grid.window(place[1:], stride)
        return slice(None), slice(None), time, rows, columns


def plan_tiles(size: Sequence[int], tile: Tile, stride: int) -> TilePlan:
    """Cut latents of `size` (frames, height, width) into tiles; `stride` is pixels per position."""
    frames, height, width = size
    pixels = tile.pixels or stride * max(height, width)
    grid = plan_grid(height, width, pixels, tile.shared_pixels, stride)
    return TilePlan(grid, plan_time(frames, tile.latents, tile.latent_overlap))


def plan_time(num_latents: int, tile: int | None, overlap: int) -> Cut:
    """Cut the latent frames after the first into the fewest tiles of at most `tile`, equally long.

    Raises ValueError, naming both, when the overlap leaves a tile no room to advance.
    """
    size = num_latents - 1
    if tile is None or tile >= size:
        tile, overlap = max(size, 1), 0
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(
            f"a temporal tile of {tile} latent frames that overlaps by {overlap} cannot be cut: the tile must be at "
            f"least {max(overlap + 1, 1)} and the overlap from 0 to less than the tile. "
            f"Try a tile of 16 and an overlap of {LATENT_OVERLAP}."
        )
    num_tiles = len(cut(size, tile, overlap).starts)
    # Two tiles of 16 over 17 frames would share 15.
    return cut(size, -(-(size + (num_tiles - 1) * overlap) // num_tiles), overlap)
