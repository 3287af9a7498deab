"""What PyTorch's compiler has done so far, as numbers that are read before and after."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields
from typing import Any

# in why dynamo gave up, or in the name of the error that whole graphs end with
AT_LIMIT = re.compile(r"(recompile|cache)[_ ]?(size[_ ])?limit", re.IGNORECASE)


@dataclass(frozen=True)
class Counts:
    """Of this process: graphs and breaks of them, what caches had of the code, how often a limit let none be made."""

    graphs: int = 0
    breaks: int = 0
    hits: int = 0
    misses: int = 0
    bypasses: int = 0
    limits: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


NONE = Counts()


@dataclass(frozen=True)
class Event:
    """Dynamo looked at a function: how long all of its compiling took, why again (empty: the first).

    `why_not` is why no code was made of it (empty: some was).
    """

    function: str
    seconds: float
    why_again: str
    why_not: str = ""

    @property
    def is_at_limit(self) -> bool:
        """Whether a function has as many versions as it may: it runs as plain PyTorch where none of them fits."""
        return bool(AT_LIMIT.search(self.why_not))


def counts() -> Counts:
    """All zero while the compiler is not imported."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return Counts()
    found = utils.counters
    inductor, autograd = found["inductor"], found["aot_autograd"]
    return Counts(
        int(found["stats"]["unique_graphs"]),
        sum(found["graph_break"].values()),
        # code that is found with its graph is not looked for by itself, or is counted by both caches
        max(int(inductor["fxgraph_cache_hit"]), int(autograd["autograd_cache_hit"])),
        int(inductor["fxgraph_cache_miss"]),
        int(inductor["fxgraph_cache_bypass"]),
        sum(number for why, number in found["unimplemented"].items() if AT_LIMIT.search(why)),
    )


def events(since_us: int) -> list[Event]:
    """What dynamo looked at from a moment on, in microseconds of `time.time`; it remembers the last 64."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    if utils is None or not hasattr(utils, "get_compilation_metrics"):
        return []
    found = []
    for each in utils.get_compilation_metrics():
        began = getattr(each, "start_time_us", None) or 0
        if began >= since_us:
            total = getattr(each, "duration_us", None)
            seconds = total / 1e6 if total else float(getattr(each, "entire_frame_compile_time_s", None) or 0.0)
            why = getattr(each, "recompile_reason", None) or ""
            why_not = " ".join(getattr(each, name, None) or "" for name in ("fail_type", "fail_reason")).strip()
            found.append(Event(getattr(each, "co_name", None) or "?", seconds, why, why_not))
    return found
