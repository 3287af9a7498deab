"""A batch as a terminal shows it: a line for each job that ended, and one of all that are at work."""

from __future__ import annotations

from typing import TextIO

from tqdm import tqdm

from ..batch.dispatch import Dispatcher, Event

BAR = "{desc} [{bar:24}] {n_fmt}/{total_fmt}  {postfix}"


class BatchProgress:
    """Redraws one line on a terminal; elsewhere only what ends is told."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream, self._total = stream, total
        self._bar = tqdm(total=total, bar_format=BAR, ascii=".#", file=stream, leave=False, disable=None)

    def show(self, doing: str, dispatcher: Dispatcher) -> None:
        """How far all workers are, and what they have noted meanwhile."""
        while dispatcher.notes:
            self._line(dispatcher.notes.popleft())
        at_work = [f"{seat.job.output.name} {seat.progress}".strip() for seat in dispatcher.seats if seat.job]
        self._bar.set_description_str(doing, refresh=False)
        self._bar.set_postfix_str(" | ".join(at_work))

    def say(self, event: Event) -> None:
        """A line on what became of a job."""
        job = event.job
        if event.kind == "made":
            self.advance()
            self._line(f"{job.output}: made in {event.values.get('seconds', 0):.1f} s by {event.worker}")
        elif event.kind == "failed":
            self.advance()
            self._line(f"{job.output}, line {job.line}: failed: {event.values.get('error')}")
        elif event.kind == "lost":
            self._line(f"{job.output}: {event.worker} was lost ({event.values.get('error')}), it begins anew")

    def advance(self) -> None:
        self._bar.update()

    def restart(self) -> None:
        self._bar.reset(self._total)

    def close(self) -> None:
        self._bar.close()

    def _line(self, text: str) -> None:
        tqdm.write(text, file=self._stream)
