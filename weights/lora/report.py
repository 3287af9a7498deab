"""What of a LoRA file is applied, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SHOWN = 4  # names in a message


@dataclass(frozen=True)
class LoraReport:
    """How much of a file is applied; `skipped` says why of each key that is not, `note` what else is worth knowing."""

    path: Path
    num_keys: int
    skipped: Mapping[str, str]
    note: str = ""

    @property
    def num_applied(self) -> int:
        return self.num_keys - len(self.skipped)

    @property
    def summary(self) -> str:
        """How much, in a line."""
        note = f" ({self.note})" if self.note else ""
        return f"{self.path.name}: {self.num_applied} of {self.num_keys} keys applied{note}"

    def __str__(self) -> str:
        if not self.skipped:
            return self.summary
        by_reason: defaultdict[str, list[str]] = defaultdict(list)
        for key, reason in self.skipped.items():
            by_reason[reason].append(key)
        return f"{self.summary}; not applied: " + "; ".join(f"{some(keys)}: {why}" for why, keys in by_reason.items())


def some(names: Iterable[str]) -> str:
    """The first few."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
