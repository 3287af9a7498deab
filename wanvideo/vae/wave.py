"""One decoding by several cards: each makes strips of rows, behind the strip above, which another one makes.

Strip i is made by card i modulo their number, from the first step of time to the last. A step of it needs the rows that
the same step of the strip above left: so all cards are at work but for their first steps. What they make is to the bit
what one card makes in these strips: the same layers on the same numbers, in the same order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...memory.plan.decode import PAGES_AT_WORK
from ...memory.stream.pinned import Registrar
from ...team.mail import TIMEOUT_SECONDS, TeamError
from ...team.streams import wait_for_device
from ...team.team import Team
from ...vae.checks import check_latent
from ...vae.frame_watch import FrameWatch
from ...vae.outbox import Finish, Outbox
from ...vae.strips import Allocate, Pages, Strips, waiting_memory
from .coding import Decoding, OnChunk, page_elements
from .model import WanVAE
from .rows import StripPlan
from .steps import PERIOD

_POLL_SECONDS = 0.1  # waits are cut into such slices, so that who is stopped or interrupted finds out


@dataclass(frozen=True)
class CardStrips:
    """A way to decode: in strips of at most `rows` rows of pixels, exactly as one card in these, by so many cards.

    What waits lies in RAM, pinned by `registrar` where one is given.
    """

    rows: int
    num_cards: int
    registrar: Registrar | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"on {self.num_cards} cards, in strips of {self.rows} rows"


def decode_on_cards(
    vaes: Sequence[WanVAE],
    team: Team,
    latent: Tensor,
    way: CardStrips,
    finish: Finish,
    on_chunk: OnChunk | None = None,
) -> Iterator[Tensor]:
    """The pieces of `WanVAE.decode_pieces`, `finish`ed, on the CPU; `vaes` are one on each of the team's cards.

    They come once all are made. `finish` sees rows of frames, on each card; `on_chunk` is called by the caller's thread
    and may raise to stop. A chunk is one piece of one strip. Raises what the first card that fails does, and BadFrames
    where frames are no numbers.
    """
    check_latent(vaes[0].config, latent)
    codings = [vae.decoding(latent.shape) for vae in vaes]
    waiting = codings[0].waiting_bytes(codings[0].plan(way.rows)[0])
    with waiting_memory(Strips(way.rows, True, way.registrar), codings[0].weight, waiting) as allocate:
        decode = _Decode(codings, team, latent, way, allocate)
        hangs, watch = False, FrameWatch(vaes[0])
        try:
            team.run(partial(decode.make, finish=watch.over(finish), on_chunk=on_chunk), in_turns=False)
        except TeamError:
            hangs = True  # and would be waited for without an end
            raise
        finally:
            # RAM that copies are under way to, or from, is others' next
            for vae in () if hangs else vaes:
                if vae.device.type == "cuda":
                    with suppress(RuntimeError):  # a card that failed, or hangs, says so over what stopped it
                        wait_for_device(vae.device)
        watch.end()
    yield from decode.pieces()


class _Decode:
    """The work of all cards, which the first has prepared: what the layers at the latent's size make of each frame."""

    def __init__(
        self, codings: Sequence[Decoding], team: Team, latent: Tensor, way: CardStrips, allocate: Allocate
    ) -> None:
        self._codings, self._team, self._way, self._first = codings, team, way, codings[0]
        self._num_steps, self._num_strips = self._first.num_latents, self._first.plan(way.rows)[0].num_strips
        self._shelf = self._first.fill_shelf(latent, allocate)
        if self._first.weight.is_cuda:
            torch.cuda.synchronize(self._first.weight.device)  # other cards read it behind nothing
        self._wave = Wave(self._num_steps, allocate, team.mail.check, team.mail.timeout_seconds)
        self._recording = threading.Lock()  # PyTorch gives no memory back while a card records
        self._video: Tensor | None = None
        self._alone = threading.Lock()
        self._num_done = 0

    def make(self, rank: int, finish: Finish, on_chunk: OnChunk | None) -> None:
        """One card's strips."""
        coding, own = self._codings[rank], range(rank, self._num_strips, len(self._codings))
        if not own:
            return
        plan, needed = coding.plan(self._way.rows)
        pages = WavePages(self._wave, page_elements(plan, coding.batch), coding.weight)
        with self._recording:  # heights are tried, which gives memory back
            strips = coding.strips(plan, pages)[rank :: len(self._codings)]
        steps = coding.steps(coding.piece, strips)
        shelf, outbox = self._shelf.on(coding.weight.device), None

        def features(index: int, step: int) -> Tensor:
            pages.begin(step, index == 0)
            return shelf.rows(step, needed.begins[index], needed.ends[index])

        for place, (index, strip) in enumerate(zip(own, strips, strict=True)):
            pages.enter(index)
            self._wave.wait_for(index - 1, min(PERIOD, self._num_steps - 1))  # before the lock: it is for who is ahead
            with self._recording:
                steps.prepare(place, partial(features, index))
            row = first_row(plan, index) * coding.side.patch
            for step in range(self._num_steps):
                self._team.mail.check()
                piece = finish(steps.made(features(index, step), strip, step))
                if index + 1 < self._num_strips:
                    pages.end(step)
                outbox = outbox or Outbox(self._video_like(piece, coding))
                outbox.send(piece, (coding.frames_of(step).start, row), coding.video_shape(piece))
                del piece
                self._count(on_chunk if rank == 0 else None)
        if outbox is not None:
            outbox.frames(slice(0, coding.num_frames))

    def pieces(self) -> Iterator[Tensor]:
        """The video, a piece for each latent frame."""
        assert self._video is not None
        for step in range(self._num_steps):
            yield self._video[:, :, self._first.frames_of(step)]

    def _video_like(self, piece: Tensor, coding: Decoding) -> Tensor:
        """The video that all cards fill."""
        with self._alone:
            if self._video is None:
                b, c, t, h, w = coding.video_shape(piece)
                self._video = torch.empty(b, t, h, w, c, dtype=piece.dtype).permute(0, 4, 1, 2, 3)
            return self._video

    def _count(self, on_chunk: OnChunk | None) -> None:
        with self._alone:
            self._num_done += 1
        if on_chunk is not None:
            on_chunk(self._num_done, self._num_strips * self._num_steps)


