"""What a part of `make faults` found: rows, and a line of the table for each kind of fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One fault: what it was, whether all is as it should be, and what was seen."""

    fault: str
    where: str
    right: bool
    seen: str
    more: dict[str, Any] = field(default_factory=dict)


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of all, and the rows themselves."""
    return {
        "faults": len(rows),
        "right": sum(row.right for row in rows),
        "kinds": {fault: _kind([row for row in rows if row.fault == fault]) for fault in kinds(rows)},
        "rows": [asdict(row) for row in rows],
    }


def _kind(rows: Sequence[Row]) -> dict[str, Any]:
    seen = Counter(row.seen for row in rows)
    return {"faults": len(rows), "right": sum(row.right for row in rows), "seen": dict(seen.most_common())}


def kinds(rows: Sequence[Row]) -> list[str]:
    """In the order that they came in."""
    return list(dict.fromkeys(row.fault for row in rows))


def as_markdown(rows: Sequence[Row]) -> str:
    """The table that the README has."""
    lines = ["| fault | points | right | what followed |", "|---|---:|---:|---|"]
    for fault in kinds(rows):
        of = [row for row in rows if row.fault == fault]
        seen = "; ".join(f"{count}× {what}" for what, count in Counter(row.seen for row in of).most_common(4))
        lines.append(f"| {fault} | {len(of)} | {sum(row.right for row in of)} | {seen} |")
    return "\n".join(lines)
