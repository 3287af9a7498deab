"""The memory plan of a run, or why there is none and what would fit; arithmetic only, nothing touches a device."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...system.sizes import in_gib
from ..stream.layout import align
from .candidates import Candidate, candidates, fastest_candidate
from .decode import DecodeMemory, choose_decode, least_decode_bytes
from .denoise import denoise_memory
from .footprint import GIB, MIB, Limits, ModelFootprint, WorkSize
from .host_memory import MIN_STAGING, bytes_beside_blocks
from .pass_times import measured_parts

BUDGET_STEP_BYTES = 64 * MIB
RETRY_BYTES = 256 * MIB
# Left of a budget: what PyTorch's allocator may lose between pieces of several sizes, beyond the plan's slack. Without
# it 3 of 90 random draws had no room in a model of it (tests/caching_allocator.py), for want of 30 to 33 MiB.
SPARE_BYTES, SPARE_SHARE = 32 * MIB, 0.005


@dataclass(frozen=True)
class MemoryPlan(Candidate):
    """How one model and one piece of work use the device; everything a streamer and a model need to be set up."""

    decode: DecodeMemory

    @property
    def budget_bytes(self) -> int:
        return self.limits.vram_budget_bytes

    @property
    def peak_bytes(self) -> int:
        """Predicted."""
        return max(self.denoise.total, self.decode.total)

    def has_room_for(self, size: WorkSize) -> bool:
        """Whether passes as planned, but of a video of the frames and sides of `size`, fit in the budget.

        Fewer tokens may take more: of their queries more go together, and attention may be made another way.
        """
        work = replace(self.work, frames=size.frames, height=size.height, width=size.width)
        if work.tokens > self.work.tokens:
            return False
        ours, theirs = (denoise_memory(self.model, each, self.choice, self.limits) for each in (self.work, work))
        return self.denoise.total + theirs.total - ours.total <= self.budget_bytes

    @property
    def times_are_measured(self) -> bool:
        """Whether the predicted times are of a card that was measured, so that people may be told."""
        return measured_parts(self.model, self.work, self.choice, self.limits) is not None

    @property
    def seconds_per_step(self) -> float:
        """Predicted."""
        return self.work.passes_per_step * self.times.total


class PlanError(ValueError):
    """The work does not fit; the message and the fields say what would.

    `smallest_budget_bytes` is VRAM, `smallest_ram_bytes` RAM; `largest_frames` keeps the size, `largest_size`
    (height, width) keeps the frames and the shape. None where no such change helps.
    """

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in

    def __init__(
        self,
        message: str,
        smallest_budget_bytes: int | None = None,
        largest_frames: int | None = None,
        largest_size: tuple[int, int] | None = None,
        smallest_ram_bytes: int | None = None,
    ):
        super().__init__(message)
        self.smallest_budget_bytes = smallest_budget_bytes
        self.largest_frames = largest_frames
        self.largest_size = largest_size
        self.smallest_ram_bytes = smallest_ram_bytes


def plan_memory(model: ModelFootprint, work: WorkSize, limits: Limits) -> MemoryPlan:
    """The fastest plan within the limits; PlanError says what would fit where none does."""
    _check_by_hand(model, limits)
    spare = SPARE_BYTES + int(SPARE_SHARE * limits.vram_budget_bytes)
    candidate = fastest_candidate(model, work, limits, limits.vram_budget_bytes, spare)
    decode = choose_decode(model.vae, work, model.latent_channels, limits)
    if candidate is None or decode is None:
        raise _refusal(model, work, limits)
    away = candidate.host.from_disk or limits.parking is not None
    if away and limits.ram_is_the_device and limits.blocks_to_swap < 0:
        return plan_memory(model, work, replace(limits, blocks_to_swap=model.num_blocks))  # no resident is for free
    _check_ram(model, candidate, limits)
    return MemoryPlan(**vars(candidate), decode=decode)


def plan_leaner(plan: MemoryPlan) -> MemoryPlan:
    """A plan that denoises in less VRAM than `plan`, by 256 MiB where possible, for a retry after the device ran out.

    PlanError where `plan` is the leanest there is.
    """
    needed = plan.denoise.total
    for spared in (RETRY_BYTES, 1):
        candidate = fastest_candidate(plan.model, plan.work, plan.limits, needed - spared)
        if candidate is not None:
            return MemoryPlan(**vars(candidate), decode=plan.decode)
    raise PlanError(f"{plan.model.name} at {plan.work} cannot denoise in less than {in_gib(needed)} of VRAM")


def _leanest_bytes(model: ModelFootprint, work: WorkSize, limits: Limits) -> int:
    """The smallest peak of any plan for this work."""
    denoise = min(candidate.denoise.total for candidate in candidates(model, work, limits))
    return max(denoise, least_decode_bytes(model.vae, work, model.latent_channels, limits))


def _check_by_hand(model: ModelFootprint, limits: Limits) -> None:
    if not -1 <= limits.blocks_to_swap <= model.num_blocks:
        raise PlanError(
            f"blocks_to_swap is {limits.blocks_to_swap}, but {model.name} has {model.num_blocks} blocks: "
            f"use -1 (planned) or 0 to {model.num_blocks}"
        )
    if limits.num_slots is not None and limits.num_slots < 2:
        raise PlanError(
            f"num_slots is {limits.num_slots}: streaming needs at least 2 (one block computes while the next arrives)"
        )


def _check_ram(model: ModelFootprint, candidate: Candidate, limits: Limits) -> None:
    if not candidate.host.from_disk or limits.ram_budget_bytes is None:
        return
    num_cards = candidate.work.cards
    # residents are read one after the other
    num_buffers = num_cards * (MIN_STAGING if candidate.blocks.num_streamed else 1)
    brings = num_cards if candidate.choice.transient_fixed else 0
    needed = num_buffers * max(model.block_bytes) + bytes_beside_blocks(model, limits, brings)
    if needed > limits.ram_budget_bytes:
        smallest = align(needed, BUDGET_STEP_BYTES)
        buffers = f"{num_buffers} staging buffer{'s' if num_buffers > 1 else ''}"
        raise PlanError(
            f"{model.name} cannot stream from disk in {in_gib(limits.ram_budget_bytes)} of RAM: {buffers} and the "
            f"process need {in_gib(needed)}. Raise the RAM budget to at least {smallest / GIB:g} GiB",
            smallest_ram_bytes=smallest,
        )


def _refusal(model: ModelFootprint, work: WorkSize, limits: Limits) -> PlanError:
    """What does not fit, by how much, and every single change that would make it fit."""
    needed = _leanest_bytes(model, work, limits)
    smallest = align(needed, BUDGET_STEP_BYTES)

    def fits(other: WorkSize) -> bool:
        return _leanest_bytes(model, other, limits) <= limits.vram_budget_bytes

    frames = _largest_frames(work, fits)
    size = _largest_size(work, fits)
    advice = [f"raise the VRAM budget to at least {smallest / GIB:g} GiB"]
    if limits.blocks_to_swap >= 0 and (swap := _smallest_swap(model, work, limits)) is not None:
        advice.append(f"set blocks_to_swap to at least {swap}")
    if frames is not None:
        advice.append(work.advice(frames))
    if size is not None:
        advice.append(f"make the video at most {size[1]}x{size[0]}")
    streamed = "all blocks" if limits.blocks_to_swap < 0 else f"{limits.blocks_to_swap} of {model.num_blocks} blocks"
    return PlanError(
        f"{model.name} at {work} does not fit in {in_gib(limits.vram_budget_bytes)} of VRAM: the leanest plan, with "
        f"{streamed} streamed, needs {in_gib(needed)}. Do one of these: {'; '.join(advice)}",
        smallest_budget_bytes=smallest,
        largest_frames=frames,
        largest_size=size,
    )


def _largest_frames(work: WorkSize, fits: Callable[[WorkSize], bool]) -> int | None:
    stride = work.stride[0]
    count = _largest((work.frames - 1) // stride + 1, lambda n: fits(replace(work, frames=stride * (n - 1) + 1)))
    return stride * (count - 1) + 1 if count else None


def _largest_size(work: WorkSize, fits: Callable[[WorkSize], bool]) -> tuple[int, int] | None:
    """The largest (height, width) of about the same shape, both multiples of the size unit."""
    unit, short = work.size_unit, min(work.height, work.width)

    def scaled(units: int) -> WorkSize:
        height, width = (max(unit, round(side * units / short) * unit) for side in (work.height, work.width))
        return replace(work, height=height, width=width)

    units = _largest(short // unit, lambda n: fits(scaled(n)))
    return (scaled(units).height, scaled(units).width) if units else None


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 1 … most that fits where n + 1 does not; 0 where not even 1 does."""
    return bisect_left(range(1, most + 1), True, key=lambda n: not fits(n))


def _smallest_swap(model: ModelFootprint, work: WorkSize, limits: Limits) -> int | None:
    def fits(count: int) -> bool:
        return _leanest_bytes(model, work, replace(limits, blocks_to_swap=count)) <= limits.vram_budget_bytes

    return next(filter(fits, range(limits.blocks_to_swap + 1, model.num_blocks + 1)), None)
