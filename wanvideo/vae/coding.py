"""One encoding or decoding by a Wan VAE: whole frames, each all the way through, or strips of them.

The layers at the latent's size (the middle, whose attention sees a frame, and what is beside it) always have whole
frames: for strips of so few rows cuDNN has other kernels, which are slower and round otherwise. The others see what is
nearby: frames pass them whole where they fit, else in strips of rows over the whole time. Both are the same layers on
the same numbers, so results are the same but for the rounding of other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ...fused.frame_select import select_frame_ops
from ...vae.inbox import Inbox
from ...vae.layouts import lies_channels_last
from ...vae.outbox import Finish, Outbox
from ...vae.recording import Recorder, proven_kinds, select_recorder
from ...vae.strips import Allocate, Pages, Shelf, Strips, aligned, waiting_memory
from .blocks import frames_through, plan_layers
from .rows import Level, StripPlan, cut_alike
from .steps import Give, Make, Steps
from .strip import Rings, Strip

OnChunk = Callable[[int, int], None]  # (parts done, parts in all); may raise to stop


@dataclass(frozen=True)
class Side:
    """Encoder or decoder: its layers, and what is before and behind them.

    `whole` layers see frames of the latent's size, `local` ones run at up to `stride` times that, in folded pixels, of
    which `patch` x `patch` are a position. `enter` makes of a given frame what the first layer sees, `leave` of the
    last layer's result what is wanted.
    """

    whole: Sequence[nn.Module]
    local: Sequence[nn.Module]
    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]
    stride: int
    patch: int
    frames_per_latent: int


class Coding:
    """A pass over video whose latents are [B, z, T, h, w], by a network whose parameters are like `weight`."""

    def __init__(self, side: Side, latent_shape: Sequence[int], weight: Tensor) -> None:
        self.side, self.weight = side, weight
        self.batch, _, self.num_latents, self.height, self.width = latent_shape
        self._ops = select_frame_ops(weight.device, weight.dtype)
        self._channels_last = lies_channels_last(weight)

    @property
    def num_frames(self) -> int:
        return self.frames_of(self.num_latents - 1).stop

    def frames_of(self, latent: int) -> slice:
        """The frames of a latent frame: one of the first."""
        count = self.side.frames_per_latent
        return slice(max(0, (latent - 1) * count + 1), latent * count + 1)

    def rings(self, plan: StripPlan, others: Rings | None = None) -> Rings:
        """The memory of a plan's strips, which is that of `others` where it suffices."""
        return Rings(plan, self.batch, self.weight, self._channels_last, others)

    def strips(self, plan: StripPlan, pages: Pages | None = None, rings: Rings | None = None) -> list[Strip]:
        """The strips of a plan, from the top down, which share their memory: `rings`, or some of their own."""
        rings = rings or self.rings(plan)
        return [Strip(plan, index, rings, self._ops, pages) for index in range(plan.num_strips)]

    def through_whole(self, give: Give, others: Rings | None = None) -> Iterator[Tensor]:
        """What the layers at the latent's size make of the frames that they are given, one of each step.

        They remember in the memory of `others` where that suffices: then nobody waits for the device, and the strips
        that follow are recorded while it is at work. Where it does not that is given back first, and theirs after them.
        """
        plan = self._whole_plan()
        rings = self.rings(plan, others)
        leaves_room = not rings.are_guests
        if others is not None and leaves_room:
            others.give_back()
        (strip,) = self.strips(plan, None, rings)
        steps = self.steps(self._whole_layers, [strip])
        steps.prepare(0, give)
        for step in range(self.num_latents):
            yield steps.made(give(step), strip, step)
        del rings, strip, steps
        if self._recorder is not None and leaves_room:
            self._recorder.forget()

    def _whole_layers(self, frame: Tensor, strip: Strip) -> Tensor:
        (made,) = frames_through(self.side.whole, frame, strip)
        return made

    def whole_frames(self) -> Strip:
        """What the layers at the latent's size remember."""
        (strip,) = self.strips(self._whole_plan())
        return strip

    def _whole_plan(self) -> StripPlan:
        plan = StripPlan()
        plan_layers(self.side.whole, plan, Level((self.height,), self.width, 1))
        return plan

    @cached_property
    def _recorder(self) -> Recorder | None:
        return select_recorder(self.weight.device)

    def steps(self, make: Make, strips: Sequence[Strip]) -> Steps:
        return Steps(make, strips, self.num_latents, self._recorder, proven_kinds(self.weight.device))

    def pages(self, plan: StripPlan, allocate: Allocate) -> Pages:
        return Pages(self.num_latents, page_elements(plan, self.batch), self.weight, allocate)

    def page_bytes(self, plan: StripPlan) -> list[int]:
        """What waits of each step between strips, in the order in which it is left."""
        nbytes = page_elements(plan, self.batch) * self.weight.element_size()
        return [nbytes] * self.num_latents if plan.num_strips > 1 else []

    def shelf(self, channels: int, allocate: Allocate) -> Shelf:
        return Shelf(self._shelf_shape(channels), self.weight, self._channels_last, allocate)

    def _shelf_shape(self, channels: int) -> tuple[int, int, int, int]:
        return self.batch, channels, self.height, self.width


