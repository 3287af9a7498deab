"""Who is told how far a run is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told what happens; see `progress.TerminalProgress`."""

    def begin(self, title: str) -> None: ...
    def update(self, done: int, total: int) -> None: ...
    def end(self) -> None: ...


class Silent:
    """Progress for nobody."""

    def begin(self, title: str) -> None:
        return

    def update(self, done: int, total: int) -> None:
        return

    def end(self) -> None:
        return
