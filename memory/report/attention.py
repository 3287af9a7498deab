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
    @property
    def model(self) -> int: ...


def table(found: Sequence[LayerReading]) -> list[str]:
    """For each model a line for each step, and, where errors were measured, one for each layer."""
    models = sorted({each.model for each in found})
    return [line for model in models for line in _table([each for each in found if each.model == model])]


def _table(found: Sequence[LayerReading]) -> list[str]:
    if not any(_is_inexact(each) for each in found):
        return []
    lines = [f"{'attention':<12}{'sparse':>8}{'error':>9}{'largest':>9}{'density':>9}{'seconds':>9}{'saved':>8}"]
    for step in sorted({each.step for each in found}):
        lines.append(_line(f"step {step + 1}", [each for each in found if each.step == step]))
    if all(each.error is None for each in found):
        return lines
    for layer in sorted({each.layer for each in found}):
        rows = [each for each in found if each.layer == layer]
        lines.append(_line(f"layer {layer}", [each for each in rows if _is_inexact(each)] or rows))
    return lines


def _is_inexact(reading: LayerReading) -> bool:
    return reading.sparse or reading.error is not None


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
