"""A card's measurements in words, for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..system.card_profile import CardProfile, ProductRow, StepRow
from ..system.sizes import GIB, in_gib

CPU_NOTE = "This is a CPU: sizes are small, and steps take what its RAM and cores would need for a whole model."


def describe_card(profile: CardProfile) -> str:
    """Everything that was measured, in tables."""
    lines = [str(profile.card), f"{in_gib(profile.memory_bytes)} of memory, measured {profile.date}"]
    if profile.quick:
        lines.append("A quick measurement: the widest layers and few lengths only.")
    if not profile.card.capability:
        lines.append(CPU_NOTE)
    if not profile.complete:
        lines.append("Not complete: it was stopped.")
    lines += ["", *_link(profile), "", *_attention(profile), "", *_products(profile), "", *_steps(profile)]
    return "\n".join(lines)


def _link(profile: CardProfile) -> list[str]:
    rows = [(row.way, _or_problem(row.gbps, "{:.1f} GB/s", row.problem)) for row in profile.link]
    for disk in profile.disk:
        past = "past the cache" if disk.direct else "through the system's cache"
        title = f"disk, {disk.read_bytes / GIB:.1f} GiB {past}" if disk.gbps else "disk"
        rows.append((title, _or_problem(disk.gbps, "{:.2f} GB/s", disk.problem)))
    if not profile.disk:
        rows.append(("disk", "not measured: --models FOLDER names the folder with your models"))
    return ["copies", *(f"  {title:<44}{figure}" for title, figure in rows)]


def _attention(profile: CardProfile) -> list[str]:
    lines = [
        "attention, heads of 128",
        f"  {'backend':<16}{'queries x keys':<18}{'ms':>10}{'TFLOP/s':>10}{'error':>10}",
    ]
    for row in profile.attention:
        if row.problem is not None:
            lines.append(f"  {row.backend:<16}{row.problem}")
            continue
        lines.append(
            f"  {row.backend:<16}{f'{row.queries} x {row.keys}':<18}{row.milliseconds:>10.2f}{rate(row.tflops):>10}"
            f"{_percent(row.relative_error):>10}"
        )
    return lines


def _products(profile: CardProfile) -> list[str]:
    lines = [
        "linear layers, by how the weight is stored and multiplied",
        f"  {'form':<24}{'layer':<16}{'ms':>10}{'unpack ms':>11}{'TFLOP/s':>10}{'of plain':>10}{'error':>10}",
    ]
    plain = {(row.inputs, row.outputs, row.rows): row for row in profile.products if row.form == "plain" and row.tflops}
    for row in profile.products:
        if row.problem is None:
            lines.append(_product(row, plain.get((row.inputs, row.outputs, row.rows))))
    for form, problem in _problems(profile.products):
        lines.append(f"  {form:<24}{problem}")
    return lines


def _product(row: ProductRow, plain: ProductRow | None) -> str:
    of_plain = ""
    if plain is not None and plain.milliseconds and row.milliseconds is not None:
        of_plain = f"{row.milliseconds / plain.milliseconds:.2f}x"
    layer = f"{row.inputs} -> {row.outputs}"
    return (
        f"  {row.form:<24}{layer:<16}{row.milliseconds:>10.3f}{row.prepare_milliseconds:>11.3f}"
        f"{rate(row.tflops):>10}{of_plain:>10}{_percent(row.relative_error):>10}"
    )


def _problems(rows: Iterable[ProductRow]) -> Sequence[tuple[str, str]]:
    """Each form's problem once; by layer where only some have one."""
    rows = list(rows)
    found: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.problem is not None:
            whole = all(other.problem == row.problem for other in rows if other.form == row.form)
            form = row.form if whole else f"{row.form} {row.inputs} -> {row.outputs}"
            found[form, row.problem] = row.problem
    return [(form, problem) for form, problem in found]


def _steps(profile: CardProfile) -> list[str]:
    lines = ["one pass, predicted (guidance takes two a step)"]
    groups: dict[tuple[object, ...], list[StepRow]] = {}
    for row in profile.steps:
        groups.setdefault((row.model, row.form, row.width, row.height, row.frames), []).append(row)
    for (model, form, width, height, frames), rows in groups.items():
        lines.append(f"  {model} {form}, {width}x{height}, {frames} frames")
        lines += [f"    {_budget(row):<12}{_step(row)}" for row in rows]
    return lines if groups else [*lines, "  not predicted: it was stopped before"]


def _budget(row: StepRow) -> str:
    return "in RAM" if row.budget_gib is None else f"{row.budget_gib:g} GiB"


def _step(row: StepRow) -> str:
    if row.problem is not None or row.seconds is None:
        return row.problem or "not predicted"
    where = "all on the card" if not row.num_streamed else f"{row.num_streamed} of {row.num_blocks} blocks streamed"
    if row.budget_gib is None:
        return f"{row.seconds:.1f} s"
    waits = ", waits for copies" if (row.transfer_seconds or 0) > (row.compute_seconds or 0) else ""
    return f"{row.seconds:.2f} s, {where}{waits}"


def _or_problem(figure: float | None, form: str, problem: str | None) -> str:
    return problem or "not measured" if figure is None else form.format(figure)


def rate(value: float | None) -> str:
    """Three digits, and all of those before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f} %"
