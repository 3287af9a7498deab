"""A card's measurements as a picture: products by form, attention by length, a pass of each model by budget."""

from __future__ import annotations

from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..system.card_profile import CardProfile
from .table import rate

SIZE_INCHES, DPI = (12.0, 7.0), 100
BAR_COLOR = "#3b6fb6"


def draw_card(profile: CardProfile) -> bytes:
    """A PNG of 1200 x 700 pixels."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    (products, attention), (link, steps) = figure.subplots(2, 2)
    note = "" if profile.complete else " (not complete)"
    figure.suptitle(f"{profile.card}, {profile.date}{note}", fontsize=10)
    _draw_products(products, profile)
    _draw_attention(attention, profile)
    _draw_link(link, profile)
    _draw_steps(steps, profile)
    png = BytesIO()
    canvas.print_png(png)
    return png.getvalue()


def _draw_products(axes: Axes, profile: CardProfile) -> None:
    """Each form's best rate, unpacking left out."""
    best: dict[str, float] = {}
    for row in profile.products:
        if row.tflops:
            best[row.form] = max(best.get(row.form, 0.0), row.tflops)
    axes.set_title("linear layers, TFLOP/s", fontsize=9)
    _bars(axes, list(best), list(best.values()))


def _draw_attention(axes: Axes, profile: CardProfile) -> None:
    axes.set_title("self-attention, TFLOP/s", fontsize=9)
    own = [row for row in profile.attention if row.tflops and row.queries == row.keys]
    for backend in dict.fromkeys(row.backend for row in own):
        points = sorted((row.keys, row.tflops or 0.0) for row in own if row.backend == backend)
        axes.plot([keys for keys, _ in points], [rate for _, rate in points], marker="o", markersize=3, label=backend)
    axes.set_xlabel("tokens", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_ylim(bottom=0)
    if own:
        axes.set_xscale("log")
        lengths = sorted({row.keys for row in own})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.legend(fontsize=8)


def _draw_link(axes: Axes, profile: CardProfile) -> None:
    axes.set_title("copies, GB/s (logarithmic)", fontsize=9)
    rates = [(row.way, row.gbps) for row in profile.link if row.gbps]
    rates += [("disk", row.gbps) for row in profile.disk if row.gbps]
    _bars(axes, [way for way, _ in rates], [rate or 0.0 for _, rate in rates])
    if rates:
        axes.set_xscale("log")


def _draw_steps(axes: Axes, profile: CardProfile) -> None:
    axes.set_title("one pass by VRAM budget, s (predicted, logarithmic)", fontsize=9)
    told = [row for row in profile.steps if row.seconds]
    for key in dict.fromkeys((row.model, row.form, row.height) for row in told):
        rows = [row for row in told if (row.model, row.form, row.height) == key]
        budgets = [row.budget_gib or 0.0 for row in rows]
        label = f"{key[0]} {key[1]}, {rows[0].width}x{rows[0].height}x{rows[0].frames}"
        axes.plot(budgets, [row.seconds or 0.0 for row in rows], marker="o", markersize=3, label=label)
    axes.set_xlabel("GiB", fontsize=8)
    axes.tick_params(labelsize=8)
    if told:
        axes.set_yscale("log")
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))


def _bars(axes: Axes, names: list[str], values: list[float]) -> None:
    axes.barh(range(len(names)), values, color=BAR_COLOR, height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    for place, value in enumerate(values):
        axes.annotate(f" {rate(value)}", (value, place), fontsize=7, va="center")
    axes.margins(x=0.12)
