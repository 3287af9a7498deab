"""The memory plan of a run, or why there is none and what would fit; arithmetic only, nothing touches a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from .footprint import (
    GIB,
    MIB,
    WAN22_VAE,
    DenoiseMemory,
    Limits,
    ModelFootprint,
    VaeFootprint,
    WorkSize,
    decode_memory,
    wan_footprint,
)
from .ladder import MIN_STAGING, RAM_MARGIN_BYTES, MemoryPlan, ladder, use_spare

VAE_TILES = tuple(range(1024, 64, -64))  # pixels, largest first
BUDGET_STEP_BYTES = 64 * MIB
RETRY_BYTES = 256 * MIB
PRESET_BUDGETS_GIB = (6, 8, 12, 16, 24)
PRESET_RESERVE_BYTES = GIB // 2  # desktop and driver on a card of that size


class PlanError(ValueError):
    """The work does not fit; the message and the fields say what would.

    `smallest_budget_bytes` is VRAM, `smallest_ram_bytes` RAM; `largest_frames` keeps the size, `largest_size`
    (height, width) keeps the frames and the shape. None where no such change helps.
    """

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
    plan = _fastest(model, work, limits)
    if plan.from_disk and limits.ram_is_the_device and limits.blocks_to_swap < 0:
        return _fastest(model, work, replace(limits, blocks_to_swap=model.num_blocks))  # no block is resident for free
    return plan


def _fastest(model: ModelFootprint, work: WorkSize, limits: Limits) -> MemoryPlan:
    _check_by_hand(model, limits)
    fitting, decode = _fitting(model, work, limits), _choose_tile(model, work, limits)
    if fitting is None or decode is None:
        raise _refusal(model, work, limits)
    _check_ram(model, fitting, limits)
    tile, decode_bytes = decode
    fitting = replace(fitting, vae_tile=tile, predicted_decode_bytes=decode_bytes)
    return replace(fitting, reasons=tuple(_reasons(fitting, model, limits)))


def _fitting(model: ModelFootprint, work: WorkSize, limits: Limits) -> MemoryPlan | None:
    """The denoising side of the fastest plan within the VRAM budget, if any is."""
    fitting = None
    for rung in ladder(model, work, limits):
        if rung.predicted_denoise_bytes <= limits.vram_budget_bytes:
            fitting = rung
    return use_spare(fitting, model, limits) if fitting is not None and fitting.transfer_bound else fitting


def plan_leaner(model: ModelFootprint, plan: MemoryPlan) -> MemoryPlan:
    """A plan that denoises in less VRAM than `plan`, by 256 MiB where possible, for a retry after the device ran out.

    PlanError where `plan` is the leanest there is.
    """
    for spared in (RETRY_BYTES, 1):
        budget = plan.predicted_denoise_bytes - spared
        leaner = _fitting(model, plan.work, replace(plan.limits, vram_budget_bytes=budget))
        if leaner is not None:
            break
    else:
        raise PlanError(f"{plan.model} at {plan.work} needs {_gib(plan.predicted_denoise_bytes)} to denoise: no less")
    decode = plan.predicted_decode_bytes
    leaner = replace(leaner, limits=plan.limits, vae_tile=plan.vae_tile, predicted_decode_bytes=decode)
    return replace(leaner, reasons=tuple(_reasons(leaner, model, plan.limits)))


@dataclass(frozen=True)
class Preset:
    """A typical work on a card of `card_gib`: its plan, or the refusal."""

    card_gib: int
    model: str
    work: WorkSize
    plan: MemoryPlan | None
    refusal: str | None


def preset_plans(cards_gib: Sequence[int] = PRESET_BUDGETS_GIB) -> tuple[Preset, ...]:
    """Plans of typical works on cards of the usual sizes, half a GiB of each left to the desktop."""
    video = WorkSize(81, 480, 832)
    fp8 = wan_footprint("Wan 14B fp8", 5120, 13824, 40, 40, 1.0)
    works = (
        (wan_footprint("Wan 1.3B bf16", 1536, 8960, 12, 30, 2.0), video),
        (
            wan_footprint("Wan TI2V 5B bf16", 3072, 14336, 24, 30, 2.0, 48, 48, WAN22_VAE),
            WorkSize(121, 704, 1280, stride=(4, 16, 16)),
        ),
        (wan_footprint("Wan 14B Q4_K", 5120, 13824, 40, 40, 0.5625), video),
        (fp8, video),
        (fp8, WorkSize(81, 720, 1280)),
    )
    presets = []
    for card in cards_gib:
        limits = Limits(card * GIB - PRESET_RESERVE_BYTES)
        for model, work in works:
            try:
                presets.append(Preset(card, model.name, work, plan_memory(model, work, limits), None))
            except PlanError as error:
                presets.append(Preset(card, model.name, work, None, str(error)))
    return tuple(presets)


def describe(plan: MemoryPlan) -> str:
    """The plan as text: where the VRAM goes, what streams, what that costs, and why it is so."""
    lines = [f"{plan.model}: {plan.work}", f"VRAM budget {_gib(plan.budget_bytes)}", ""]
    for field in fields(DenoiseMemory):
        size = getattr(plan.denoise, field.name)
        lines.append(f"  {_ROWS[field.name]:<38}{_gib(size):>12}")
    lines.append(f"  {'denoise, predicted peak':<38}{_gib(plan.predicted_denoise_bytes):>12}")
    if plan.predicted_decode_bytes:
        lines.append(f"  {'decode, predicted peak':<38}{_gib(plan.predicted_decode_bytes):>12}")
    lines.append(f"  {'left of the budget':<38}{_gib(plan.budget_bytes - plan.predicted_peak_bytes):>12}")
    passes = plan.work.passes_per_step
    moved = plan.streamed_bytes * passes / 1e9
    lines += [
        "",
        f"  blocks: {plan.num_resident} resident, {plan.num_streamed} streamed through {plan.num_slots} slots",
        f"  per step: {moved:.2f} GB over the bus, about {plan.seconds_per_step:.2f} s "
        f"(compute {passes * plan.compute_seconds:.2f} s, transfers {passes * plan.transfer_seconds:.2f} s)",
        f"  host memory: {_gib(plan.pinned_bytes)} pinned, {_gib(plan.pageable_bytes)} pageable",
        "",
    ]
    return "\n".join(lines + [f"- {reason}" for reason in plan.reasons])


def assumed_rates(limits: Limits) -> str:
    """What a plan's times are of, where no card was measured."""
    return (
        f"Times are those of a card with {limits.tflops_matmul:g} TFLOP/s in products and "
        f"{limits.tflops_attention:g} in attention behind a bus of {limits.h2d_gbps:g} GB/s: yours will differ, and so "
        "may what sets the pace."
    )


