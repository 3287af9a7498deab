"""The passes of one model's runs that may be skipped: a cache for each prompt, the log and the report of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...system.sizes import in_gib
from .moments import SAME, Moment
from .pass_cache import PassCache
from .settings import FEW_STEPS, StepCacheSettings
from .tables import CacheTable

logger = logging.getLogger(__name__)

Prompts = tuple[tuple[int, Hashable], ...]  # of a batch: (0 for a prompt, 1 for a negative one; which)
MOST_PROMPTS = 16  # in turn, such as windows of a long video; more are computed


@dataclass(frozen=True)
class CacheReading:
    """What a step cache did in a run: of each step the passes, and how many of them were skipped."""

    label: str
    passes: tuple[tuple[int, int, int], ...] = ()  # (step, passes, skipped), steps counted from 0
    residual_bytes: int = 0
    in_ram: bool = False
    off: str = ""  # why nothing is skipped

    def lines(self) -> list[str]:
        """Of the report: how steps were skipped, and which."""
        if self.off:
            return [f"step cache: {self.off}"]
        skips = {step: skips for step, _, skips in self.passes if skips}
        whole = [step for step, passes, skips in self.passes if skips == passes]
        num_passes = sum(passes for _, passes, _ in self.passes)
        which = f" (steps {', '.join(str(step + 1) for step in skips)})" if skips else ""
        kept = f"; residuals {in_gib(self.residual_bytes)} in {'RAM' if self.in_ram else 'VRAM'}" if skips else ""
        counts = f"skipped {len(whole)} of {len(self.passes)} steps, {sum(skips.values())} of {num_passes} passes"
        return [f"step cache: {self.label}", f"{counts}{which}{kept}"]


@dataclass
class StepCache:
    """Of one model. Residuals are kept on the device of the tokens, or `in_ram`.

    At most `pinnable_bytes` of them are pinned there.
    """

    settings: StepCacheSettings
    table: CacheTable
    in_ram: bool = False
    pinnable_bytes: int = 0
    _caches: dict[Prompts, PassCache] = field(default_factory=dict)
    _moment: Moment | None = None
    _asked: dict[Prompts, PassCache] = field(default_factory=dict)  # since the last `decisions`
    _forced: list[bool] = field(default_factory=list)
    _passes: dict[int, dict[Prompts, bool]] = field(default_factory=dict)
    _most_bytes: int = 0
    _told: bool = False

    def __post_init__(self) -> None:
        self.table.check(self.settings.method)

    def __str__(self) -> str:
        settings = self.settings
        where = f"from {100 * settings.start:g} to {100 * settings.end:g} % of the steps"
        skips = self.table.max_skips(settings)
        table = "" if settings.method == "first_block" else f", table {self.table}"
        most = f", at most {skips} in a row" if skips else ""
        return f"{settings.method} below {self.table.threshold(settings):g}{table}, {where}{most}"

    # The run around it

    def begin_run(self) -> None:
        """Another run: nothing of the last one is used."""
        self._caches, self._asked, self._forced, self._moment = {}, {}, [], None
        self._passes, self._most_bytes, self._told = {}, 0, False

    def at(self, moment: Moment) -> None:
        """The passes that follow are here."""
        self._moment = moment
        if not self._told:
            self._told = True
            logger.info("step cache: %s", self._why_off or self)

    def forget_residuals(self) -> None:
        """Their memory is wanted for something else: the next passes are computed."""
        for cache in self._caches.values():
            cache.residual = None

    # What a pass asks

    def of(self, prompts: Prompts) -> PassCache | None:
        """The cache of a batch of these prompts at this moment; None where it is computed for sure."""
        moment = self._moment
        if moment is None or not prompts or self._why_off:
            return None
        cache = self._caches.get(prompts)
        if cache is None:
            if len(self._caches) >= MOST_PROMPTS:
                return None
            cache = self._caches[prompts] = self._new(prompts)
        settings = self.settings
        allowed = settings.start <= moment.place <= settings.end and moment.place < moment.last - SAME
        forced = self._forced.pop(0) if self._forced else None
        cache.begin(moment.place, allowed, forced)
        self._asked[prompts] = cache
        return cache

    def done(self, prompts: Prompts, cache: PassCache) -> None:
        """A pass of these prompts is over."""
        if self._moment is not None:
            self._passes.setdefault(self._moment.step, {})[prompts] = cache.reused
        held = [each.residual for each in self._caches.values()]
        self._most_bytes = max(self._most_bytes, sum(each.nbytes for each in held if each is not None))

    # For a run that goes on in another process

    def decisions(self) -> Tensor:
        """What was decided since this was last asked, pass by pass: their number, then 1 for each that was skipped."""
        made = [float(cache.reused) for cache in self._asked.values()]
        self._asked = {}
        return torch.tensor([float(len(made)), *made])

    def repeat(self, decisions: Tensor) -> None:
        """The passes that follow decide as these did."""
        self._asked = {}
        self._forced = [bool(each) for each in decisions[1:].tolist()]

    def end_repeating(self) -> None:
        """The passes that follow decide by themselves."""
        self._asked, self._forced = {}, []

    # What is shown

    def reading(self) -> CacheReading:
        """Of this run so far."""
        passes = tuple((step, len(made), sum(made.values())) for step, made in sorted(self._passes.items()))
        return CacheReading(str(self), passes, self._most_bytes, self.in_ram, self._why_off)

    @property
    def pinned_bytes(self) -> int:
        """Of residuals that are kept now."""
        held = [each.residual for each in self._caches.values()]
        return sum(each.nbytes for each in held if each is not None and each.is_pinned())

    @property
    def _why_off(self) -> str:
        moment = self._moment
        if moment is None or moment.num_steps > FEW_STEPS:
            return ""
        return (
            f"off for {moment.num_steps} steps: with {FEW_STEPS} or fewer each one changes much, and skipping any shows"
        )

    def _new(self, prompts: Prompts) -> PassCache:
        settings = self.settings
        rule = self.table.rule(settings.method, [kind for kind, _ in prompts])
        return PassCache(rule, self.table.threshold(settings), self.table.max_skips(settings), self.room)

    def room(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Bytes for what blocks added to such tokens, where residuals are kept."""
        if not self.in_ram or device.type == "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        pins = self.pinned_bytes + math.prod(shape) * dtype.itemsize <= self.pinnable_bytes
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=pins)
        except RuntimeError:  # nothing more can be pinned
            return torch.empty(shape, dtype=dtype)


def first_needed(recorded: Sequence[Tensor]) -> int:
    """Of calls with these `decisions`, one after the other: the first whose passes leave what later ones reuse.

    Their number where nothing is reused.
    """
    last: dict[int, int] = {}
    for call, decisions in enumerate(recorded):
        made = decisions[1:].tolist()
        if not made:
            last.clear()  # another model's turn
        last.update({number: call for number, skipped in enumerate(made) if not skipped})
    return min(last.values(), default=len(recorded))
