"""A memory plan in words: where the VRAM goes, what streams, what that costs, and why it is so."""

from __future__ import annotations

from dataclasses import fields

from ...system.sizes import in_gb, in_gib
from .denoise import DenoiseMemory
from .footprint import Limits
from .parking import Homes
from .plan import MemoryPlan

ROWS = {
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


def verdict(plan: MemoryPlan) -> str:
    """The plan in one sentence: that it fits, in what, and what streams."""
    blocks = plan.blocks
    fits = f"Fits in {in_gib(plan.budget_bytes)}"
    if not blocks.num_streamed:
        return f"{fits}: all {blocks.num_blocks} blocks stay."
    pace = "and set the pace" if plan.times.transfer_bound else "behind compute"
    where = "from the disk " if plan.host.from_disk else ""
    stay = f"{blocks.num_resident} blocks stay, " if blocks.num_resident else ""
    return f"{fits}: {stay}{blocks.num_streamed} stream {where}{pace}."


def describe(plan: MemoryPlan) -> str:
    """The plan as text: a verdict, where the VRAM goes, what streams, what that costs, and why it is so."""
    lines = [verdict(plan), "", f"{plan.model.name}: {plan.work}", f"VRAM budget {in_gib(plan.budget_bytes)}", ""]
    for field in fields(DenoiseMemory):
        size = getattr(plan.denoise, field.name)
        lines.append(f"  {ROWS[field.name]:<38}{in_gib(size):>12}")
    lines.append(f"  {'denoise, predicted peak':<38}{in_gib(plan.denoise.total):>12}")
    if plan.decode.total:
        lines.append(f"  {'decode, predicted peak':<38}{in_gib(plan.decode.total):>12}")
    lines.append(f"  {'left of the budget':<38}{in_gib(plan.budget_bytes - plan.peak_bytes):>12}")
    lines += _card_lines(plan)
    blocks = plan.blocks
    lines += [
        "",
        f"  blocks: {blocks.num_resident} resident, {blocks.num_streamed} streamed through {blocks.num_slots} slots",
        f"  per step: {in_gb(blocks.streamed_bytes * plan.work.passes_per_step)} over the bus{_times(plan)}",
        f"  host memory: {in_gib(plan.host.pinned_bytes)} pinned, {in_gib(plan.host.pageable_bytes)} pageable",
        *_ram_lines(plan),
        "",
    ]
    return "\n".join([*lines, *(f"- {reason}" for reason in reasons(plan)), _of_which_card(plan)])


def _card_lines(plan: MemoryPlan) -> list[str]:
    """What each of several cards is planned to use of its own budget; the first one decodes alone."""
    if len(plan.limits.cards) < 2:
        return []
    lines = ["", f"  {'each card':<38}{'peak':>12}{'budget':>12}"]
    for index, card in enumerate(plan.limits.cards):
        peak = plan.denoise.total if index else plan.peak_bytes
        budget = "-" if plan.limits.ram_is_the_device else in_gib(card.budget_bytes)
        lines.append(f"  {card.name:<38}{in_gib(peak):>12}{budget:>12}")
    return lines


def _ram_lines(plan: MemoryPlan) -> list[str]:
    """All that is wanted of RAM; on a CPU that is what the table says."""
    if plan.limits.ram_is_the_device:
        return []
    return [f"  {in_gib(plan.host.ram_bytes + plan.decode.host)} of RAM in all, with the process, at most"]


def _times(plan: MemoryPlan) -> str:
    """A step's seconds where the card was measured, else nothing: a guess would be taken for a promise."""
    if not plan.times_are_measured:
        return ""
    passes, times = plan.work.passes_per_step, plan.times
    return (
        f", about {plan.seconds_per_step:.2f} s "
        f"(compute {passes * times.compute:.2f} s, transfers {passes * times.transfer:.2f} s)"
    )


def _of_which_card(plan: MemoryPlan) -> str:
    if plan.times_are_measured:
        return f"Times are of {plan.limits.card} by `lowvram-video bench`."
    return "No times are shown, as this card was not measured: `lowvram-video bench` does that in five minutes."


def assumed_rates(limits: Limits) -> str:
    """By which times a plan weighs computing against copying, where no card was measured."""
    return (
        f"Times are those of a card with {limits.tflops_matmul:g} TFLOP/s in products and "
        f"{limits.tflops_attention:g} in attention behind a bus of {limits.h2d_gbps:g} GB/s wherever the plan weighs "
        "computing against copying: yours will differ, and so may what sets the pace."
    )


def reasons(plan: MemoryPlan) -> list[str]:
    """Why the plan is as it is, in plain sentences."""
    return [*_card_reasons(plan), *_block_reasons(plan), *_host_reasons(plan), *_piece_reasons(plan)]


def _card_reasons(plan: MemoryPlan) -> list[str]:
    if plan.work.cards == 1:
        return []
    link = "" if plan.limits.link_gbps is None else f", at {plan.limits.link_gbps:.1f} GB/s"
    packs = "What the cards exchange travels in 8 bits, as they compute in 8 bits."
    got = f"up to {in_gb(plan.model.exchanged_bytes(plan.work))} per pass from the others{link}"
    if plan.work.num_sharing == 1:
        got = "nothing from the others: its samples are its own"
    return [
        f"All figures are of each card: of {plan.work.cards}, each computes {plan.work.rows} of "
        f"{plan.work.batch * plan.work.tokens} tokens, streams every block that it does not hold, and gets {got}.",
        *([packs] if plan.model.packs_exchange else []),
    ]


def _block_reasons(plan: MemoryPlan) -> list[str]:
    said, blocks, times = [], plan.blocks, plan.times
    if plan.limits.blocks_to_swap >= 0:
        said.append(f"{plan.limits.blocks_to_swap} of {blocks.num_blocks} blocks are streamed, as set by hand.")
    elif not blocks.num_streamed:
        said.append(f"All {blocks.num_blocks} blocks fit and stay on the device.")
    else:
        more = sum(plan.model.streamable_bytes(plan.choice.cache_text_kv)) - plan.denoise.residents - blocks.ring_bytes
        ring = f"{blocks.num_slots} slots" + (" of a stage of a block each" if plan.choice.in_stages else "")
        said.append(
            f"{blocks.num_streamed} of {blocks.num_blocks} blocks stream through {ring}: "
            f"keeping all would take {in_gib(more)} more."
        )
    if blocks.num_streamed:
        share = times.transfer / times.compute
        said.append(
            f"Transfers take {share:.1f} times as long as compute, so they set the pace: more VRAM keeps more blocks "
            "resident, and a longer or larger video makes better use of each transfer."
            if times.transfer_bound
            else f"Transfers hide behind compute: they take {100 * share:.0f} % of its time."
        )
    if plan.choice.cache_text_kv:
        spared = plan.model.num_blocks * plan.model.text_kv_bytes
        said.append(
            f"The text's keys and values are made once per prompt: {in_gib(spared)} of weights are then spared."
        )
    return said


def _host_reasons(plan: MemoryPlan) -> list[str]:
    said, host = [], plan.host
    if host.homes is None and host.from_disk and plan.limits.ram_budget_bytes is not None:
        ram, how = in_gib(plan.limits.ram_budget_bytes), "once, to the device"
        if plan.blocks.num_streamed:
            how = f"in every pass, through {host.num_staging} staging buffers"
        said.append(f"Blocks are read from the file {how}: {ram} of RAM cannot hold them all.")
    if host.homes is not None:
        said += _parked_reasons(plan, host.homes)
    if host.pageable_bytes and plan.limits.pinned_cap_bytes is not None:
        said.append(
            f"{in_gib(host.pageable_bytes)} of the streamed blocks stay in pageable memory, which copies more slowly: "
            f"pinned memory is capped at {in_gib(plan.limits.pinned_cap_bytes)}."
        )
    return said


def _parked_reasons(plan: MemoryPlan, homes: Homes) -> list[str]:
    """Where blocks are parked, what RAM is spared, and what is on the disk."""
    said, sizes = [], plan.model.home_bytes or plan.model.block_bytes
    parking = plan.limits.parking
    assert parking is not None
    if not plan.blocks.num_streamed:
        return ["Nothing is parked on another card: all blocks stay."]
    for place, (name, blocks) in zip(parking.cards, homes.cards, strict=True):
        if not blocks:
            said.append(f"Nothing is parked on {name}: {in_gib(place.free_bytes)} are free there for blocks.")
            continue
        through = " through RAM, as the cards do not reach each other" if place.staged else ""
        said.append(
            f"{_counted(len(blocks))} parked on {name}: {in_gib(sum(sizes[index] for index in blocks))} that RAM need "
            f"not hold. They come at {place.gbps:.1f} GB/s{through}; from RAM at {plan.limits.h2d_gbps:.1f} GB/s."
        )
    again = [index for index in homes.disk if index not in plan.blocks.resident]
    if again:
        said.append(f"{_counted(len(again))} read from the file in every pass: neither cards nor RAM have room.")
    return said


def _counted(num_blocks: int) -> str:
    return f"{num_blocks} block is" if num_blocks == 1 else f"{num_blocks} blocks are"


def _piece_reasons(plan: MemoryPlan) -> list[str]:
    chunk = min(plan.choice.token_chunk, plan.work.rows)
    said = [
        f"{chunk} of {plan.work.rows} tokens are projected at a time, and attention runs over "
        f"{plan.model.num_heads // plan.choice.head_groups} of {plan.model.num_heads} heads at a time."
    ]
    queries = plan.choice.query_rows(plan.work)
    if queries < plan.work.rows:
        said.append(f"Attention's queries are made for {queries} tokens at a time: all at once would take more VRAM.")
    if plan.choice.packed_keys:
        said.append("Attention's keys and values are kept in 8 bits: more VRAM keeps them as they were computed.")
    if plan.decode.rows:
        waiting = f"; what waits between strips takes {in_gib(plan.decode.host)} of RAM" if plan.decode.in_ram else ""
        said.append(
            f"The video is decoded in strips of {plan.decode.rows} rows, exactly as in whole frames, which would "
            f"exceed the budget{waiting}."
        )
    if plan.decode.tile:
        said.append(
            f"The video is decoded in tiles of {plan.decode.tile} pixels: whole frames would exceed the budget."
        )
    return said