_ROWS = {
    "context": "CUDA context and libraries",
    "fixed_weights": "weights outside the blocks",
    "residents": "resident blocks",
    "ring": "ring of streamed blocks",
    "activations": "activations",
    "scratch": "unpacked weights",
    "text": "text, cached keys and values",
    "latents": "latents",
    "slack": "allocator slack",
}


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _choose_tile(model: ModelFootprint, work: WorkSize, limits: Limits) -> tuple[int, int] | None:
    """The largest VAE tile whose decode fits the budget (0: whole frames), with its bytes."""
    if model.vae is None:
        return 0, 0
    for tile in _tiles(work):
        size = _decode_bytes(model, model.vae, work, limits, tile)
        if size <= limits.vram_budget_bytes:
            return tile, size
    return None


def _tiles(work: WorkSize) -> tuple[int, ...]:
    return 0, *(tile for tile in VAE_TILES if tile < max(work.height, work.width))


def decode_tiles(plan: MemoryPlan) -> tuple[int, ...]:
    """The plan's VAE tile (0: whole frames), then all smaller ones, for retries after the device ran out."""
    return plan.vae_tile, *(tile for tile in _tiles(plan.work)[1:] if not plan.vae_tile or tile < plan.vae_tile)


def _decode_bytes(model: ModelFootprint, vae: VaeFootprint, work: WorkSize, limits: Limits, tile: int) -> int:
    return decode_memory(vae, work, model.latent_channels, tile, limits.context_bytes)


def _leanest_bytes(model: ModelFootprint, work: WorkSize, limits: Limits) -> int:
    """The smallest peak of any plan for this work."""
    denoise = min(rung.predicted_denoise_bytes for rung in ladder(model, work, limits))
    if model.vae is None:
        return denoise
    return max(denoise, _decode_bytes(model, model.vae, work, limits, _tiles(work)[-1]))


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


def _check_ram(model: ModelFootprint, plan: MemoryPlan, limits: Limits) -> None:
    if not plan.from_disk or limits.ram_budget_bytes is None:
        return
    num_buffers = MIN_STAGING if plan.num_streamed else 1  # residents are read one after the other
    needed = num_buffers * max(model.block_bytes) + RAM_MARGIN_BYTES
    if needed > limits.ram_budget_bytes:
        smallest = _round_up(needed)
        buffers = f"{num_buffers} staging buffer{'s' if num_buffers > 1 else ''}"
        raise PlanError(
            f"{model.name} cannot stream from disk in {_gib(limits.ram_budget_bytes)} of RAM: {buffers} and the "
            f"process need {_gib(needed)}. Raise the RAM budget to at least {smallest / GIB:g} GiB",
            smallest_ram_bytes=smallest,
        )


