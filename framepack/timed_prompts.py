"""Prompts with times: `"a man stands in a street [2s: a woman waves] [3s-5s: they walk]"`.

Times are seconds of the finished video, in whatever order its sections are generated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .sections import Section

# Chinese and Japanese keyboards write brackets, colons, points, dashes and digits full-width (float knows such digits).
_SAME_BRACKETS = str.maketrans("［］【】〔〕", "[][][]")
_SECONDS = r"(\d+(?:[.．]\d*)?|[.．]\d+)\s*[sｓ秒]"
_PART = re.compile(rf"\s*{_SECONDS}\s*(?:[-－‐‑–—―−~～〜]\s*{_SECONDS}\s*)?[:：﹕︰∶](.*)", re.DOTALL | re.IGNORECASE)
_HOW = "write [2s: text] (from 2 s on) or [1s-3s: text] (from 1 s to 3 s)"


@dataclass(frozen=True)
class TimedPart:
    """One bracket: `prompt` from `start` seconds on, to `end` or (None) to the start of the next part."""

    start: float
    end: float | None
    prompt: str


@dataclass(frozen=True)
class TimedPrompt:
    """What is said when.

    `parts` are in order of time and do not overlap. Where none holds, the text outside the brackets, `base`, does;
    without one, the last part without an end does, or else the nearest part. Neighbours mix linearly over `cross_fade`
    seconds around the moment one takes over from the other.
    """

    base: str
    parts: tuple[TimedPart, ...] = ()
    cross_fade: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cross_fade) and self.cross_fade >= 0.0):
            raise ValueError(f"cross_fade is {self.cross_fade}; expected 0 (no fade) or a number of seconds.")

    def prompts_at(self, section: Section) -> list[tuple[str, float]]:
        """Return the (prompt, weight) of a section, in order of time; weights are above 0 and sum to 1.

        A section has one set of prompts: those in the middle of the stretch that it covers.
        """
        return self.prompts_at_time(sum(section.seconds) / 2)

    def prompts_at_time(self, seconds: float) -> list[tuple[str, float]]:
        """Return the (prompt, weight) at a moment of the finished video, as in `prompts_at`."""
        line = self._timeline()
        shares = [1.0, *(self._faded_in(start, seconds) for start, _ in line[1:]), 0.0]
        weights: dict[str, float] = {}
        for index, (_, prompt) in enumerate(line):
            weight = shares[index] - shares[index + 1]
            if weight > 0.0:
                weights[prompt] = weights.get(prompt, 0.0) + weight
        return list(weights.items())

    def prompts(self) -> tuple[str, ...]:
        """Return every prompt that holds at some time, in order of time, each once."""
        return tuple(dict.fromkeys(prompt for _, prompt in self._timeline()))

    def unused(self, sections: Iterable[Section]) -> tuple[str, ...]:
        """Return the prompts that no section gets: covered by others, or held for less than a section."""
        used = {prompt for section in sections for prompt, _ in self.prompts_at(section)}
        said = dict.fromkeys((self.base, *self.prompts()) if self.base else self.prompts())
        return tuple(prompt for prompt in said if prompt not in used)

    def _faded_in(self, start: float, seconds: float) -> float:
        """How far the prompt that takes over at `start` has done so."""
        if self.cross_fade == 0.0:
            return float(seconds >= start)
        return min(1.0, max(0.0, (seconds - start) / self.cross_fade + 0.5))

    def _timeline(self) -> list[tuple[float, str]]:
        """Return (start, prompt) without a gap, from 0 on; neighbours differ."""
        parts = self.parts
        if not parts:
            return [(0.0, self.base)]
        line = [(0.0, self.base or parts[0].prompt)]
        resting = self.base  # what holds where no part does
        for index, part in enumerate(parts):
            line.append((part.start, part.prompt))
            if part.end is None and not self.base:
                resting = part.prompt
            next_start = parts[index + 1].start if index + 1 < len(parts) else math.inf
            if part.end is not None and part.end < next_start:
                line.append((part.end, resting or part.prompt))
        return _without_repeats(line)


def parse_timed_prompt(text: str, cross_fade: float = 0.0) -> TimedPrompt:
    """Read a prompt with or without timed parts in brackets, `[2s: text]` or `[1s-3s: text]`, also full-width ones.

    `cross_fade` is in seconds. Raises ValueError for brackets that are not timed parts, and parts that contradict each
    other, quoting them.
    """
    outside, brackets = _split(text)
    parts = tuple(sorted((_parse_part(bracket) for bracket in brackets), key=lambda part: part.start))
    for index, part in enumerate(parts[1:]):
        _check_order(parts[index], part)
    return TimedPrompt(" ".join(" ".join(outside).split()), parts, cross_fade)


def _split(text: str) -> tuple[list[str], list[str]]:
    """Return the texts outside and inside brackets."""
    outside: list[str] = []
    inside: list[str] = []
    rest = text.translate(_SAME_BRACKETS)
    while True:
        before, opening, rest = rest.partition("[")
        if "]" in before:
            raise ValueError(f"The prompt has a ']' without a '[' after {_tail(before.partition(']')[0])!r}; {_HOW}.")
        outside.append(before)
        if not opening:
            return outside, inside
        content, closing, rest = rest.partition("]")
        if not closing or "[" in content:
            raise ValueError(f"The bracket '[{_head(content)}' is not closed before the next one or the end; {_HOW}.")
        inside.append(content)


def _parse_part(bracket: str) -> TimedPart:
    match = _PART.fullmatch(bracket)
    if match is None:
        raise ValueError(
            f"'[{bracket}]' does not begin with a time; {_HOW}. Brackets mean nothing else here: use ( ) in prompts."
        )
    start, end = _seconds(match[1]), None if match[2] is None else _seconds(match[2])
    prompt = " ".join(match[3].split())
    if not prompt:
        raise ValueError(f"'[{bracket}]' has a time but no text; {_HOW}.")
    if end is not None and end <= start:
        raise ValueError(f"'[{bracket}]' ends at {end:g} s but starts at {start:g} s; the end has to come later.")
    return TimedPart(start, end, prompt)


def _seconds(number: str) -> float:
    return float(number.replace("．", "."))


def _check_order(earlier: TimedPart, later: TimedPart) -> None:
    if later.start == earlier.start:
        raise ValueError(
            f"{earlier.prompt!r} and {later.prompt!r} both start at {later.start:g} s; give one of them another time."
        )
    if earlier.end is not None and later.start < earlier.end:
        raise ValueError(
            f"{later.prompt!r} starts at {later.start:g} s, before {earlier.prompt!r} ends at {earlier.end:g} s; end "
            f"the first at {later.start:g} s or start the second at {earlier.end:g} s."
        )


def _without_repeats(line: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Drop stretches of no length and changes to the same prompt."""
    kept: list[tuple[float, str]] = []
    for start, prompt in line:
        if kept and kept[-1][0] == start:
            kept.pop()
        if not kept or kept[-1][1] != prompt:
            kept.append((start, prompt))
    return kept


def _head(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."


def _tail(text: str) -> str:
    return text if len(text) <= 40 else "..." + text[-40:]
