"""Draws the house from its imports: python docs/picture.py writes docs/images/architecture.svg and the map's rooms.

A row is one of house.TIERS, a box a room, an arrow an import from one room into another that no longer way implies.
Rows are ordered and spaced as Sugiyama et al. draw layered graphs (1981): an arrow that passes rows has a place in each
of them, the order in a row is that of neighbours' means, and places are the nearest to those means that keep distance.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from textwrap import wrap

import house

PICTURE = house.ROOT / "docs" / "images" / "architecture.svg"
MAP = house.ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: python docs/picture.py -->", "<!-- end of rooms -->"
WIDTH, MARGIN = 920, 14
BOX_WIDTHS = {1: 420, 2: 330}  # by boxes in a row
BOX_WIDTH = 200  # where there are more
PADDING, HEAD, LINE = 10, 30, 13.5  # inside a box: at its sides, for its name, for each line of its purpose
CHARACTER = 5.9  # width of one in a purpose
ROW_GAP, BOX_GAP, LANE_GAP = 27, 14, 12
SWEEPS = 40
STRAIGHTNESS = (8.0, 3.0, 1.0)  # wanted of a line by how many of its ends are boxes
CORNER = 14  # of a box, which no line meets

# What stands together, by the first folders that match: its hue in light and dark.
GROUPS = (
    ("doors", "#b4540a", "#f0a868", ("cli", "nodes", "demo", "card")),
    ("families", "#1f6f43", "#7fcf9f", ("families", "wanvideo", "framepack")),
    ("running", "#1d5fa8", "#86b8f0", ("runtime", "vae", "memory")),
    ("weights", "#8a3a86", "#dd9ad8", ("weights",)),
    ("mathematics", "#4a5562", "#aab6c4", ("",)),
)

Arrow = tuple[str, str]


@dataclass(eq=False)
class Place:
    """A box, or where arrows into the room `name` pass a row; `x` is its middle."""

    name: str
    row: int
    width: float
    is_box: bool
    x: float = 0.0


def purpose(text: str) -> str:
    """The first line of a folder's `__init__`, without its full stop."""
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0].removesuffix(".")


def reduced(arrows: Iterable[Arrow]) -> set[Arrow]:
    """The arrows that follow from no other two or more (transitive reduction); they have no circle."""
    following: dict[str, set[str]] = {}
    for here, there in arrows:
        following.setdefault(here, set()).add(there)

    def reached(name: str) -> set[str]:
        return {name}.union(*(reached(other) for other in following.get(name, ())))

    return {
        (here, there)
        for here, others in following.items()
        for there in others
        if not any(there in reached(other) for other in others - {there})
    }


def arrows_down(modules: Mapping[str, str]) -> set[Arrow]:
    """Imports from one room into another in a lower row."""
    row = {name: index for index, names in enumerate(house.TIERS) for name in names}
    found = house.arrows(house.imports(modules), house.room)
    return {(here, there) for here, there in found if here in row and row[here] < row.get(there, -1)}


