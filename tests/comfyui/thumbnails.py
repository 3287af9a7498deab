"""Draws example_workflows/*.jpg, which the page shows of each template: its title, and frames of the demo model.

Run it as `python -m tests.comfyui.thumbnails` in the repository's folder. The frames are those of
docs/images/demo.webp: what large models make is not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from .workflows import FOLDER, NAMES, load

CLIPS = Path(__file__).parents[2] / "docs" / "images" / "demo.webp"
COLUMNS, ROWS, TILE = 3, 2, 192  # of the clips, in pixels
SIDE, MARGIN, FRAME, BAND = 640, 20, 200, 440
PAGE, LETTERS, FAINT = "#202124", "#f2f2f2", "#c8c8c8"
BANDS = {"framepack": "#3f7d58", "flashvsr": "#9a6a2f", "wan": "#35618e", "": "#666666"}  # by the file's name
MARKS = "✓  ✓\n✗  ✓"


def draw(name: str, clip: int) -> Image.Image:
    """A workflow's picture of SIDE x SIDE pixels; `clip` is one of those that its frames are taken from."""
    picture = Image.new("RGB", (SIDE, SIDE), PAGE)
    pen = ImageDraw.Draw(picture)
    colour = next(colour for begin, colour in BANDS.items() if name.startswith(begin))
    pen.rectangle((0, BAND, SIDE, SIDE), fill=colour)  # below: the page has a mark of its own in the upper left corner
    pen.multiline_text((MARGIN, BAND + 80), _title(name), LETTERS, _font(44), anchor="lm", spacing=6)
    if name == "doctor":
        pen.multiline_text((SIDE / 2, BAND / 2), MARKS, "#6cc07e", _font(120), anchor="mm", align="center", spacing=30)
        return picture
    frames = _frames(clip)
    if "upscale" in name:
        small, large = frames[0].resize((100, 100)), frames[0].resize((400, 400), Image.Resampling.LANCZOS)
        picture.paste(small, (MARGIN, 320))
        pen.text((170, 370), "→", LETTERS, _font(60), anchor="mm")
        picture.paste(large, (220, MARGIN))
    else:
        for index, frame in enumerate(frames):
            place = (MARGIN // 2 + 210 * (index % COLUMNS), MARGIN // 2 + 210 * (index // COLUMNS))
            picture.paste(frame.resize((FRAME, FRAME), Image.Resampling.LANCZOS), place)
    pen.text((SIDE - 12, SIDE - 10), "frames of the pack's demo model", FAINT, _font(18), anchor="rb")
    return picture


def _title(name: str) -> str:
    """The first line of its note, in lines of the picture's width."""
    note = next(node["widgets_values"][0] for node in load(name)["nodes"] if node["type"] == "MarkdownNote")
    return "\n".join(wrap(note.splitlines()[0].removeprefix("# "), 21)[:3])


def _frames(clip: int) -> Sequence[Image.Image]:
    """Six frames of a clip, from its first to its last one."""
    left, top = TILE * (clip % COLUMNS), TILE * (clip // COLUMNS)
    with Image.open(CLIPS) as clips:
        found = []
        for index in range(6):
            clips.seek(index * (clips.n_frames - 1) // 5)
            found.append(clips.convert("RGB").crop((left, top, left + TILE, top + TILE)))
    return found


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf"), size)


if __name__ == "__main__":
    for index, each in enumerate(NAMES):
        draw(each, index % (COLUMNS * ROWS)).save(FOLDER / f"{each}.jpg", quality=85, optimize=True)
