"""Clips of moving shapes for the demo model, drawn on the fly from signed distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .captions import COLOURS, DIRECTIONS, PLACES, SHAPES, SPEEDS, Caption

RADIUS = 0.15  # of a ball, as a fraction of the frame's side
RADIUS_JITTER = 0.10
TRAVEL_JITTER = 0.02
COLOUR_JITTER = 0.03
MARGIN = 0.03

# Every size below is in units of `radius`; chosen so that the three look equally large.
_SQUARE_HALF = 0.92
_TRIANGLE_CIRCUMRADIUS = 1.45
_HALF_SQRT3 = 0.75**0.5
# How far each shape reaches from its centroid: to the side, up, down.
_REACH = {
    "ball": (1.0, 1.0, 1.0),
    "square": (_SQUARE_HALF, _SQUARE_HALF, _SQUARE_HALF),
    "triangle": (
        _TRIANGLE_CIRCUMRADIUS * _HALF_SQRT3,
        _TRIANGLE_CIRCUMRADIUS,
        _TRIANGLE_CIRCUMRADIUS / 2,
    ),
}
UNIT_AREAS = {
    "ball": torch.pi,
    "square": (2 * _SQUARE_HALF) ** 2,
    "triangle": 1.5 * _HALF_SQRT3 * _TRIANGLE_CIRCUMRADIUS**2,
}


@dataclass(frozen=True)
class ClipSize:
    """Frames and pixels of a clip."""

    num_frames: int = 17
    height: int = 96
    width: int = 96


@dataclass(frozen=True)
class Scenes:
    """N clips as numbers; lengths and positions are fractions of the frame's side, y points down."""

    shape: Tensor  # [N] index into SHAPES
    colour: Tensor  # [N, 3]
    background: Tensor  # [N, 2, 3] top and bottom edge
    radius: Tensor  # [N]
    start: Tensor  # [N, 2] centroid (x, y) in the first frame
    end: Tensor  # [N, 2] and in the last

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def draw_scenes(captions: Sequence[Caption], generator: torch.Generator) -> Scenes:
    """Chooses what the captions leave open (place of the path, size, shade) from `generator`, a CPU one.

    The object stays inside the frame for the whole clip.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    num = len(captions)
    radius = RADIUS * (1 + RADIUS_JITTER * (2 * uniform(num) - 1))
    colour = torch.tensor([COLOURS[c.colour] for c in captions]) + COLOUR_JITTER * (2 * uniform(num, 3) - 1)
    reach = torch.tensor([_REACH[c.shape] for c in captions])
    low = radius[:, None] * reach[:, :2] + MARGIN
    high = 1 - radius[:, None] * reach[:, [0, 2]] - MARGIN
    distance = torch.tensor([SPEEDS[c.speed] for c in captions]) + TRAVEL_JITTER * (2 * uniform(num) - 1)
    travel = torch.tensor([DIRECTIONS[c.direction] for c in captions]) * distance[:, None]
    # The middle of the path is drawn so that both of its ends stay between `low` and `high`.
    half = travel.abs() / 2
    middle = low + half + (high - low - 2 * half) * uniform(num, 2)
    return Scenes(
        shape=torch.tensor([SHAPES.index(c.shape) for c in captions]),
        colour=colour.clamp(0, 1),
        background=torch.tensor([PLACES[c.place] for c in captions]),
        radius=radius,
        start=middle - travel / 2,
        end=middle + travel / 2,
    )


def render_clips(scenes: Scenes, size: ClipSize) -> Tensor:
    """Draws the scenes antialiased on their device: [N, 3, T, H, W] in 0..1."""
    device = scenes.colour.device
    time = torch.linspace(0, 1, size.num_frames, device=device)
    x = (torch.arange(size.width, device=device) + 0.5) / size.width
    y = (torch.arange(size.height, device=device) + 0.5) / size.height
    centre = torch.lerp(scenes.start[:, None], scenes.end[:, None], time[None, :, None])  # [N, T, 2]
    offset_x = x[None, None, None, :] - centre[:, :, 0, None, None]
    offset_y = y[None, None, :, None] - centre[:, :, 1, None, None]
    radius = scenes.radius[:, None, None, None]
    distances = [signed_distance(name, offset_x, offset_y, radius) for name in SHAPES]
    index = scenes.shape[:, None, None, None]
    distance = distances[0]
    for position, other in enumerate(distances[1:], start=1):
        distance = torch.where(index == position, other, distance)
    coverage = (0.5 - distance * min(size.height, size.width)).clamp(0, 1)[:, None]  # [N, 1, T, H, W]
    top, bottom = scenes.background.unbind(1)
    background = torch.lerp(top[:, :, None], bottom[:, :, None], y)[:, :, None, :, None]
    return torch.lerp(background, scenes.colour[:, :, None, None, None], coverage)


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Distance to the outline of a shape centred on its centroid, negative inside; all in the same unit."""
    if shape == "ball":
        return torch.sqrt(x * x + y * y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - _SQUARE_HALF * radius
    # An upright equilateral triangle is where its three edges' half planes meet.
    inradius = _TRIANGLE_CIRCUMRADIUS * radius / 2
    return torch.maximum(y, x.abs() * _HALF_SQRT3 - y / 2) - inradius
