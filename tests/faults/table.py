"""What a part of `make faults` found: rows, and a line of the table for each kind of fault."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"
MARKS = "<!-- faults: python -m tests.faults --readme -->\n", "<!-- end of faults -->"


@dataclass(frozen=True)
class Row:
    """One fault: what it was, whether all is as it should be, and what was seen."""

    fault: str
    where: str
    right: bool
    seen: str
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    """A part, how long it took, what it found, and whether it came to its end."""

    seconds: int
    rows: Sequence[Row]
    whole: bool = True


def as_json(parts: Mapping[str, Tried]) -> dict[str, Any]:
    """Counts of all, and the rows themselves."""
    rows = [row for part in parts.values() for row in part.rows]
    return {
        "faults": len(rows),
        "right": sum(row.right for row in rows),
        "kinds": {fault: _kind([row for row in rows if row.fault == fault]) for fault in kinds(rows)},
        "parts": {name: asdict(part) for name, part in parts.items()},
    }


def from_json(path: Path) -> dict[str, Tried]:
    """The parts of such a file."""
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    return {
        name: Tried(part["seconds"], [Row(**row) for row in part["rows"]], part.get("whole", True))
        for name, part in parts.items()
    }


def _kind(rows: Sequence[Row]) -> dict[str, Any]:
    seen = Counter(row.seen for row in rows)
    return {"faults": len(rows), "right": sum(row.right for row in rows), "seen": dict(seen.most_common())}


def kinds(rows: Sequence[Row]) -> list[str]:
    """In the order that they came in."""
    return list(dict.fromkeys(row.fault for row in rows))


def as_markdown(rows: Sequence[Row]) -> str:
    """A line for each kind of fault."""
    lines = ["| fault | points | right | what followed |", "|---|---:|---:|---|"]
    for fault in kinds(rows):
        of = [row for row in rows if row.fault == fault]
        seen = "; ".join(f"{count}× {what}" for what, count in Counter(row.seen for row in of).most_common(4))
        lines.append(f"| {fault} | {len(of)} | {sum(row.right for row in of)} | {seen} |")
    return "\n".join(lines)


def readme_table(path: Path) -> str:
    """The table that the README has: of each kind of fault how many there were, how many ended as they should."""
    rows = [row for part in from_json(path).values() for row in part.rows]
    right = sum(row.right for row in rows)
    opens = f"<details><summary>the {len(kinds(rows))} kinds of faults, one by one</summary>"
    said = f"{right} of {len(rows)} ended as they should (`{path.name}`)."
    return f"\n{said}\n\n{opens}\n\n{as_markdown(rows)}\n\n</details>\n\n"


def write_readme(path: Path) -> None:
    """Put the table of a results file into the README."""
    before, _, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    README.write_text(before + MARKS[0] + readme_table(path) + MARKS[1] + after, encoding="utf-8", newline="\n")
