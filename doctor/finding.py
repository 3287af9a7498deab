"""What was found of one thing, and all of it together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["good", "bad", "told"]
SIGNS = {"good": "✓", "bad": "✗", "told": "·"}
PLAIN_SIGNS = {"good": "+", "bad": "x", "told": "-"}  # for code pages that have none of those


@dataclass(frozen=True)
class Finding:
    """One line: it works, does not (`fix` says what to do), or is told. Without what `stops` nothing is generated."""

    part: str
    name: str
    state: State
    text: str
    fix: str = ""
    stops: bool = False


@dataclass(frozen=True)
class Findings:
    """Everything that was found, in the order of its parts."""

    lines: tuple[Finding, ...]

    @property
    def can_generate(self) -> bool:
        """Whether a video can be made here, however slowly."""
        return not any(line.state == "bad" and line.stops for line in self.lines)

    def text(self, encoding: str = "utf-8") -> str:
        """For people: a line each, by parts, what to do below what does not work."""
        signs = SIGNS if _has(encoding, SIGNS) else PLAIN_SIGNS
        rows: list[str] = []
        width = max((len(line.name) for line in self.lines), default=0)
        for part in dict.fromkeys(line.part for line in self.lines):
            rows += ["", part] if rows else [part]
            for line in (each for each in self.lines if each.part == part):
                rows.append(f"  {signs[line.state]} {line.name:<{width}}  {line.text}")
                if line.fix:
                    rows.append(f"    {'':<{width}}  {_arrow(encoding)} {line.fix}")
        return "\n".join([*rows, "", self.verdict])

    @property
    def verdict(self) -> str:
        """One sentence on all of it."""
        stopping = [line.name for line in self.lines if line.state == "bad" and line.stops]
        if stopping:
            return f"Nothing can be generated here before this works: {', '.join(stopping)}."
        others = [line.name for line in self.lines if line.state == "bad"]
        if others:
            return f"Videos can be generated; what could be better: {', '.join(others)}."
        return "Videos can be generated, and everything that was tried works."

    def to_json(self, more: dict[str, Any] | None = None) -> str:
        """For programs and for bug reports."""
        found: Sequence[dict[str, Any]] = [asdict(line) for line in self.lines]
        return json.dumps({"can_generate": self.can_generate, "findings": found, **(more or {})}, indent=1)


def _has(encoding: str, signs: dict[str, str]) -> bool:
    try:
        "".join(signs.values()).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _arrow(encoding: str) -> str:
    return "→" if _has(encoding, {"": "→"}) else "->"
