"""The ladder of memory plans for one piece of work, from the leanest up; arithmetic only.

Each rung spends memory on what is worth most next. The ladder does not depend on the budget, so a larger budget never
gives a slower plan or one with fewer residents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .footprint import (
    FULL_SPEED_HEADS,
    GIB,
    Choice,
    DenoiseMemory,
    Limits,
    ModelFootprint,
    WorkSize,
    compute_seconds,
    denoise_memory,
)
from .ring import ring_bytes

TOKEN_CHUNKS = (1024, 2048, 4096, 8192, 16384, 32768)
DEFAULT_SLOTS = 2
MIN_STAGING, MAX_STAGING = 3, 4
RAM_MARGIN_BYTES = 3 * GIB // 2  # interpreter, libraries and buffers beside the weights


@dataclass(frozen=True)
class MemoryPlan:
    """How one model and one piece of work use the device; everything a streamer and a model need to be set up.

    `limits` are those that it keeps to. Per pass: `streamed_bytes` over the bus, `compute_seconds` and
    `transfer_seconds` predicted. `pinned_bytes` and `pageable_bytes` of host memory hold the streamed blocks.
    `from_disk` means that RAM holds no block: the streamed ones are read again in every pass through `num_staging`
    pinned buffers, the residents once. `vae_tile` is a side in pixels, 0 for whole frames.
    """

    model: str
    work: WorkSize
    limits: Limits
    num_blocks: int
    resident_blocks: tuple[int, ...]
    num_slots: int
    ring_bytes: int
    streamed_bytes: int
    pinned_bytes: int
    pageable_bytes: int
    from_disk: bool
    num_staging: int
    token_chunk: int
    head_groups: int
    cache_text_kv: bool
    lend_fixed: bool
    vae_tile: int
    compute_seconds: float
    transfer_seconds: float
    denoise: DenoiseMemory
    predicted_decode_bytes: int
    reasons: tuple[str, ...] = ()

    @property
    def budget_bytes(self) -> int:
        return self.limits.vram_budget_bytes

    @property
    def num_resident(self) -> int:
        return len(self.resident_blocks)

    @property
    def num_streamed(self) -> int:
        return self.num_blocks - self.num_resident

    @property
    def predicted_denoise_bytes(self) -> int:
        return self.denoise.total

    @property
    def predicted_peak_bytes(self) -> int:
        return max(self.predicted_denoise_bytes, self.predicted_decode_bytes)

    @property
    def transfer_bound(self) -> bool:
        return self.transfer_seconds > self.compute_seconds

    @property
    def seconds_per_step(self) -> float:
        """Predicted: transfers overlap compute, so the slower of the two counts."""
        return self.work.passes_per_step * max(self.compute_seconds, self.transfer_seconds)


# A choice with one more thing switched on, or None where there is no more of it.
Step = Callable[[Choice, ModelFootprint, WorkSize, Limits], Choice | None]


def spread_residents(num_blocks: int, num_resident: int) -> tuple[int, ...]:
    """Indices of residents spread evenly between streamed blocks, so that each buys time for the next transfer."""
    return tuple(i for i in range(num_blocks) if (i + 1) * num_resident // num_blocks > i * num_resident // num_blocks)


def ladder(model: ModelFootprint, work: WorkSize, limits: Limits) -> Iterator[MemoryPlan]:
    """Plans from the leanest up; each is at least as fast as the one before and has no fewer residents."""
    by_hand = limits.blocks_to_swap >= 0
    num_resident = model.num_blocks - limits.blocks_to_swap if by_hand else 0
    choice = Choice(TOKEN_CHUNKS[0], _head_groups(model)[0], False, num_resident, model.lendable_bytes > 0)
    plan = _plan_of(choice, model, work, limits)
    yield plan
    seconds = plan.seconds_per_step
    compute: list[Step] = [_larger_chunk, _fewer_groups, _kept_fixed]
    transfers: list[Step] = [_kept_fixed, _cached_text] if by_hand else [_kept_fixed, _cached_text, _more_residents]
    while True:
        steps = transfers + compute if plan.transfer_bound else compute + transfers
        choices = [step(_choice(plan), model, work, limits) for step in steps]
        upgrades = [_plan_of(upgraded, model, work, limits) for upgraded in choices if upgraded]
        if not upgrades:
            return
        free = [upgrade for upgrade in upgrades if upgrade.predicted_denoise_bytes <= plan.predicted_denoise_bytes]
        plan = (free or upgrades)[0]
        if plan.seconds_per_step <= seconds:  # blocks of unequal size can make a rung slower: leave it out
            seconds = plan.seconds_per_step
            yield plan


def _larger_chunk(choice: Choice, model: ModelFootprint, work: WorkSize, limits: Limits) -> Choice | None:
    larger = [chunk for chunk in TOKEN_CHUNKS if chunk > choice.token_chunk]
    if not larger or choice.token_chunk >= work.rows:
        return None
    return replace(choice, token_chunk=larger[0])


def _fewer_groups(choice: Choice, model: ModelFootprint, work: WorkSize, limits: Limits) -> Choice | None:
    fewer = [groups for groups in _head_groups(model) if groups < choice.head_groups]
    return replace(choice, head_groups=fewer[0]) if fewer else None


def _cached_text(choice: Choice, model: ModelFootprint, work: WorkSize, limits: Limits) -> Choice | None:
    """Cache the text's keys and values where that spares more bytes per pass than residents of the same size."""
    if choice.cache_text_kv or not model.text_kv_bytes:
        return None
    streamed = model.num_blocks - choice.num_resident
    held = choice.num_resident + min(streamed, limits.num_slots or DEFAULT_SLOTS)
    cost = model.text_cache_bytes(work) - held * model.text_kv_bytes
    return replace(choice, cache_text_kv=True) if cost < streamed * model.text_kv_bytes else None


