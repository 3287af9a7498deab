"""The choice of an attention backend: made once per model load, with reasons, and passed to the blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..system.card_profile import CardProfile
from ..system.device_errors import is_out_of_memory
from ..system.kernel_choice import Trial, choose, reason_against
from .backend import QUANTISED_ERROR, AttentionSpec, Backend, SparseBackend
from .flash import FlashAttention2, FlashAttention3
from .int8 import Int8Attention
from .probe import THIS_MACHINE, Machine, find_disagreement, find_sparse_disagreement
from .sage import SageAttention
from .sage_2pp import SageAttention2pp
from .sage_3 import SageAttention3
from .sdpa import Sdpa
from .sol import SolAttention
from .timing import AttentionSize, attention_seconds, kept_choices, timed_work

logger = logging.getLogger(__name__)


class AttentionUnavailable(ValueError):
    """No backend can do what was asked; the message holds every reason and the fix."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


@dataclass(frozen=True)
class _Line:
    name: str
    make: Callable[[torch.device, Machine], Backend]
    auto_rank: int | None  # 1 is tried first; None: quantised, never auto's choice


# In the order of the widget, which only ever grows at the end: saved workflows hold these names.
_BACKENDS = (
    _Line("sdpa", Sdpa, 3),
    _Line("sageattn", SageAttention, None),
    _Line("flash_attn_2", FlashAttention2, 2),
    _Line("flash_attn_3", FlashAttention3, 1),
    _Line("int8_attention", Int8Attention, None),
    _Line("sageattn_2pp", SageAttention2pp, None),
    _Line("sageattn_3", SageAttention3, None),
)
AUTO, AUTO_FAST = "auto", "auto_fast"
ATTENTION_MODES = (AUTO, *(line.name for line in _BACKENDS), AUTO_FAST)
FAST_ERROR = QUANTISED_ERROR  # what a backend may be off for auto_fast to take it
BENCHED = AttentionSize(8192, 8)  # where a backend was installed after the card was measured


def select_attention(mode: str, spec: AttentionSpec, machine: Machine = THIS_MACHINE) -> Backend:
    """The backend for `mode`, proven on the device by a small run against plain attention.

    "auto" takes the best exact one and logs why: the fastest by what was measured of this card (`lowvram-video bench`),
    else the one that is fastest on most; "auto_fast" does the same until a run's size is known (`select_fastest`). Any
    other mode of ATTENTION_MODES is taken or refused. Raises AttentionUnavailable (a ValueError). Call it once a model
    load: every call probes afresh. Where the device has no memory left to probe anything, PyTorch's own attention runs
    for now.
    """
    try:
        return _select_best(spec, machine) if mode in (AUTO, AUTO_FAST) else _select_named(mode, spec, machine)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.warning(
            "attention: %s has no memory left to try %s: sdpa runs for now; load the model again when other models "
            "have left the GPU", spec.device, "a backend" if mode == "auto" else mode,
        )  # fmt: skip
        return Sdpa(torch.device("cpu"))  # in torch's own order of kernels, which needs no proof


def select_fastest(mode: str, spec: AttentionSpec, size: AttentionSize, machine: Machine = THIS_MACHINE) -> Backend:
    """The fastest of the backends that "auto" (exact ones) or "auto_fast" (also those off by FAST_ERROR) may take.

    They are timed at the run's own size once; what was fastest is kept by card, driver, versions and size. Raises
    AttentionUnavailable as `select_attention`. Where memory is short, what that takes runs for now.
    """
    kept, timed = kept_choices(machine.versions()), timed_work(mode, spec, size)
    allowed = [line for line in _BACKENDS if line.auto_rank is not None or mode == AUTO_FAST]
    name = kept.find(timed, spec.device)

    def check(backend: Backend) -> str | None:
        if backend.error > FAST_ERROR:
            return f"off by up to {backend.error:g}, so only by choice"
        return _find_reason(backend, spec)

    trial = Trial(
        "attention", spec.device, check, lambda backend: attention_seconds(backend, spec, size),
        work=f"{spec}, {size}", unavailable=AttentionUnavailable,
    )  # fmt: skip
    try:
        for line in allowed:
            if line.name == name and check(backend := line.make(spec.device, machine)) is None:
                logger.info("attention: %s, the fastest when it was timed for %s of %s", name, size, spec)
                return backend
        ranked = sorted(allowed, key=lambda line: line.auto_rank or len(_BACKENDS))
        chosen = choose(trial, [line.make(spec.device, machine) for line in ranked])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return select_attention(mode, spec, machine)
    if chosen.is_final:
        kept.keep(timed, spec.device, chosen.best.name)
    return chosen.best


