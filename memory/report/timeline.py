"""A run as a picture: the memory curve under its budget, and the copy and compute streams of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..plan.footprint import GIB
from .intervals import Interval, intersect
from .report import RunReport

PAGE_COLOR, TEXT_COLOR, FAINT_COLOR = "#202124", "#e4e4e4", "#8a8a8a"  # of ComfyUI's dark page
MEMORY_COLOR, BUDGET_COLOR, COPY_COLOR, COMPUTE_COLOR = "#6ea8fe", "#ff7b72", "#f0a84b", "#6cc07e"
PREDICTED_COLOR = "#ffd866"
LEAST_GAP = 0.16  # between the names of two phases, as a part of the whole run
ASIDE = 1.03  # where what is said beside the axes begins, in their width


@dataclass(frozen=True)
class Shape:
    """A picture's size, its letters' in points, and how many values are named along an axis, at most about."""

    inches: tuple[float, float]
    dpi: int
    letters: float
    num_ticks: int


FILE = Shape((7.5, 6.0), 160, letters=12, num_ticks=8)
# an inch is what 100 pixels of a node show: letters of 12.5 pixels in one that is 500 wide
NODE = Shape((5.0, 2.2), 240, letters=9, num_ticks=5)


def draw_timeline(report: RunReport, shape: Shape = FILE) -> bytes:
    """The report as a PNG, of 1200 x 960 pixels as a file: memory over time, and one pass if blocks were streamed."""
    png = BytesIO()
    timeline_canvas(report, shape).print_png(png)
    return png.getvalue()


def timeline_canvas(report: RunReport, shape: Shape = FILE) -> FigureCanvasAgg:
    """The same picture, to be drawn."""
    figure = Figure(figsize=shape.inches, dpi=shape.dpi, layout="constrained", facecolor=PAGE_COLOR)
    canvas = FigureCanvasAgg(figure)
    streamed = report.stream is not None and bool(report.passes)
    if streamed:
        memory, streams = figure.subplots(2, 1, gridspec_kw={"height_ratios": (5, 3)})
        _draw_streams(streams, report, shape)
    else:
        memory = figure.subplots()
    _draw_memory(memory, report, shape)
    return canvas


def _dress(axes: Axes, shape: Shape) -> None:
    """The page's colours, letters of a legible size, and seconds below."""
    axes.set_facecolor(PAGE_COLOR)
    axes.tick_params(colors=TEXT_COLOR, labelsize=shape.letters, length=2, pad=2)
    axes.tick_params(axis="x", pad=5)  # below the letters of the other axis
    axes.xaxis.set_major_locator(MaxNLocator(shape.num_ticks, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter("{x:g} s")
    for spine in axes.spines.values():
        spine.set_color(FAINT_COLOR)


def _draw_memory(axes: Axes, report: RunReport, shape: Shape) -> None:
    """VRAM under its budget with the peaks that were predicted; RAM where no VRAM was used."""
    _dress(axes, shape)
    seconds = [sample.seconds for sample in report.samples]
    if report.on_device:
        used = [max(0, sample.device_bytes - report.other_bytes) / GIB for sample in report.samples]
    else:
        used = [sample.rss_bytes / GIB for sample in report.samples]
    axes.fill_between(seconds, used, color=MEMORY_COLOR, alpha=0.3, linewidth=0)
    axes.plot(seconds, used, color=MEMORY_COLOR, linewidth=2, label="VRAM" if report.on_device else "RAM")
    tops = [*used, 0.1]
    if report.on_device:
        tops += _draw_limits(axes, report)
    _name_phases(axes, report, shape, max([*seconds, *(phase.start + phase.seconds for phase in report.phases), 1e-3]))
    axes.set_ylim(0, 1.06 * max(tops))
    axes.margins(x=0)
    axes.yaxis.set_major_locator(MaxNLocator(shape.num_ticks, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter("{x:g} GiB")
    axes.legend(
        loc="upper left", bbox_to_anchor=(ASIDE, 1), borderaxespad=0, handlelength=1.2, handletextpad=0.5,
        fontsize=shape.letters, labelcolor=TEXT_COLOR, frameon=False, borderpad=0,
    )  # fmt: skip


def _draw_limits(axes: Axes, report: RunReport) -> list[float]:
    """The budget and each phase's predicted peak; their heights in GiB."""
    heights = []
    if report.budget_bytes is not None:
        heights.append(report.budget_bytes / GIB)
        axes.axhline(heights[0], color=BUDGET_COLOR, linestyle="--", linewidth=2, label="budget")
    label = "predicted peak"
    for phase in report.phases:
        if phase.predicted_bytes:
            heights.append(phase.predicted_bytes / GIB)
            end = phase.start + phase.seconds
            axes.hlines(heights[-1], phase.start, end, color=PREDICTED_COLOR, linewidth=2.5, label=label)
            label = "_"  # told once
    return heights


def _name_phases(axes: Axes, report: RunReport, shape: Shape, total: float) -> None:
    """Where each phase begins, and its name above; names of short phases stand above the next one's."""
    rows: list[float] = []  # where the first name in each row begins, from the lowest one up
    for phase in reversed(report.phases):
        axes.axvline(phase.start, color=FAINT_COLOR, linewidth=1)
        place = phase.start / total
        left = _left_of_name(place)
        row = next((row for row, first in enumerate(rows) if first - left >= LEAST_GAP), len(rows))
        rows[row : row + 1] = [left]
        axes.annotate(
            phase.name, (phase.start, 1), xycoords=("data", "axes fraction"), fontsize=shape.letters, color=TEXT_COLOR,
            xytext=(0, 3 + row * 1.2 * shape.letters), textcoords="offset points",
            ha="left" if left == place else "right",
        )  # fmt: skip


def _left_of_name(place: float) -> float:
    """Where the name of a phase that begins at `place` begins: one near the end stands before it."""
    return place - LEAST_GAP if place > 1 - LEAST_GAP else place


def _draw_streams(axes: Axes, report: RunReport, shape: Shape) -> None:
    """The copies and computations of one pass."""
    assert report.stream is not None
    _dress(axes, shape)
    axes.set_yticks((1, 0), ("copy", "compute"))
    axes.set_ylim(-0.5, 1.5)
    # the middle one of those kept: the run's first still fills the ring, and all of them would be one solid bar
    index = len(report.passes) // 2
    start, end = report.passes[index]
    for row, color, intervals in ((1, COPY_COLOR, report.copies), (0, COMPUTE_COLOR, report.computes)):
        for first, last in _within(intervals, (start, end)):
            axes.barh(
                row, last - first, left=first - start, height=0.6, color=color, edgecolor=PAGE_COLOR, linewidth=0.6
            )
    axes.set_xlim(0, end - start)
    stream, number = report.stream, report.stream.num_passes - len(report.passes) + index + 1
    told = (
        f"pass {number} of {stream.num_passes}", f"{stream.gbps:.1f} GB/s",
        f"{stream.overlap_percent:.0f} % hidden", f"{stream.stall_ms_per_pass:.1f} ms stalled",
    )  # fmt: skip
    axes.text(
        ASIDE, 1, "\n".join(told), transform=axes.transAxes, va="top", color=TEXT_COLOR, fontsize=shape.letters,
        linespacing=1.1,
    )  # fmt: skip


def _within(intervals: Sequence[Interval], window: Interval) -> list[Interval]:
    """Each interval's part in the window; neighbours stay apart so that blocks can be told."""
    return [part for interval in intervals for part in intersect([interval], [window])]
