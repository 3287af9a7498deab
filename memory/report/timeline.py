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

SIZE_INCHES, DPI = (7.5, 6.0), 160
PAGE_COLOR, TEXT_COLOR, FAINT_COLOR = "#202124", "#e4e4e4", "#8a8a8a"  # of ComfyUI's dark page
MEMORY_COLOR, BUDGET_COLOR, COPY_COLOR, COMPUTE_COLOR = "#6ea8fe", "#ff7b72", "#f0a84b", "#6cc07e"
PREDICTED_COLOR = "#ffd866"
LARGE, SMALL = 14, 12  # points: legible where a node shows the picture at 40 % of its size
LEAST_GAP = 0.16  # between the names of two phases, as a part of the whole run


def draw_timeline(report: RunReport) -> bytes:
    """The report as a PNG of 1200 x 960 pixels: memory over time, and one pass if blocks were streamed."""
    png = BytesIO()
    timeline_canvas(report).print_png(png)
    return png.getvalue()


def timeline_canvas(report: RunReport) -> FigureCanvasAgg:
    """The same picture, to be drawn."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained", facecolor=PAGE_COLOR)
    canvas = FigureCanvasAgg(figure)
    streamed = report.stream is not None and bool(report.passes)
    if streamed:
        memory, streams = figure.subplots(2, 1, gridspec_kw={"height_ratios": (3, 2)})
        _draw_streams(streams, report)
        _dress(streams)
    else:
        memory = figure.subplots()
    _draw_memory(memory, report)
    _dress(memory)
    return canvas


def _dress(axes: Axes) -> None:
    """The page's colours and letters of a legible size."""
    axes.set_facecolor(PAGE_COLOR)
    axes.tick_params(colors=TEXT_COLOR, labelsize=SMALL)
    for spine in axes.spines.values():
        spine.set_color(FAINT_COLOR)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(TEXT_COLOR)
        text.set_fontsize(LARGE)


def _draw_memory(axes: Axes, report: RunReport) -> None:
    """VRAM under its budget with the peaks that were predicted; RAM where no VRAM was used."""
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
    _name_phases(axes, report, max([*seconds, *(phase.start + phase.seconds for phase in report.phases), 1e-3]))
    axes.set_ylim(0, 1.25 * max(tops))  # room for the phases' names
    axes.margins(x=0)
    axes.set_ylabel("GiB")
    axes.set_xlabel("seconds")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, fontsize=SMALL, labelcolor=TEXT_COLOR, frameon=False
    )


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


def _name_phases(axes: Axes, report: RunReport, total: float) -> None:
    """Where each phase begins, and its name; names of short phases go below the one before."""
    rows: list[float] = []  # where the last name in each row began
    for phase in report.phases:
        axes.axvline(phase.start, color=FAINT_COLOR, linewidth=1)
        place = phase.start / total
        near_end = place > 1 - LEAST_GAP
        left = place - LEAST_GAP if near_end else place
        row = next((row for row, last in enumerate(rows) if left - last >= LEAST_GAP), len(rows))
        rows[row : row + 1] = [left]
        axes.annotate(
            phase.name, (phase.start, 1), xycoords=("data", "axes fraction"), fontsize=SMALL, color=TEXT_COLOR,
            xytext=(-4 if near_end else 4, -SMALL - 4 - row * (SMALL + 4)), textcoords="offset points",
            ha="right" if near_end else "left",
        )  # fmt: skip


def _draw_streams(axes: Axes, report: RunReport) -> None:
    """The copies and computations of one pass."""
    assert report.stream is not None
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
    axes.set_xlabel("seconds into the pass")
    stream, number = report.stream, report.stream.num_passes - len(report.passes) + index + 1
    stalled = f"{stream.overlap_percent:.0f} % of copies behind compute, {stream.stall_ms_per_pass:.1f} ms stalled"
    axes.set_title(f"pass {number} of {stream.num_passes}: {stream.gbps:.1f} GB/s\n{stalled}")


def _within(intervals: Sequence[Interval], window: Interval) -> list[Interval]:
    """Each interval's part in the window; neighbours stay apart so that blocks can be told."""
    return [part for interval in intervals for part in intersect([interval], [window])]
