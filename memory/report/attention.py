"""What sparse or otherwise inexact self-attention did, as lines of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class LayerReading(Protocol):
    """One layer at one step: see `attention/sparse/readings.py: LayerReading`."""

    @property
    def step(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def sparse(self) -> bool: ...
    @property
    def error(self) -> float | None: ...
    @property
    def density(self) -> float | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def saved_seconds(self) -> float | None: ...


def table(found: Sequence[LayerReading]) -> list[str]:
    """A line for each step, then for the layers that were furthest off."""
    if not any(each.sparse or each.error is not None for each in found):
        return []
    lines = [f"{'attention':<12}{'sparse':>8}{'error':>9}{'largest':>9}{'density':>9}{'seconds':>9}{'saved':>8}"]
    for step in sorted({each.step for each in found}):
        lines.append(_line(f"step {step + 1}", [each for each in found if each.step == step]))
    layers = sorted({each.layer for each in found if each.sparse})
    by_layer = {layer: [each for each in found if each.layer == layer and each.sparse] for layer in layers}
    measured = [layer for layer in layers if _largest(by_layer[layer]) is not None]
    worst = sorted(measured, key=lambda layer: -(_largest(by_layer[layer]) or 0.0))[:3]
    lines += [_line(f"layer {layer}", by_layer[layer]) for layer in worst]
    return lines


def _line(title: str, rows: Sequence[LayerReading]) -> str:
    mean, largest = _mean([row.error for row in rows]), _largest(rows)
    densities = [row.density for row in rows]
    density = None if None in densities else _mean(densities)  # of some layers alone it would be no step's
    saved = [row.saved_seconds for row in rows if row.saved_seconds is not None]
    return (
        f"{title:<12}{sum(row.sparse for row in rows):>8}{_told(mean, 3):>9}{_told(largest, 3):>9}"
        f"{_told(density, 2):>9}{sum(row.seconds for row in rows):>9.3f}{_told(sum(saved) if saved else None, 3):>8}"
    )


def _told(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def _mean(numbers: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None


def _largest(rows: Sequence[LayerReading]) -> float | None:
    return max((row.error for row in rows if row.error is not None), default=None)