class Wave:
    """How far each strip is, and the pages of its steps, which wait in RAM for the strip below."""

    def __init__(
        self, num_steps: int, allocate: Allocate, check: Callable[[], None], timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        """`check` is called while a card waits for another, and raises where that has stopped."""
        self.num_steps, self.timeout_seconds = num_steps, timeout_seconds
        self._allocate, self._check = allocate, check
        self._waiting: dict[int, Tensor] = {}
        self._left: dict[int, list[torch.cuda.Event | None]] = {}  # by strip: of its steps so far
        self._news = threading.Condition()

    def page(self, step: int, like: Tensor) -> Tensor:
        """Where the page of a step waits. A strip that has read it writes its own there: the next one reads that."""
        with self._news:
            if step not in self._waiting:
                self._waiting[step] = self._allocate(like.nbytes)[: like.nbytes].view(like.dtype)
            return self._waiting[step]

    def leave(self, strip: int, event: torch.cuda.Event | None) -> None:
        """The next step of a strip has left its page, once this event has passed."""
        with self._news:
            self._left.setdefault(strip, []).append(event)
            self._news.notify_all()

    def is_left(self, strip: int, step: int) -> bool:
        return len(self._left.get(strip, ())) > step

    def wait_for(self, strip: int, step: int) -> torch.cuda.Event | None:
        """Wait until a step of a strip has left its page: what to wait for on the device. There is no strip -1.

        TeamError where it does not in time.
        """
        if strip < 0:
            return None
        deadline = time.monotonic() + self.timeout_seconds
        with self._news:
            while not self.is_left(strip, step):
                if time.monotonic() > deadline:
                    raise TeamError(
                        f"strip {strip} of a decoding has not come to step {step} for {self.timeout_seconds:g} s: its "
                        "card hangs or has gone; look at nvidia-smi, and leave that card out of the devices"
                    )
                self._news.wait(_POLL_SECONDS)
                self._check()
            return self._left[strip][step]


class WavePages(Pages):
    """One card's pages at work, which arrive from strips that others make and leave for those."""

    def __init__(self, wave: Wave, num_elements: int, like: Tensor) -> None:
        super().__init__(wave.num_steps, num_elements, like, _allocates_nothing)
        self._wave, self._strip = wave, 0

    def enter(self, strip: int) -> None:
        """What follows is of this strip."""
        self._strip = strip

    def begin(self, step: int, is_first: bool) -> None:
        if is_first:
            super().begin(step, is_first)
            return
        if step == 0:
            self._arrived.clear()
        self._page, self._used = self._memory[step % PAGES_AT_WORK], 0
        for wanted in (step, step + 1):
            above = self._strip - 1
            due = wanted == step or (wanted < self._num_steps and self._wave.is_left(above, wanted))
            if due and wanted not in self._arrived:
                self._arrived[wanted] = self._bring(above, wanted)
        event = self._arrived.pop(step)
        if event is not None:
            event.wait()

    def end(self, step: int) -> None:
        event = self._copy(self._wave.page(step, self._page), self._page)
        self._left.append(event)
        self._wave.leave(self._strip, event)

    def _bring(self, above: int, step: int) -> torch.cuda.Event | None:
        left, page = self._wave.wait_for(above, step), self._memory[step % PAGES_AT_WORK]
        if left is not None and self._stream is not None:
            self._stream.wait_event(left)
        return self._copy(page, self._wave.page(step, page))


def first_row(plan: StripPlan, strip: int) -> int:
    """The first row, of folded pixels, that a strip makes."""
    last_layer = next(iter(plan.layers.values()))  # they were found from the last on
    return last_layer.outputs.begins[strip]


def _allocates_nothing(nbytes: int) -> Tensor:
    raise AssertionError(f"a page of {nbytes} bytes waits in none of this memory")
