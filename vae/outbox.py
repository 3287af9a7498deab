"""Finished pieces of video on their way from the device to RAM, each while the device makes the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..system.host_memory import touch_pages

Finish = Callable[[Tensor], Tensor]  # video [B, C, t, h, w] as it is wanted, made on the device

NUM_UNDER_WAY = 2
MOST_UNDER_WAY, UNDER_WAY_BYTES = 24, 24 << 20  # of small pieces
MOST_FRAMES = 4  # of a piece


@dataclass(frozen=True)
class Parcel:
    """A piece on its way."""

    piece: Tensor
    event: torch.cuda.Event | None = None

    @property
    def has_arrived(self) -> bool:
        return self.event is None or self.event.query()

    def __call__(self) -> Tensor:
        """The piece, once it has arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.piece


class Courier:
    """Copies pieces [B, C, t, h, w] to RAM behind the device's work, so many at a time."""

    def __init__(self, num_under_way: int) -> None:
        self.num_under_way = num_under_way
        self._stream: torch.cuda.Stream | None = None
        self._staging: list[Tensor] = []
        self._num_sent = 0

    def send(self, piece: Tensor) -> Parcel:
        """What waits for the piece and gives it, [B, t, h, w, C], until `num_under_way` further ones have been sent."""
        rows = piece.permute(0, 2, 3, 4, 1).contiguous()
        if not rows.is_cuda:
            return Parcel(rows)
        staging = self._place(rows)
        if self._stream is None:
            self._stream = torch.cuda.Stream(rows.device)
        self._stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(self._stream):
            staging.copy_(rows, non_blocking=True)
            event = self._stream.record_event()
        rows.record_stream(self._stream)
        return Parcel(staging, event)

    def _place(self, rows: Tensor) -> Tensor:
        """Pinned memory for a piece, used in turn."""
        index = self._num_sent % self.num_under_way
        self._num_sent += 1
        size = rows.numel() * rows.element_size()
        if len(self._staging) <= index:
            self._staging.append(torch.empty(0, dtype=torch.uint8))
        if self._staging[index].numel() < size:
            self._staging[index] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._staging[index][:size].view(rows.dtype).view(rows.shape)


class Outbox:
    """A video in RAM that fills with pieces of frames and rows."""

    def __init__(self, into: Tensor | None = None) -> None:
        """`into` [B, C, T, H, W] is filled, where given."""
        self._video = into
        self._courier: Courier | None = None
        self._under_way: deque[tuple[Parcel, int, int]] = deque()

    def send(self, piece: Tensor, place: tuple[int, int], shape: Sequence[int]) -> None:
        """Take a piece [B, C, t, h, W] to its (frame, row) in a video of `shape` [B, C, T, H, W]."""
        if self._video is None:
            b, c, t, h, w = shape
            self._video = torch.empty(b, t, h, w, c, dtype=piece.dtype).permute(0, 4, 1, 2, 3)
        if self._courier is None:
            # The device is told of its next work while it is still at the last: of strips there is much to tell.
            largest = piece[:, :, :1].nbytes * MOST_FRAMES
            self._courier = Courier(max(NUM_UNDER_WAY, min(MOST_UNDER_WAY, UNDER_WAY_BYTES // largest)))
        self._under_way.append((self._courier.send(piece), *place))
        while len(self._under_way) >= self._courier.num_under_way:
            self._deliver()

    def frames(self, span: slice) -> Tensor:
        """Frames of the video, which have been sent whole."""
        for _ in range(self._num_awaited(span)):
            self._deliver()
        assert self._video is not None
        return self._video[:, :, span]

    def has(self, span: slice) -> bool:
        """Whether nobody would wait for these frames."""
        awaited = self._num_awaited(span)
        return not awaited or self._under_way[awaited - 1][0].has_arrived

    def _num_awaited(self, span: slice) -> int:
        """How many pieces are to be delivered for frames, in the order that they were sent in."""
        places = [index for index, (_, frame, _) in enumerate(self._under_way) if frame < span.stop]
        return places[-1] + 1 if places else 0

    def _deliver(self) -> None:
        parcel, frame, row = self._under_way.popleft()
        piece = parcel()
        assert self._video is not None
        rows = self._video.permute(0, 2, 3, 4, 1)
        rows[:, frame : frame + piece.shape[1], row : row + piece.shape[2]] = piece


def touch(frames: Tensor) -> None:
    """Have the system give the pages of frames [B, C, t, h, w] in RAM that will be written.

    That takes longer than to write them: it is done while the device is at work, so that its last frames come at once.
    """
    rows = frames.permute(0, 2, 3, 4, 1)
    if rows.is_contiguous():
        touch_pages(rows.view(-1).view(torch.uint8))


def in_ram(pieces: Iterator[Tensor], finish: Finish, into: Tensor | None = None) -> Iterator[Tensor]:
    """Pieces [B, C, t, H, W] of whole frames, `finish`ed, in RAM (in `into`, where given), each as soon as it is there.

    One is on its way while the next is made, so that pinned memory holds one. What was made before an error is given
    before it is raised.
    """
    courier, under_way, num_frames = Courier(1), list[Parcel](), 0

    def delivered() -> Tensor:
        nonlocal num_frames
        piece = under_way[0].piece.permute(0, 4, 1, 2, 3)
        frames = slice(num_frames, num_frames + piece.shape[2])
        given = torch.empty_like(piece) if into is None else into[:, :, frames]
        touch(given)
        given.copy_(under_way[0]().permute(0, 4, 1, 2, 3))
        under_way.clear()  # only now: the next one would pass for one that is lost here
        num_frames = frames.stop
        return given

    try:
        for piece in pieces:
            done = finish(piece)
            del piece
            if under_way:
                yield delivered()
            under_way.append(courier.send(done))
            del done
    except RuntimeError:
        if under_way:
            yield delivered()
        raise
    if under_way:
        yield delivered()
