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
    def density(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def saved_seconds(self) -> float | None: ...


def table(found: Sequence[LayerReading]) -> list[str]:
    """A line for each step, then for the layers that were furthest off."""
    if not any(each.error is not None for each in found):
        return []
    lines = [f"{'attention':<12}{'sparse':>8}{'error':>9}{'largest':>9}{'density':>9}{'seconds':>9}{'saved':>8}"]
    for step in sorted({each.step for each in found}):
        lines.append(_line(f"step {step + 1}", [each for each in found if each.step == step]))
    layers = sorted({each.layer for each in found if each.sparse})
    by_layer = {layer: [each for each in found if each.layer == layer and each.sparse] for layer in layers}
    worst = sorted(layers, key=lambda layer: -(_largest(by_layer[layer]) or 0.0))[:3]
    lines += [_line(f"layer {layer}", by_layer[layer]) for layer in worst]
    return lines


def _line(title: str, rows: Sequence[LayerReading]) -> str:
    errors = [row.error for row in rows if row.error is not None]
    mean = f"{sum(errors) / len(errors):.3f}" if errors else "-"
    largest = _largest(rows)
    saved = [row.saved_seconds for row in rows if row.saved_seconds is not None]
    return (
        f"{title:<12}{sum(row.sparse for row in rows):>8}{mean:>9}{'-' if largest is None else f'{largest:.3f}':>9}"
        f"{sum(row.density for row in rows) / len(rows):>9.2f}{sum(row.seconds for row in rows):>9.3f}"
        f"{f'{sum(saved):.3f}' if saved else '-':>8}"
    )


def _largest(rows: Sequence[LayerReading]) -> float | None:
    return max((row.error for row in rows if row.error is not None), default=None)