class Drawing:
    """The rows with all places in order, and `lines` between those of neighbouring rows.

    Arrows into one room share their places in the rows that they pass: they join on their way.
    """

    def __init__(self, arrows: Iterable[Arrow]):
        self.rows: list[list[Place]] = []
        for index, names in enumerate(house.TIERS):
            width = BOX_WIDTHS.get(len(names), BOX_WIDTH)
            self.rows.append([Place(name, index, width, is_box=True) for name in names])
        boxes = {place.name: place for row in self.rows for place in row}
        passing: dict[tuple[str, int], Place] = {}
        lines: dict[tuple[Place, Place], None] = {}
        for here, there in sorted(arrows):
            way = [boxes[here]]
            for index in range(boxes[here].row + 1, boxes[there].row):
                if (there, index) not in passing:
                    passing[there, index] = Place(there, index, 0.0, is_box=False)
                    self.rows[index].append(passing[there, index])
                way.append(passing[there, index])
            lines |= dict.fromkeys(pairwise([*way, boxes[there]]))
        self.lines = list(lines)
        self.above = {place: [upper for upper, lower in lines if lower is place] for row in self.rows for place in row}
        self.below = {place: [lower for upper, lower in lines if upper is place] for row in self.rows for place in row}
        self._order()
        self._space()

    def _order(self) -> None:
        """Few crossings: by the means of neighbours, the best of some sweeps, then by exchanges that help."""
        best, least = [list(row) for row in self.rows], self._crossings()
        for sweep in range(SWEEPS):
            down = sweep % 2 == 0
            for row in self.rows if down else reversed(self.rows):
                share = {place: (index + 0.5) / len(each) for each in self.rows for index, place in enumerate(each)}
                for place in row:
                    near = (self.above if down else self.below)[place]
                    place.x = sum(share[other] for other in near) / len(near) if near else share[place]
                row.sort(key=lambda place: (place.x, place.name))
            if (crossings := self._crossings()) < least:
                best, least = [list(row) for row in self.rows], crossings
        self.rows, improved = best, True
        while improved:
            improved = False
            for row in self.rows:
                for left in range(len(row) - 1):
                    row[left : left + 2] = row[left + 1], row[left]
                    if (crossings := self._crossings()) < least:
                        least, improved = crossings, True
                    else:
                        row[left : left + 2] = row[left + 1], row[left]

    def _crossings(self) -> int:
        order = {place: index for row in self.rows for index, place in enumerate(row)}
        found = 0
        for row in self.rows:
            ends = [(order[place], order[lower]) for place in row for lower in self.below[place]]
            found += sum(1 for a, b in ends for c, d in ends if a < c and b > d)
        return found

    def _space(self) -> None:
        """Straight lines, those past several rows before others."""
        for row in self.rows:
            for index, place in enumerate(row):
                place.x = WIDTH * (index + 0.5) / len(row)
        for sweep in range(20 * SWEEPS):
            for row in self.rows if sweep % 2 == 0 else reversed(self.rows):
                wanted = []
                for place in row:
                    near = [*self.above[place], *self.below[place]]
                    # by distance too: one bend is better than many slight ones
                    weights = [
                        STRAIGHTNESS[place.is_box + other.is_box] / (1 + abs(place.x - other.x)) for other in near
                    ]
                    total = sum(weight * other.x for weight, other in zip(weights, near, strict=True))
                    wanted.append((total, sum(weights)))
                for place, x in zip(row, _apart(row, wanted), strict=True):
                    place.x = x