class Decoding(Coding):
    """A decoding of latents [B, z, T, h, w] to video."""

    def plan(self, rows: int | None = None) -> tuple[StripPlan, Level]:
        """Strips of at most so many rows of pixels (None: whole frames), and the rows that each needs at first."""
        height, width = (self.side.stride * size for size in (self.height, self.width))
        ends = cut_alike(height, height if rows is None else rows // self.side.patch, self.side.stride)
        plan = StripPlan()
        return plan, plan_layers(self.side.local, plan, Level(ends, width, self.side.frames_per_latent))

    def whole(self, latent: Tensor) -> Iterator[Tensor]:
        """Pieces [B, 3, t, H, W] of one frame, then of four each, as their latent frame is done."""
        first, (strip,) = self.whole_frames(), self.strips(self.plan()[0])
        latent = self._brought(latent)
        for index in range(self.num_latents):
            yield self.piece(self._features(latent[:, :, index], first), strip)

    def in_strips(
        self, latent: Tensor, way: Strips, finish: Finish, into: Tensor | None, on_chunk: OnChunk | None
    ) -> Iterator[Tensor]:
        """The same pieces on the CPU, `finish`ed, in `into` where given; none is whole before the last strip."""
        plan, needed = self.plan(way.rows)
        done, last, given = 0, plan.num_strips - 1, 0
        with waiting_memory(way, self.weight, self.waiting_bytes(plan)) as allocate:
            rings = self.rings(plan)
            shelf, outbox = self.fill_shelf(latent, allocate, rings), Outbox(into)
            pages = self.pages(plan, allocate)
            strips = self.strips(plan, pages, rings)
            steps = self.steps(self.piece, strips)

            def features(index: int, step: int) -> Tensor:
                pages.begin(step, index == 0)
                return shelf.rows(step, needed.begins[index], needed.ends[index])

            for index, strip in enumerate(strips):
                steps.prepare(index, partial(features, index))
                for step in range(self.num_latents):
                    piece = finish(steps.made(features(index, step), strip, step))
                    if index < last:
                        pages.end(step)
                    outbox.send(piece, (self.frames_of(step).start, done), self.video_shape(piece))
                    height = piece.shape[3]
                    del piece
                    if on_chunk is not None:
                        on_chunk(index * self.num_latents + step + 1, plan.num_strips * self.num_latents)
                    while index == last and given < step and outbox.has(self.frames_of(given)):
                        yield outbox.frames(self.frames_of(given))
                        given += 1
                done += height
            for step in range(given, self.num_latents):
                yield outbox.frames(self.frames_of(step))

    def waiting_bytes(self, plan: StripPlan) -> list[int]:
        """What a decoding in strips asks memory for: what the whole layers make, and pages."""
        channels = plan.seams[self.side.local[0]].channels
        frame = math.prod(self._shelf_shape(channels)) * self.weight.element_size()
        return [frame] * self.num_latents + self.page_bytes(plan)

    def video_shape(self, piece: Tensor) -> tuple[int, ...]:
        """Of the video that rows of frames are a piece of."""
        return *piece.shape[:2], self.num_frames, self.height * self.side.stride * self.side.patch, piece.shape[4]

    @torch.inference_mode()
    def fill_shelf(self, latent: Tensor, allocate: Allocate, others: Rings | None = None) -> Shelf:
        """What the whole layers make of every frame; they remember in the memory of `others` where that suffices."""
        shelf, latent = None, self._brought(latent)
        made = self.through_whole(lambda step: self.side.enter(latent[:, :, step]), others)
        for index, features in enumerate(made):
            shelf = shelf or self.shelf(features.shape[1], allocate)
            shelf.put(index, 0, features)
        assert shelf is not None
        return shelf

    def _brought(self, latent: Tensor) -> Tensor:
        """A latent on the device, all at once: who brings a frame there waits until it is done with those before."""
        return latent.to(self.weight.device)

    @torch.inference_mode()
    def _features(self, frame: Tensor, strip: Strip) -> Tensor:
        return self._whole_layers(self.side.enter(frame), strip)

    @torch.inference_mode()
    def piece(self, features: Tensor, strip: Strip) -> Tensor:
        """The frames [B, 3, t, rows, W] that a step makes in a strip."""
        return torch.stack([self.side.leave(frame) for frame in frames_through(self.side.local, features, strip)], 2)


class Encoding(Coding):
    """An encoding of video [B, 3, T, H, W] to latents."""

    def plan(self, rows: int | None = None) -> tuple[StripPlan, Level]:
        """Strips of at most so many rows of pixels (None: whole frames), and the rows that each needs at first."""
        most = self.height if rows is None else rows // (self.side.stride * self.side.patch)
        ends = cut_alike(self.height, most, 1)
        plan = StripPlan()
        return plan, plan_layers(self.side.local, plan, Level(ends, self.width, 1))

    @torch.inference_mode()
    def whole(self, video: Tensor) -> Tensor:
        """The latent, of whole frames."""
        last, (strip,) = self.whole_frames(), self.strips(self.plan()[0])
        latents = [self._latent(each, last) for frame in video.unbind(2) for each in self._features(frame, strip)]
        return torch.stack(latents, dim=2)

    @torch.inference_mode()
    def in_strips(self, video: Tensor, way: Strips, on_chunk: OnChunk | None = None) -> Tensor:
        """The same, in the memory of one strip."""
        plan, needed = self.plan(way.rows)
        with waiting_memory(way, self.weight, self.page_bytes(plan)) as allocate:
            rings = self.rings(plan)
            shelf = self._fill_shelf(video, (plan, needed, rings), allocate, on_chunk)
            moments = self.through_whole(lambda step: shelf.rows(step, 0, self.height), rings)
            return torch.stack([self.side.leave(each) for each in moments], dim=2)

    def _fill_shelf(
        self, video: Tensor, planned: tuple[StripPlan, Level, Rings], allocate: Allocate, on_chunk: OnChunk | None
    ) -> Shelf:
        """What the layers in strips make of every step."""
        plan, needed, rings = planned
        patch, done, shelf = self.side.patch, 0, None
        pages = self.pages(plan, allocate)
        strips = self.strips(plan, pages, rings)
        steps = self.steps(self._local, strips)

        inbox = Inbox(self.weight.device)

        def frames(index: int, step: int) -> Tensor:
            pages.begin(step, index == 0)
            rows = slice(needed.begins[index] * patch, needed.ends[index] * patch)
            return inbox.bring(video[:, :, self.frames_of(step), rows])

        for index, strip in enumerate(strips):
            steps.prepare(index, partial(frames, index))
            for step in range(self.num_latents):
                features = steps.made(frames(index, step), strip, step)
                if index + 1 < plan.num_strips:
                    pages.end(step)
                shelf = shelf or self.shelf(features.shape[1], allocate)
                shelf.put(step, done, features)
                if on_chunk is not None:
                    on_chunk(index * self.num_latents + step + 1, plan.num_strips * self.num_latents)
            done += features.shape[2]
        assert shelf is not None
        return shelf

    def _local(self, frames: Tensor, strip: Strip) -> Tensor:
        """What the layers in strips make of a step's frames."""
        (features,) = (each for frame in frames.unbind(2) for each in self._features(frame, strip))
        return features

    def _features(self, frame: Tensor, strip: Strip) -> Iterator[Tensor]:
        return frames_through(self.side.local, self.side.enter(frame), strip)

    def _latent(self, features: Tensor, strip: Strip) -> Tensor:
        return self.side.leave(self._whole_layers(features, strip))


def page_elements(plan: StripPlan, batch: int) -> int:
    """Numbers that a step leaves for the strip below."""
    return sum(seam.frames * aligned(batch * seam.elements) for seam in plan.seams.values())
