"""The compiled code of one model: made in stages, kept over restarts, watched."""

from __future__ import annotations

import importlib.util
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .blocks import at_limit, compile_modules, dynamo_limits, load_backend, uncompile_modules, whole_graphs
from .counts import Counts, counts, events
from .reading import CompileReading, kept_figures, regressions
from .saved_code import SavedCode, code_folder, key_of, recorded_apart
from .settings import CompileSettings

logger = logging.getLogger(__name__)

MOST_TIMES = 512  # between passes
NO_TRITON = (
    "backend inductor makes Triton kernels for a GPU, and Triton is missing: install it (pip install triton, on "
    "Windows triton-windows), or run without torch.compile"
)
Stream = Callable[[Sequence[nn.Module]], Iterator[nn.Module]]


def check_compiling(settings: CompileSettings, device: torch.device) -> None:
    """ValueError, with the fix, where blocks cannot be compiled so for a device."""
    if settings.backend == "inductor" and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(NO_TRITON)
    settings.check()
    load_backend(settings.backend)


class CodeMade(Exception):
    """A block of every kind has run: the others of the pass need not."""


class CompiledCode:
    """Modules that run as compiled code until `close`; ValueError where that cannot be.

    `model` names what the code depends on beside the settings. Blocks of one class share their code; `make_first` runs
    one of each before a run's first step, so that its time and memory are not that step's.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        settings: CompileSettings,
        device: torch.device,
        model: str,
        any_size: bool = False,
        folder: Path | None = None,
    ) -> None:
        check_compiling(settings, device)
        self.settings, self._modules, self._device = settings, tuple(modules), device
        self._saved = SavedCode(key_of(settings, device, model), folder or code_folder())
        self._ready = False  # the code of the first size is there
        self._saved_bytes: int | None = None  # of earlier starts; None: not looked for yet
        self._plain, self._unmade = "", list[str]()  # blocks that run so where no code fits do so in later runs too
        compile_modules(modules, settings, any_size)
        self.begin_run()

    def close(self) -> None:
        """Let the modules run as plain PyTorch again."""
        uncompile_modules(self._modules)

    # The run around it

    def begin_run(self) -> None:
        """Another run: what is told of it begins anew."""
        self._counts, self._seconds, self._again = Counts(), 0.0, list[str]()
        self._vram = (0, 0)
        self._rows, self._began, self._times = 0, 0.0, list[float]()
        self._last = self._saved.last()

    def end_run(self) -> None:
        """The run is over: the next one is compared with it."""
        if self._rows:
            self._saved.keep_last(kept_figures(self.reading(), self._rows, self._last))

    # Passes

    def make_first(self, run: Callable[[], object], rows: int) -> None:
        """Before the first pass of all: `run` has a pass that `first_of_each` ends early; nothing later on."""
        if self._ready:
            return
        before = self._vram_in_use()
        with self.watching(rows), suppress(CodeMade):
            run()
        self._vram = before, self._vram_in_use()
        self._ready = True

    def first_of_each(self, stream: Stream) -> Stream:
        """The stream of a pass that ends with `CodeMade` when a block of every class was run."""

        def until_made(blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
            missing = {type(block) for block in blocks}
            for block in stream(blocks):
                yield block
                missing.discard(type(block))
                if not missing:
                    raise CodeMade

        return until_made

    @contextmanager
    def watching(self, rows: int) -> Iterator[None]:
        """A pass of so many rows goes in here; what it compiles is counted, kept for the next start and told."""
        if self._saved_bytes is None:
            self._saved_bytes = self._saved.load() if self.settings.backend == "inductor" else 0
        before, since = counts(), time.time()
        self._note_pass(rows)
        with recorded_apart():
            try:
                with dynamo_limits(self.settings), whole_graphs(self.settings):
                    yield
            finally:
                made = counts() - before
                if made != Counts():
                    self._note_code(made, since)

    def _note_pass(self, rows: int) -> None:
        now = time.perf_counter()
        if rows == self._rows and self._began:
            self._times = [*self._times[1 - MOST_TIMES :], now - self._began]
        self._rows, self._began = rows, now

    def _note_code(self, made: Counts, since: float) -> None:
        self._began = 0.0  # this pass's time tells nothing of others
        self._counts += made
        found = events(int(since * 1e6))
        self._seconds += sum(event.seconds for event in found)
        again = [
            f"{event.function}: {brief_reason(event.why_again)}"
            for event in found
            if event.why_again and not event.why_not
        ]
        self._again += again
        for reason in again:
            logger.info("torch.compile made code anew: %s", reason)
        if made.limits and not self._plain and not self.settings.fullgraph:  # else it ends with an error
            self._plain = at_limit(self.settings)
            logger.warning("torch.compile: %s", self._plain)
        self._unmade += [brief_reason(event.why_again) for event in found if event.is_at_limit]
        if self.settings.backend == "inductor" and made.graphs:
            self._saved.save()

    # What is shown

    def reading(self) -> CompileReading:
        """Of this run so far."""
        times = self._times
        reading = CompileReading(
            str(self.settings),
            self._seconds,
            self._counts,
            tuple(self._again),
            *self._vram,
            self._saved_bytes or 0,
            statistics.median(times) if len(times) > 1 else None,
            self.settings.notes,
            plain=self._plain,
            unmade=tuple(dict.fromkeys(self._unmade)),
        )
        return replace(reading, regressions=regressions(reading.figures(self._rows), self._last))

    def _vram_in_use(self) -> int:
        if self._device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


def brief_reason(reason: str) -> str:
    """Dynamo's first reason, in one line and without paths."""
    line = next((text.strip() for text in reason.splitlines() if text.strip()), "")
    return line.split("  #")[0].removeprefix("- ").strip()[:160]
