"""One model on several cards: each card has part of every pass, and one copy of the weights in RAM feeds them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..memory.plan.footprint import Limits, ModelFootprint, WorkSize
from ..memory.plan.plan import MemoryPlan, PlanError, plan_memory
from ..system.sizes import in_gb
from ..team.carriers import AS_THEY_ARE, InEightBits
from ..team.hiding import HeadTimes, hiding_sizes, seen_seconds
from ..team.link import links_for
from ..team.spans import even_spans
from ..team.team import Team
from ..transformer.transformer import Transformer
from .settings import RunSettings


class CardModel(Protocol):
    """A streamed model, as it is seen among others of the same file."""

    @property
    def model(self) -> Transformer: ...
    @property
    def settings(self) -> RunSettings: ...
    @property
    def compiled(self) -> object | None: ...
    def start_beside(self, first: Any, plan: MemoryPlan) -> None: ...
    def limiting_code(self) -> AbstractContextManager[None]:
        """What a thread that runs its compiled code needs."""
        ...

    def release(self) -> None: ...


S = TypeVar("S", bound=CardModel)
B = TypeVar("B")  # what is brought for a pass

# What packs and unpacks q, k, v and what attention made takes a block so much longer: hosts' calls of smaller kernels.
PACKING_SECONDS = 2e-4


class Several(Generic[S]):
    """The cards of `first` and of `open_other`'s models, which run under one plan.

    A batch's samples are shared out first, so that guidance has cond and uncond on cards of their own and nothing
    is exchanged for them; cards that share a sample have part of its tokens each. Results are bit for bit those of one
    card, where that computes rows by themselves.
    """

    def __init__(
        self, first: S, devices: Sequence[torch.device], open_other: Callable[[torch.device, Callable[[], None]], S]
    ) -> None:
        cards = [first.settings.device, *devices]
        self.team = Team(cards, links_for(cards, first.settings.staged_exchange))
        # another card's failure ends this one's pass at its next block
        self.others: list[S] = [open_other(device, self.team.mail.check) for device in devices]
        self._first = first
        self._plan: MemoryPlan | None = None

    @property
    def num_cards(self) -> int:
        return 1 + len(self.others)

    @property
    def _models(self) -> Sequence[S]:
        return [self._first, *self.others]

    def start(self, plan: MemoryPlan) -> None:
        """Have the others on their cards as planned; the first is on its own."""
        first, self._plan = self._first, plan

        def start(rank: int) -> None:
            if rank:
                self.others[rank - 1].start_beside(first, plan)

        self.team.run(start, in_turns=False)

    def stop(self) -> None:
        """Take the others from their cards, and from the first one's host memory."""
        for other in self.others:
            other.release()

    def run(self, batch: int, bring: Callable[[S, slice], B], make: Callable[[S, B], Tensor]) -> Tensor:
        """A pass over so many samples, `[batch, ...]`: what `make` makes, on each card, of what `bring` brought there.

        `bring` is given each card's model and its samples. It is called before any card computes, as a copy comes
        behind all that the card which it is from was given before.
        """
        places = shared_samples(batch, self.num_cards)
        brought = [bring(model, samples) for model, (samples, _) in zip(self._models, places, strict=True)]
        shares = len(places[0][1]) > 1  # as many cards have each sample
        apart = len(places[0][1]) < self.num_cards
        plan = self._plan
        sizes = hidden_sizes(plan, len(places[0][1])) if plan is not None and shares else None
        packs = plan is not None and plan.model.packs_exchange

        def run(rank: int) -> Tensor:
            model = self._models[rank]
            samples, ranks = places[rank]
            carrier = InEightBits(model.model.execution.ops) if packs else AS_THEY_ARE
            # compiled code is no place to run another card's in; of several groups the first would ask for all of its
            # pass before the others began theirs
            in_step = model.compiled is None and not apart
            model.model.share = self.team.share(rank, ranks, sizes, carrier, in_step) if shares else None
            model.model.sample = samples.start if apart else None
            try:
                with model.limiting_code():
                    return make(model, brought[rank])
            finally:
                model.model.share = model.model.sample = None

        made = self.team.run(run, in_turns=shares)
        if not apart:
            return made[0]
        firsts = sorted({ranks[0] for _, ranks in places})
        return torch.cat([made[rank].to(self._first.settings.device) for rank in firsts])

    def close(self) -> None:
        """Give everything back, threads too."""
        self.stop()
        self.team.close()