def _kept_fixed(choice: Choice, model: ModelFootprint, work: WorkSize, limits: Limits) -> Choice | None:
    """Keep what is needed only before the blocks: its copy in every pass hides behind nothing."""
    return replace(choice, lend_fixed=False) if choice.lend_fixed else None


def _more_residents(choice: Choice, model: ModelFootprint, work: WorkSize, limits: Limits) -> Choice | None:
    """More residents, so many that the streamed count is a multiple of the slots: prefetch then wraps seamlessly."""
    slots = limits.num_slots or DEFAULT_SLOTS
    streamed = model.num_blocks - choice.num_resident
    if streamed == 0:
        return None
    fewer = (streamed - 1) // slots * slots
    if fewer <= slots:  # a ring as large as what streams through it: rather keep everything
        fewer = 0
    return replace(choice, num_resident=model.num_blocks - fewer)


def _head_groups(model: ModelFootprint) -> list[int]:
    """Numbers of head groups worth having, most first: even ones, of 4 heads up to what runs at full speed, or one."""
    heads = model.num_heads
    even = [groups for groups in range(heads, 0, -1) if heads % groups == 0 and heads // groups >= 4] or [1]
    full = next((groups for groups in even if heads // groups >= FULL_SPEED_HEADS), 1)
    return [groups for groups in even if groups >= full or groups == 1]


def _choice(plan: MemoryPlan) -> Choice:
    return Choice(plan.token_chunk, plan.head_groups, plan.cache_text_kv, plan.num_resident, plan.lend_fixed)


def use_spare(plan: MemoryPlan, model: ModelFootprint, limits: Limits) -> MemoryPlan:
    """Spend what is too little for another resident on larger pieces: the predicted rates may be wrong."""
    for step in (_larger_chunk, _fewer_groups):
        while upgraded := step(_choice(plan), model, plan.work, limits):
            candidate = _plan_of(upgraded, model, plan.work, limits)
            if candidate.predicted_denoise_bytes > limits.vram_budget_bytes:
                break
            plan = candidate
    return plan


def _plan_of(choice: Choice, model: ModelFootprint, work: WorkSize, limits: Limits) -> MemoryPlan:
    """The denoising side of the plan that a choice makes."""
    sizes = model.streamable_bytes(choice.cache_text_kv)
    resident_blocks = spread_residents(model.num_blocks, choice.num_resident)
    kept = set(resident_blocks)
    streamed = tuple(size for index, size in enumerate(sizes) if index not in kept)
    num_slots = min(limits.num_slots or DEFAULT_SLOTS, len(streamed))
    ring = ring_bytes(streamed, num_slots)
    total = sum(streamed)

    ram = limits.ram_budget_bytes
    # all of it: residents stay in RAM too, and so do weights whose keys and values are cached, for the next prompt
    host_bytes = model.once_bytes + sum(model.block_bytes)
    from_disk = ram is not None and host_bytes + RAM_MARGIN_BYTES > ram
    num_staging = 0
    if from_disk and ram is not None:
        num_staging = MAX_STAGING if MAX_STAGING * max(sizes) + RAM_MARGIN_BYTES <= ram else MIN_STAGING
        staging = (max(streamed),) * num_staging if streamed else ()
        pinned = _pinned_bytes(staging, limits.pinned_cap_bytes)
        pageable = sum(staging) - pinned
        transfer = total / (1e9 * min(limits.disk_gbps, limits.h2d_gbps))
    else:
        pinned = _pinned_bytes(streamed, limits.pinned_cap_bytes)
        pageable = total - pinned
        transfer = pinned / (1e9 * limits.h2d_gbps) + pageable / (1e9 * limits.pageable_gbps)
    return MemoryPlan(
        model=model.name,
        work=work,
        limits=limits,
        num_blocks=model.num_blocks,
        resident_blocks=resident_blocks,
        num_slots=num_slots,
        ring_bytes=ring,
        streamed_bytes=total,
        pinned_bytes=pinned,
        pageable_bytes=pageable,
        from_disk=from_disk,
        num_staging=num_staging,
        token_chunk=choice.token_chunk,
        head_groups=choice.head_groups,
        cache_text_kv=choice.cache_text_kv,
        lend_fixed=choice.lend_fixed,
        vae_tile=0,
        compute_seconds=compute_seconds(model, work, choice, limits),
        transfer_seconds=transfer,
        denoise=denoise_memory(model, work, choice, ring, sum(sizes) - total, limits),
        predicted_decode_bytes=0,
    )


def _pinned_bytes(streamed: tuple[int, ...], cap: int | None) -> int:
    """Whole blocks, in order, for as long as they stay under the cap."""
    pinned = 0
    for size in streamed:
        if cap is not None and pinned + size > cap:
            break
        pinned += size
    return pinned