def _refusal(model: ModelFootprint, work: WorkSize, limits: Limits) -> PlanError:
    """What does not fit, by how much, and every single change that would make it fit."""
    needed = _leanest_bytes(model, work, limits)
    smallest = _round_up(needed)

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
        f"{model.name} at {work} does not fit in {_gib(limits.vram_budget_bytes)} of VRAM: the leanest plan, with "
        f"{streamed} streamed, needs {_gib(needed)}. Do one of these: {'; '.join(advice)}",
        smallest_budget_bytes=smallest,
        largest_frames=frames,
        largest_size=size,
    )


def _round_up(size: int) -> int:
    return -(-size // BUDGET_STEP_BYTES) * BUDGET_STEP_BYTES


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
    low, high = 0, most + 1  # low fits (or is 0), high does not or is out of range
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _smallest_swap(model: ModelFootprint, work: WorkSize, limits: Limits) -> int | None:
    for count in range(limits.blocks_to_swap + 1, model.num_blocks + 1):
        if _leanest_bytes(model, work, replace(limits, blocks_to_swap=count)) <= limits.vram_budget_bytes:
            return count
    return None


def _reasons(plan: MemoryPlan, model: ModelFootprint, limits: Limits) -> list[str]:
    """Why the plan is as it is, in plain sentences."""
    return [
        *_block_reasons(plan, model, limits),
        *_host_reasons(plan, limits),
        *_piece_reasons(plan, model),
    ]


def _block_reasons(plan: MemoryPlan, model: ModelFootprint, limits: Limits) -> list[str]:
    reasons = []
    if limits.blocks_to_swap >= 0:
        reasons.append(f"{limits.blocks_to_swap} of {plan.num_blocks} blocks are streamed, as set by hand.")
    elif not plan.num_streamed:
        reasons.append(f"All {plan.num_blocks} blocks fit and stay on the device.")
    else:
        more = sum(model.streamable_bytes(plan.cache_text_kv)) - plan.denoise.residents - plan.ring_bytes
        reasons.append(
            f"{plan.num_streamed} of {plan.num_blocks} blocks stream through {plan.num_slots} slots: "
            f"keeping all would take {_gib(more)} more."
        )
    if plan.num_streamed:
        share = plan.transfer_seconds / plan.compute_seconds
        reasons.append(
            f"Transfers take {share:.1f} times as long as compute, so they set the pace: more VRAM keeps more blocks "
            "resident, and a longer or larger video makes better use of each transfer."
            if plan.transfer_bound
            else f"Transfers hide behind compute: they take {100 * share:.0f} % of its time."
        )
    if plan.cache_text_kv:
        spared = model.num_blocks * model.text_kv_bytes
        reasons.append(
            f"The text's keys and values are made once per prompt: {_gib(spared)} of weights are then spared."
        )
    return reasons


def _host_reasons(plan: MemoryPlan, limits: Limits) -> list[str]:
    reasons = []
    if plan.from_disk and limits.ram_budget_bytes is not None:
        ram, how = _gib(limits.ram_budget_bytes), "once, to the device"
        if plan.num_streamed:
            how = f"in every pass, through {plan.num_staging} staging buffers"
        reasons.append(f"Blocks are read from the file {how}: {ram} of RAM cannot hold them all.")
    if plan.pageable_bytes and limits.pinned_cap_bytes is not None:
        reasons.append(
            f"{_gib(plan.pageable_bytes)} of the streamed blocks stay in pageable memory, which copies more slowly: "
            f"pinned memory is capped at {_gib(limits.pinned_cap_bytes)}."
        )
    return reasons


def _piece_reasons(plan: MemoryPlan, model: ModelFootprint) -> list[str]:
    chunk = min(plan.token_chunk, plan.work.rows)
    reasons = [
        f"{chunk} of {plan.work.rows} tokens are projected at a time, and attention runs over "
        f"{model.num_heads // plan.head_groups} of {model.num_heads} heads at a time."
    ]
    if plan.vae_tile:
        reasons.append(
            f"The video is decoded in tiles of {plan.vae_tile} pixels: whole frames would exceed the budget."
        )
    return reasons
