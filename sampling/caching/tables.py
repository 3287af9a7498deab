"""Tables that step caches decide by: those that others published, and those that `calibrate` measured of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...system.atomic_files import write_file
from ...system.bounded_json import JsonError, parse_json, read_json_object
from .rules import FirstBlockRule, MagRule, Rule, TeaRule
from .settings import FIRST_BLOCK, MAGCACHE, TEACACHE, StepCacheSettings

PUBLISHED = Path(__file__).with_name("published.json")
SUFFIX = ".step_cache.json"  # of a model's own table, beside the model's file
FIRST_BLOCK_THRESHOLD = 0.1
MAGCACHE_SKIPS = 4  # in a row, where nobody says otherwise: published as K, 2 to 4
FORMAT = 1
MOST_BYTES = 1 << 20
DEGREES = range(1, 9)
CALIBRATE = "measure the model: lowvram-video calibrate"


class TableError(ValueError):
    """A file that holds no table of a step cache."""


@dataclass(frozen=True)
class TeaTable:
    """A polynomial, highest power first, and the usual threshold."""

    polynomial: tuple[float, ...]
    threshold: float

    def __post_init__(self) -> None:
        if len(self.polynomial) - 1 not in DEGREES or not all(map(math.isfinite, self.polynomial)):
            raise TableError(f"a polynomial of {len(self.polynomial)} coefficients, expected 2 to 9 finite numbers")
        _check_threshold(self.threshold)


@dataclass(frozen=True)
class MagTable:
    """The ratio of each step's residual to that of the step before, for the prompt and for the negative one."""

    cond: tuple[float, ...]
    uncond: tuple[float, ...]
    threshold: float

    def __post_init__(self) -> None:
        for ratios in (self.cond, self.uncond):
            if not 2 <= len(ratios) <= 1000 or not all(0.01 <= ratio <= 100 for ratio in ratios):
                raise TableError("ratios of residuals are 2 to 1000 numbers around 1, one for each step")
        _check_threshold(self.threshold)


@dataclass(frozen=True)
class CacheTable:
    """What is known of one model. `verified` tells whether it was measured of the model's own file."""

    name: str
    teacache: TeaTable | None = None
    magcache: MagTable | None = None
    verified: bool = False
    model: str = ""  # the file's fingerprint

    def __str__(self) -> str:
        other = "measured of another file" if self.model else "published, not verified here"
        return f"{self.name} ({'measured of this file' if self.verified else other})"

    def check(self, method: str) -> None:
        """ValueError where it has nothing for a method."""
        if method != FIRST_BLOCK and getattr(self, method) is None:
            other = MAGCACHE if method == TEACACHE else TEACACHE
            others = [name for name in (other, FIRST_BLOCK) if name == FIRST_BLOCK or getattr(self, name) is not None]
            raise ValueError(f"no {method} table is known for {self.name}: use {' or '.join(others)}, or {CALIBRATE}")

    def threshold(self, settings: StepCacheSettings) -> float:
        """The one that was asked for, or the usual one of the method."""
        if settings.threshold is not None:
            return settings.threshold
        if settings.method == FIRST_BLOCK:
            return FIRST_BLOCK_THRESHOLD
        found: TeaTable | MagTable = getattr(self, settings.method)
        return found.threshold

    def max_skips(self, settings: StepCacheSettings) -> int:
        """The most passes in a row that are skipped; 0: any number."""
        return settings.max_skips or (MAGCACHE_SKIPS if settings.method == MAGCACHE else 0)

    def rule(self, method: str, kinds: Sequence[int]) -> Rule:
        """For a batch of prompts of these kinds: 0 prompts, 1 negative ones."""
        if method == TEACACHE:
            assert self.teacache is not None
            return TeaRule(self.teacache.polynomial)
        if method == FIRST_BLOCK:
            return FirstBlockRule(len(kinds))
        assert self.magcache is not None
        return MagRule([self.magcache.uncond if kind else self.magcache.cond for kind in sorted(set(kinds))])

    def to_json(self) -> bytes:
        """What `read_table` reads."""
        content: dict[str, Any] = {"format": FORMAT, "name": self.name, "model": self.model}
        if self.teacache is not None:
            content["teacache"] = vars(self.teacache)
        if self.magcache is not None:
            content["magcache"] = vars(self.magcache)
        return json.dumps(content, indent=1).encode("utf-8")

    def save(self, path: Path) -> None:
        write_file(path, self.to_json())


def published_tables() -> Mapping[str, CacheTable]:
    """By name, those that others measured."""
    content = parse_json(PUBLISHED.read_bytes())
    return {each["name"]: _table(each) for each in content["tables"]}


def read_table(path: Path, model: str = "") -> CacheTable:
    """The table of a file that `calibrate` wrote; verified where it is of the file with the fingerprint `model`.

    TableError where it is none.
    """
    remedy = f"give a file that `lowvram-video calibrate` wrote, or {CALIBRATE}"
    try:
        content = read_json_object(path, MOST_BYTES)
        if content.get("format") != FORMAT:
            raise TableError(f"its format is {content.get('format')!r}, expected {FORMAT}")
        return _table(content, model)
    except OSError as error:
        raise TableError(f"{path}: {error.strerror or error}: {remedy}") from error
    except (JsonError, TableError, KeyError, TypeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise TableError(f"{path} is no table of a step cache ({why}): {remedy}") from error


def _table(content: Mapping[str, Any], model: str = "") -> CacheTable:
    tea, mag = content.get("teacache"), content.get("magcache")
    if tea is None and mag is None and "format" in content:
        raise TableError("it has neither teacache nor magcache")
    own = str(content.get("model", ""))
    return CacheTable(
        str(content["name"]),
        None if tea is None else TeaTable(_numbers(tea["polynomial"]), float(tea["threshold"])),
        None if mag is None else MagTable(_numbers(mag["cond"]), _numbers(mag["uncond"]), float(mag["threshold"])),
        bool(model) and own == model,
        own,
    )


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _check_threshold(threshold: float) -> None:
    if not (math.isfinite(threshold) and threshold >= 0):
        raise TableError(f"a threshold of {threshold}, expected a number from 0 up")
