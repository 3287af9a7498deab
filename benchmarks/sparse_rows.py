"""The rows of `sparse_step.py`: how each makes its steps, and how what was found is shown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import comfyui_steps
from lowvram_video.attention.sparse.settings import SparseSettings
from sparse_errors import line

TOP_K = SparseSettings(top_k=0.15, bound=None, dense_percent=0)
BOUND = replace(TOP_K, bound=1.0)
TAU = SparseSettings(tau=1.0, bound=0.1, dense_percent=0)


@dataclass(frozen=True)
class Row:
    """One line: `sparse` None is dense, by the attention backend of this name.

    `steps` are timed, after one that is not. `in_turn`: with each of them one that measures its error as well, a line
    of its own.
    """

    name: str
    sparse: SparseSettings | None = None
    attention: str = "auto"
    steps: int = 2
    in_turn: SparseSettings | None = None


ROWS = (
    Row("dense"),
    Row("sparse top-k 0.15", TOP_K, steps=5, in_turn=BOUND),
    Row("sparse top-k 0.3", replace(TOP_K, top_k=0.3)),  # what presets keep of a trained model lies between these
    Row("sparse top-k 0.5", replace(TOP_K, top_k=0.5)),
    Row("sparse tau 1.0, bound 0.1", TAU, steps=7),  # from the careful end on
    Row("dense int8_attention", attention="int8_attention", steps=1),
)
COST = "the bound's own cost"


def with_cost(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of steps that were made in turn also what the second kind costs, a row of its own."""
    if len(lines) == 1:
        return lines
    plain, bounded = lines
    more = [other - one for one, other in zip(plain["seconds"][1:], bounded["seconds"][1:], strict=True)]
    cost = statistics.median(more)
    row = {"name": COST, "seconds": more, "step": cost, "percent": 100 * cost / plain["step"]}
    return [plain, bounded | {"name": f"{bounded['name']}, bound"}, row]


def table(found: dict[str, Any]) -> str:
    lines = []
    for part, rows in found["parts"].items():
        if part == "errors":
            lines += [
                f"{line(row)}  {row['milliseconds']:.2f} ms, dense {row['dense_milliseconds']:.2f}, samples "
                f"{row['sample_milliseconds']:.2f}"
                for row in rows
            ]
            continue
        if part == "comfyui":
            lines.append(comfyui_steps.table(rows))
            continue
        lines.append(
            f"{part:<30}{'s/step':>8}{'error':>8}{'largest':>9}{'density':>9}{'output':>8}{'GiB':>7}{'plan':>7}"
        )
        for row in rows:
            if "error" in row:
                lines.append(f"  {row['name']:<28} FAILED {row['error']}")
                continue
            if "denoise" in row:
                lines.append(
                    f"  {row['name']:<28} whole denoise {row['denoise']:.1f} s, a dense step {row['dense_step']:.3f}, "
                    f"a sparse one {row['sparse_step']:.3f}"
                )
                continue
            if row["name"] == COST:
                lines.append(f"  {COST:<28}{row['step']:>9.3f}  {row['percent']:.2f} % of a sparse step")
                continue
            error, largest = (row[name] or 0.0 for name in ("measured_error", "largest_error"))
            density = "-" if row["density"] is None else f"{row['density']:.3f}"
            lines.append(
                f"  {row['name']:<28}{row['step']:>9.3f}{error:>9.3f}{largest:>9.3f}{density:>9}"
                f"{row['difference']:>9.3f}{row.get('allocated_gib', 0):>9.2f}{row['predicted_gib']:>9.2f}"
            )
    lines += [f"left out: {each}" for each in found.get("left_out", ())]
    return "\n".join(lines)
