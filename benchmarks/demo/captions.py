"""What the demo model knows: captions such as "a red ball moves slowly left at night"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

RGB = tuple[float, float, float]

# Saturated and at least 40 degrees of hue apart, so that a mean colour names exactly one of them.
COLOURS: Mapping[str, RGB] = {
    "red": (0.90, 0.10, 0.12),
    "yellow": (0.98, 0.84, 0.08),
    "green": (0.12, 0.72, 0.20),
    "cyan": (0.10, 0.82, 0.90),
    "blue": (0.12, 0.25, 0.95),
    "pink": (0.98, 0.25, 0.72),
}
SHAPES: tuple[str, ...] = ("ball", "square", "triangle")
DIRECTIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Distance from the first frame to the last, as a fraction of the frame's side.
SPEEDS: Mapping[str, float] = {"": 0.32, "slowly": 0.18, "quickly": 0.48}
# Colour at the top and at the bottom edge; nearly grey, so that only the object is saturated.
PLACES: Mapping[str, tuple[RGB, RGB]] = {
    "": ((0.56, 0.57, 0.60), (0.40, 0.41, 0.43)),
    "at night": ((0.02, 0.02, 0.05), (0.09, 0.09, 0.13)),
    "in the snow": ((0.86, 0.88, 0.91), (0.97, 0.97, 0.98)),
}


@dataclass(frozen=True)
class Caption:
    """One clip in words; `speed` and `place` may be empty (middle speed, grey background).

    Raises `ValueError` when a field is not one of the known words.
    """

    colour: str
    shape: str
    direction: str
    speed: str = ""
    place: str = ""

    def __post_init__(self) -> None:
        for field, known in _VOCABULARY.items():
            value = getattr(self, field)
            if value not in known:
                allowed = ", ".join(repr(word) for word in known)
                raise ValueError(f"caption {field} {value!r} is unknown to the demo model; use one of {allowed}")

    @property
    def text(self) -> str:
        words = ("a", self.colour, self.shape, "moves", self.speed, self.direction, self.place)
        return " ".join(word for word in words if word)

    @classmethod
    def parse(cls, text: str) -> Caption:
        """Reads `text` back; articles, verbs, case and a full stop are free, unknown colours and the like are not.

        Raises `ValueError` when the colour, the shape or the direction is missing or named twice.
        """
        words = " ".join(text.lower().replace(".", " ").replace(",", " ").split())
        found: dict[str, str] = {}
        for field, known in _VOCABULARY.items():
            named = [word for word in known if word and f" {word} " in f" {words} "]
            if len(named) > 1 or (not named and "" not in known):
                allowed = ", ".join(repr(word) for word in known if word)
                what = f"{len(named)} of them" if named else "none"
                raise ValueError(f"prompt {text!r} should name one {field} of {allowed}; it names {what}")
            found[field] = named[0] if named else ""
        return cls(**found)


_VOCABULARY: Mapping[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
    "place": tuple(PLACES),
}


def all_captions() -> list[Caption]:
    """Every caption the demo model was trained on, in a fixed order (648)."""
    return [Caption(*words) for words in product(*_VOCABULARY.values())]


def phrasings(caption: Caption) -> list[str]:
    """The ways of saying `caption` that the text encoder is trained on; the first is `caption.text`."""
    tail = " ".join(word for word in (caption.speed, caption.direction, caption.place) if word)
    return [
        f"{article} {caption.colour} {caption.shape} {verb} {tail}{stop}"
        for article, verb, stop in product(("a", "the"), ("moves", "moving", "goes", "is moving"), ("", "."))
    ]
