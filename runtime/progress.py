"""Who is told how far a run is."""

from __future__ import annotations


class Progress:
    """Told what happens, and tells nobody; `cli/progress.py` has one that shows it."""

    def begin(self, title: str) -> None:
        """A phase starts; the one before is done."""

    def update(self, done: int, total: int) -> None:
        """`done` of `total` steps, frames or bytes of the phase."""

    def block(self) -> None:
        """Another block of the model begins; may raise to stop."""

    def end(self) -> None:
        """The current phase is done."""