def plan_shared(model: ModelFootprint, work: WorkSize, limits: Limits, num_cards: int) -> MemoryPlan:
    """The plan of each of so many cards that share a pass; PlanError names what would fit where this does not."""
    if num_cards == 1:
        return plan_memory(model, work, limits)
    whole = replace(model, streams_queries=False, packs_keys=False)  # as `Workspace` has a part of a pass
    plan = plan_memory(whole, replace(work, cards=num_cards), limits)
    if packing_pays(plan):
        plan = replace(plan, model=replace(plan.model, packs_exchange=True))  # what it holds is no more
    check_link(plan)
    return plan


def packing_pays(plan: MemoryPlan) -> bool:
    """Whether the cards exchange in 8 bits: where the user computes in 8 bits, and the pass is the faster for it."""
    if not plan.model.in_8_bits or plan.limits.link_gbps is None or exchanges_nothing(plan.work):
        return False
    packed = replace(plan, model=replace(plan.model, packs_exchange=True))
    return seen_of(plan) - seen_of(packed) > plan.model.num_blocks * PACKING_SECONDS


def exchanges_nothing(work: WorkSize) -> bool:
    """Whether each card has samples of its own."""
    return work.num_sharing == 1


def check_link(plan: MemoryPlan) -> None:
    """PlanError where the way between the cards is so slow that a pass of all takes longer than one card's alone."""
    link, cards, compute = plan.limits.link_gbps, plan.work.cards, plan.times.compute
    if link is None or exchanges_nothing(plan.work):
        return
    if max(compute + seen_of(plan), plan.times.transfer) <= max(cards * compute, plan.times.transfer):
        return
    raise PlanError(
        f"{cards} cards that share a pass of {plan.model.name} at {plan.work} exchange "
        f"{in_gb(plan.model.exchanged_bytes(plan.work), decimals=1)} each, and the slowest way between them carries "
        f"{link:.2f} GB/s: it would take longer than on one card. Use one device and park blocks on the other cards, "
        "or two cards with guidance and both prompts in one batch: then nothing is exchanged"
    )


def hidden_sizes(plan: MemoryPlan, num_sharing: int) -> tuple[int, ...] | None:
    """The groups of heads in which attention and its exchange take the least time, of a card of so many that share.

    No group is larger than the plan has room for. None where the way was not measured: then there is nothing to hide.
    """
    if plan.limits.link_gbps is None:
        return None
    num_heads = -(-plan.model.num_heads // num_sharing)
    largest = -(-num_heads // plan.choice.head_groups)
    return hiding_sizes(num_heads, head_times(plan, num_heads, num_sharing), plan.work.tokens, largest)


def seen_of(plan: MemoryPlan) -> float:
    """What of a pass's exchange hides behind nothing, where the way was measured."""
    num_sharing = plan.work.num_sharing
    sizes = hidden_sizes(plan, num_sharing)
    assert sizes is not None
    return plan.model.num_blocks * seen_seconds(sizes, head_times(plan, sum(sizes), num_sharing))


def head_times(plan: MemoryPlan, num_heads: int, num_sharing: int) -> HeadTimes:
    """What each of so many heads of a card takes in a block, where so many cards share a sample."""
    link, work = plan.limits.link_gbps, plan.work
    assert link is not None
    if num_sharing != work.num_sharing:  # a pass of one prompt by a plan of both, say
        work = replace(work, batch=work.cards // num_sharing)
    exchange = plan.model.exchanged_bytes(work) / (1e9 * link)
    attention = plan.times.compute * attention_share(plan) * work.rows / plan.work.rows
    return HeadTimes.of(exchange, attention, num_heads * plan.model.num_blocks)


def attention_share(plan: MemoryPlan) -> float:
    """Attention's share of what a pass computes."""
    products, attention = plan.model.pass_flops(plan.work, plan.choice.cache_text_kv)
    products, attention = products / plan.limits.tflops_matmul, attention / plan.limits.tflops_attention
    return attention / (products + attention)


def shared_samples(batch: int, num_cards: int) -> list[tuple[slice, tuple[int, ...]]]:
    """For each card its samples of a batch, and all cards that have the same ones, as even groups of both."""
    num_groups = math.gcd(batch, num_cards)
    samples, cards = even_spans(batch, num_groups), even_spans(num_cards, num_groups)
    groups = [(part, tuple(range(ranks.start, ranks.stop))) for part, ranks in zip(samples, cards, strict=True)]
    return [group for group in groups for _ in group[1]]
