"""The choice of what runs a step on a device: tried, compared with a reference, timed and logged, else fallen back.

Every selector of kernels goes through `choose`. While an implementation is tried, whatever Triton or a package raises
means "not usable here"; what it raises afterwards, timed or in use, is an error and stays one. An out-of-memory says
nothing of an implementation: what is chosen then is for now, and no cache keeps it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from .device_errors import is_out_of_memory
from .operators import on_device
from .triton_errors import triton_errors

logger = logging.getLogger(__name__)

BOUND = 2e-2  # of the relative difference between 16-bit results; wrong ones are at 1e-1 and beyond


class Named(Protocol):
    @property
    def name(self) -> str: ...


A = TypeVar("A")
T = TypeVar("T", bound=Named)
P = ParamSpec("P")


@dataclass(frozen=True)
class Chosen(Generic[A]):
    """What runs a step; not `is_final` where the device had no memory left to try or to time something."""

    best: A
    is_final: bool = True


@dataclass(frozen=True)
class Trial(Generic[T]):
    """How implementations of the step `what` are tried on a device.

    `check` runs one beside the reference, on few numbers, and says what is wrong with it or None. `seconds` is the time
    of one at the size that counts; without it the first that is right is taken. `work` says what it is for, in the log.
    """

    what: str
    device: torch.device
    check: Callable[[T], str | None]
    seconds: Callable[[T], float] | None = None
    work: str = ""
    unavailable: type[ValueError] = ValueError  # raised where nothing is usable

    def __str__(self) -> str:
        return self.work or str(self.device)


def choose(trial: Trial[T], candidates: Sequence[T], fallback: T | None = None) -> Chosen[T]:
    """The fastest, or first, of the candidates that are right on the device; else the fallback. Logged with reasons.

    Without a fallback it raises what ran out of memory, or `trial.unavailable` with every reason.
    """
    tried = _Tried(trial)
    with on_device(trial.device):
        best = tried.fastest(tried.agreeing(candidates))
    if best is None and fallback is None:
        raise tried.short or trial.unavailable(f"{trial.what}: nothing can run {trial}: {'; '.join(tried.notes)}")
    chosen = best or fallback
    assert chosen is not None
    broken = best is None and tried.notes and tried.short is None
    level = logging.WARNING if broken else logging.INFO
    logger.log(level, "%s: auto chose %s for %s (%s)", trial.what, chosen.name, trial, "; ".join(tried.notes))
    return Chosen(chosen, tried.short is None)


@dataclass
class _Tried(Generic[T]):
    """Of one choice: what was found, and the out-of-memory where there was one."""

    trial: Trial[T]
    notes: list[str] = field(default_factory=list)
    short: RuntimeError | None = None

    def agreeing(self, candidates: Sequence[T]) -> list[T]:
        found: list[T] = []
        for candidate in candidates:
            if found and self.trial.seconds is None:
                self.notes.append(f"{candidate.name}: comes after it")
                continue
            try:
                reason = reason_against(functools.partial(self.trial.check, candidate), self.trial.device)
            except RuntimeError as error:
                self._note_shortage(candidate, error)
                continue
            if reason is None:
                found.append(candidate)
            else:
                self.notes.append(f"{candidate.name}: {reason}")
        return found

    def fastest(self, found: Sequence[T]) -> T | None:
        if len(found) < 2 or self.trial.seconds is None:
            return found[0] if found else None
        times: list[float] = []
        try:
            for candidate in found:
                times.append(self.trial.seconds(candidate))
                self.notes.append(f"{candidate.name}: {1e3 * times[-1]:.3f} ms")
        except RuntimeError as error:
            self._note_shortage(candidate, error)
            return found[0]
        finally:
            torch.cuda.empty_cache()  # plans count on that memory
        return found[times.index(min(times))]

    def _note_shortage(self, candidate: T, error: RuntimeError) -> None:
        if not is_out_of_memory(error):
            raise error
        self.short = error.with_traceback(None)  # whose frames have what was tried on the device
        self.notes.append(f"{candidate.name}: not tried to the end, as {self.trial.device} has no memory left")


def reason_against(check: Callable[[], str | None], device: torch.device) -> str | None:
    """What `check` finds wrong, or how it fails, or None. An out-of-memory is no answer: it is raised."""
    try:
        with on_device(device):
            return check()
    except triton_errors() as error:
        if is_out_of_memory(error):
            raise
        return f"fails on {device} ({brief(error)}) with torch {torch.__version__}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference of two tensors over that of the second, the reference's."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def disagreement(error: float, bound: float = BOUND) -> str | None:
    """Why a result of this relative error is none, with numbers, or None."""
    return None if error <= bound else f"differs from the reference by {error:.1e} (allowed {bound:.0e})"


def loaded(what: str, load: Callable[[], Sequence[T]]) -> Sequence[T]:
    """The kernels that `load` imports; none, which is logged, where Triton is missing or broken."""
    try:
        return load()
    except ModuleNotFoundError as error:
        logger.info("%s: %s is not installed: run by PyTorch (slower, more memory)", what, error.name)
    except triton_errors() as error:
        logger.warning("%s: Triton cannot be used (%s): run by PyTorch", what, brief(error))
    return ()


def kept_when_final(select: Callable[P, Chosen[A]]) -> Callable[P, A]:
    """`functools.cache` for a selector: what it chose for want of memory is not kept, the next call tries again."""

    class ForNow(Exception):  # no cache keeps an exception
        pass

    @functools.cache
    def final(*key: P.args, **named: P.kwargs) -> A:
        chosen = select(*key, **named)
        if not chosen.is_final:
            raise ForNow(chosen.best)
        return chosen.best

    @functools.wraps(select)
    def best(*key: P.args, **named: P.kwargs) -> A:
        try:
            return final(*key, **named)  # type: ignore[arg-type]
        except ForNow as now:
            return now.args[0]

    return best


@dataclass(frozen=True)
class _Way:
    name: str


def works(what: str, device: torch.device, check: Callable[[], str | None]) -> Chosen[bool]:
    """Whether a kernel that stands by itself is right on the device; there is a slower way where it is not."""
    kernel = _Way("its kernel")
    chosen = choose(Trial(what, device, lambda _: check()), [kernel], _Way("PyTorch (slower)"))
    return Chosen(chosen.best is kernel, chosen.is_final)


def cuda_seconds(
    call: Callable[[], object], device: torch.device, before: Callable[[], object] | None = None, repeats: int = 7
) -> float:
    """Median time on the GPU of a call, after two for warming up; `before` runs ahead of each, untimed."""
    with on_device(device):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 2)]
        for start, end in events:
            if before is not None:
                before()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
    return sorted(start.elapsed_time(end) for start, end in events[2:])[repeats // 2] / 1e3


def brief(error: BaseException) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
