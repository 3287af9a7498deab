"""A run as a picture: the memory curve under its budget, and the copy and compute streams of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..plan.footprint import GIB
from .intervals import Interval, intersect
from .report import RunReport

SIZE_INCHES, DPI = (10.0, 5.0), 120
MEMORY_COLOR, BUDGET_COLOR, COPY_COLOR, COMPUTE_COLOR = "#3b6fb6", "#c0392b", "#e08e2b", "#4c9a5b"


def draw_timeline(report: RunReport) -> bytes:
    """The report as a PNG of 1200 x 600 pixels."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    memory, streams = figure.subplots(2, 1, gridspec_kw={"height_ratios": (3, 2)})
    _draw_memory(memory, report)
    _draw_streams(streams, report)
    png = BytesIO()
    canvas.print_png(png)
    return png.getvalue()


def _draw_memory(axes: Axes, report: RunReport) -> None:
    seconds = [sample.seconds for sample in report.samples]
    used = [max(0, sample.device_bytes - report.other_bytes) / GIB for sample in report.samples]
    axes.fill_between(seconds, used, color=MEMORY_COLOR, alpha=0.25, linewidth=0)
    axes.plot(seconds, used, color=MEMORY_COLOR, linewidth=1.2, label="VRAM in use")
    if report.budget_bytes is not None:
        axes.axhline(report.budget_bytes / GIB, color=BUDGET_COLOR, linestyle="--", linewidth=1.2, label="budget")
    for phase in report.phases:
        axes.axvline(phase.start, color="0.6", linewidth=0.8)
        axes.annotate(
            phase.name, (phase.start, 1), xycoords=("data", "axes fraction"), xytext=(3, -11),
            textcoords="offset points", fontsize=8, color="0.3",
        )  # fmt: skip
    axes.set_ylim(0, 1.2 * max([*used, (report.budget_bytes or 0) / GIB, 0.1]))  # room for the phases' names
    axes.margins(x=0)
    axes.set_ylabel("GiB")
    axes.set_xlabel("seconds")
    axes.legend(loc="lower right", fontsize=8)


def _draw_streams(axes: Axes, report: RunReport) -> None:
    axes.set_yticks((1, 0), ("copy", "compute"))
    axes.set_ylim(-0.5, 1.5)
    if report.stream is None or not report.passes:
        axes.set_title("no blocks were streamed", fontsize=9)
        return
    # the middle one of those kept: the run's first still fills the ring, and all of them would be one solid bar
    index = len(report.passes) // 2
    start, end = report.passes[index]
    for row, color, intervals in ((1, COPY_COLOR, report.copies), (0, COMPUTE_COLOR, report.computes)):
        for first, last in _within(intervals, (start, end)):
            axes.barh(row, last - first, left=first - start, height=0.6, color=color, edgecolor="white", linewidth=0.4)
    axes.set_xlim(0, end - start)
    axes.set_xlabel("seconds into the pass")
    stream, number = report.stream, report.stream.num_passes - len(report.passes) + index + 1
    figures = f"{stream.gbps:.1f} GB/s, {stream.overlap_percent:.0f} % of the copying behind compute"
    stalled = f"{stream.stall_ms_per_pass:.1f} ms stalled per pass"
    axes.set_title(f"pass {number} of {stream.num_passes}: {figures}, {stalled}", fontsize=9)


def _within(intervals: Sequence[Interval], window: Interval) -> list[Interval]:
    """Each interval's part in the window; neighbours stay apart so that blocks can be told."""
    return [part for interval in intervals for part in intersect([interval], [window])]