def _apart(row: Sequence[Place], wanted: Sequence[tuple[float, float]]) -> list[float]:
    """The middles nearest to those wanted, as (weighted sum, weight), in order and apart (isotonic regression)."""
    offsets = [0.0]
    for left, right in pairwise(row):
        gap = BOX_GAP if left.is_box and right.is_box else LANE_GAP
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + gap)
    pools: list[tuple[float, float, int]] = []
    for (total, weight), offset in zip(wanted, offsets, strict=True):
        pools.append((total - weight * offset, weight, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            last, before = pools.pop(), pools.pop()
            pools.append((last[0] + before[0], last[1] + before[1], last[2] + before[2]))
    least = MARGIN + row[0].width / 2
    most = WIDTH - MARGIN - row[-1].width / 2 - offsets[-1]
    flat = [min(most, max(least, total / weight)) for total, weight, count in pools for _ in range(count)]
    return [x + offset for x, offset in zip(flat, offsets, strict=True)]


def ports(box: Place, ends: Iterable[Place]) -> dict[Place, float]:
    """Where lines from or to these places meet a box: straight below or above them, or nearly so, in their order."""
    ends = sorted(ends, key=lambda place: place.x)
    step = min(LANE_GAP, (box.width - 2 * CORNER) / max(1, len(ends)))
    least, found = box.x - box.width / 2 + CORNER, {}
    for index, place in enumerate(ends):
        most = box.x + box.width / 2 - CORNER - step * (len(ends) - 1 - index)
        found[place] = min(most, max(least, place.x))
        least = found[place] + step
    return found


def draw(modules: Mapping[str, str]) -> str:
    """The picture as SVG."""
    drawing = Drawing(reduced(arrows_down(modules)))
    texts = {house.room(path): purpose(text) for path, text in modules.items() if path.endswith("__init__.py")}
    sizes: dict[str, int] = {}
    for path, text in modules.items():
        sizes[house.room(path)] = sizes.get(house.room(path), 0) + house.code_lines(text)
    places = [place for row in drawing.rows for place in row]
    rooms = [place for place in places if place.is_box]
    wrapped = {
        room: wrap(texts[room.name].replace("`", ""), int((room.width - 2 * PADDING) / CHARACTER)) for room in rooms
    }
    tops, heights, y = [], [], float(MARGIN)
    for row in drawing.rows:
        tops.append(y)
        heights.append(HEAD + LINE * max(len(wrapped[place]) for place in row if place.is_box) + 4)
        y += heights[-1] + ROW_GAP
    lines = [_line(drawing, upper, lower, tops, heights) for upper, lower in drawing.lines]
    lines += [_passing(place, tops, heights) for place in places if not place.is_box]
    boxes = [_box(room, tops[room.row], heights[room.row], wrapped[room], sizes[room.name]) for room in rooms]
    height = y - ROW_GAP + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}"'
    title = "<title>The rooms of the house, row by row; arrows are imports, and run down only</title>"
    ground = f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="10"/>'
    return "\n".join([f'{head} height="{height:.0f}">', title, _style(), ground, *lines, *boxes, "</svg>", ""])


def _group(name: str) -> str:
    return next(group for group, _, _, tops in GROUPS if name.split("/")[0] in tops or "" in tops)


def _line(drawing: Drawing, upper: Place, lower: Place, tops: Sequence[float], heights: Sequence[float]) -> str:
    """A curve across the gap between two rows, with a head where it ends at a box."""
    start, end = tops[upper.row] + heights[upper.row], tops[lower.row]
    x = ports(upper, drawing.below[upper])[lower] if upper.is_box else upper.x
    to = ports(lower, drawing.above[lower])[upper] if lower.is_box else lower.x
    head = "l-3 0 3 5 3-5-3 0" if lower.is_box else ""
    end -= 5 if lower.is_box else 0
    middle = (start + end) / 2
    path = f"M{x:.1f} {start:.1f}C{x:.1f} {middle:.1f} {to:.1f} {middle:.1f} {to:.1f} {end:.1f}{head}"
    return f'<path class="arrow {_group(lower.name)}" d="{path}"/>'


def _passing(place: Place, tops: Sequence[float], heights: Sequence[float]) -> str:
    top = tops[place.row]
    return f'<path class="arrow {_group(place.name)}" d="M{place.x:.1f} {top:.1f}v{heights[place.row]:.1f}"/>'


def _box(place: Place, top: float, height: float, lines: Sequence[str], size: int) -> str:
    left = place.x - place.width / 2
    x, rounded = f"{left + PADDING:.1f}", max(50, round(size, -2) if size >= 100 else 50)
    text = "".join(
        f'<text class="purpose" x="{x}" y="{top + HEAD + 3 + LINE * index:.1f}">{escape(line)}</text>'
        for index, line in enumerate(lines)
    )
    return (
        f'<g class="{_group(place.name)}">'
        f'<rect class="box" x="{left:.1f}" y="{top:.1f}" width="{place.width}" height="{height:.1f}" rx="6"/>'
        f'<text class="name" x="{x}" y="{top + 18:.1f}">{place.name}/</text>'
        f'<text class="lines" x="{left + place.width - PADDING:.1f}" y="{top + 18:.1f}">{rounded:,} lines</text>'
        f"{text}</g>"
    )


def _style() -> str:
    light = "".join(f".{name}{{--hue:{hue}}}" for name, hue, _, _ in GROUPS)
    dark = "".join(f".{name}{{--hue:{hue}}}" for name, _, hue, _ in GROUPS)
    return (
        "<style>"
        "svg{--ground:#fbfbfa;--edge:#d9dcdf;--box:#ffffff;--text:#24292f;--quiet:#57606a;"
        "font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}"
        f"{light}"
        "@media (prefers-color-scheme:dark){svg{--ground:#12161c;--edge:#30363d;--box:#1b2129;--text:#e6edf3;"
        f"--quiet:#9aa5b1}}{dark}}}"
        ".ground{fill:var(--ground);stroke:var(--edge)}"
        ".box{fill:var(--box);stroke:var(--hue);stroke-width:1.3}"
        ".arrow{fill:none;stroke:var(--hue);stroke-width:1.3;opacity:.75}"
        ".name{font-size:13.5px;font-weight:600;fill:var(--hue)}"
        ".purpose{font-size:11px;fill:var(--text)}"
        ".lines{font-size:10.5px;fill:var(--quiet);text-anchor:end}"
        "</style>"
    )


def rooms_table(modules: Mapping[str, str]) -> str:
    """All folders of the package in words, those of one row under one number; the map has it as it is."""
    said = {house.room(path): purpose(text) for path, text in modules.items() if path.endswith("/__init__.py")}
    ranked = {name: str(row) for row, names in enumerate(house.TIERS, 1) for name in names}
    order = [*ranked, *sorted(said.keys() - ranked.keys())]
    lines = [f"| {ranked.get(name, '')} | `{name}/` | {said[name]}. |" for name in order]
    return "\n".join(["| row | room | what it is |", "| ---: | --- | --- |", *lines])


def with_table(text: str, table: str) -> str:
    """The map with this table between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    modules = house.sources()
    PICTURE.write_text(draw(modules), encoding="utf-8", newline="\n")
    MAP.write_text(with_table(MAP.read_text(encoding="utf-8"), rooms_table(modules)), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