def select_sparse(spec: AttentionSpec, machine: Machine = THIS_MACHINE) -> SparseBackend:
    """The sparse backend, proven on the device against its own reference.

    AttentionUnavailable, with every reason and the fix, where it cannot run here; an out-of-memory is raised as it is.
    """
    backend = SolAttention(spec.device, machine)
    reason = backend.refuse(spec) or find_sparse_disagreement(backend, spec)
    if reason is not None:
        raise AttentionUnavailable(
            f"sparse attention ({backend.name}) cannot run {spec}: {reason}; or take Sparse Attention (--sparse) out"
        )
    return backend


@dataclass(frozen=True)
class Judged:
    """A backend, and the reason why it cannot run what was asked, or None."""

    name: str
    backend: Backend
    reason: str | None


def judge_backends(spec: AttentionSpec, machine: Machine = THIS_MACHINE) -> list[Judged]:
    """Every backend, in the order of the widget; each one is imported and probed."""
    backends = [line.make(spec.device, machine) for line in _BACKENDS]
    return [Judged(backend.name, backend, _find_reason(backend, spec)) for backend in backends]


def _select_named(mode: str, spec: AttentionSpec, machine: Machine) -> Backend:
    lines = [line for line in _BACKENDS if line.name == mode]
    if not lines:
        raise AttentionUnavailable(f"attention_mode {mode!r} does not exist: use one of {', '.join(ATTENTION_MODES)}")
    backend = lines[0].make(spec.device, machine)
    reason = _find_reason(backend, spec)
    if reason is not None:
        fix = "" if mode == "sdpa" else "; or set attention_mode to sdpa, which runs everywhere"
        raise AttentionUnavailable(f"attention_mode {mode} cannot run {spec}: {reason}{fix}")
    logger.info("attention: %s, as chosen, for %s", mode, spec)
    return backend


def _select_best(spec: AttentionSpec, machine: Machine) -> Backend:
    def check(backend: Backend) -> str | None:
        return _find_reason(backend, spec) if backend.exact else "quantised, so only by choice"

    card = machine.card(spec.device)
    measured = _measured_tflops(card, spec)
    trial = Trial("attention", spec.device, check, work=str(spec), unavailable=AttentionUnavailable)
    came_since = [line for line in _BACKENDS if line.name in _not_measured(card) and line.auto_rank is not None]
    since = [line.make(spec.device, machine) for line in came_since]
    if any(reason_against(partial(check, backend), spec.device) is None for backend in since):
        trial = replace(trial, seconds=lambda backend: attention_seconds(backend, spec, BENCHED))
    ranked = sorted(_BACKENDS, key=lambda line: (-measured.get(line.name, 0.0), line.auto_rank or 0))
    return choose(trial, [line.make(spec.device, machine) for line in ranked]).best


def _measured_tflops(card: CardProfile | None, spec: AttentionSpec) -> dict[str, float]:
    """The rate of each backend over the longest sequence that it was measured with, where the card was; {} for none.

    Profiles are of heads of 128.
    """
    rows = [] if card is None or spec.head_dim != 128 else [row for row in card.attention if row.queries == row.keys]
    return {row.backend: row.tflops for row in sorted(rows, key=lambda row: row.keys) if row.tflops}


def _not_measured(card: CardProfile | None) -> set[str]:
    """Backends that could not run when the card was measured."""
    rows = [] if card is None else card.attention
    return {row.backend for row in rows} - {row.backend for row in rows if row.tflops}


def _find_reason(backend: Backend, spec: AttentionSpec) -> str | None:
    return backend.refuse(spec) or find_disagreement(backend, spec)
