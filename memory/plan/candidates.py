"""The ways there are to denoise one piece of work, from the leanest up; arithmetic only.

Each candidate spends memory on what is worth most next. They do not depend on the budget, so a larger budget never
gives a slower plan or one with fewer residents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..stream.ring import pair_bytes, ring_bytes
from .denoise import DenoiseMemory, WeightBytes, denoise_memory
from .footprint import Choice, Limits, ModelFootprint, WorkSize
from .host_memory import HostMemory, find_host_memory
from .pass_times import FULL_SPEED_HEADS, compute_seconds

FEWEST_HEADS = 2  # at a time: of 8,192 queries each that is a tile for every multiprocessor of a large GPU
TOKEN_CHUNKS = (1024, 2048, 4096, 8192, 16384, 32768)
QUERY_CHUNKS = (8192, 16384)  # fewer rows at a time make attention slower and spare little
DEFAULT_SLOTS = 2
FAIR_CHUNK, FAIR_PACKED_CHUNK = 8192, 4096  # rows at a time, from which on other things are worth more
# A stage computes for less time than its successor may need to arrive: what is copied counts for more.
STAGED_TRANSFER = 1.6


@dataclass(frozen=True)
class BlockPlacement:
    """Which blocks stay on the device, and the ring that the others stream through, so many bytes in every pass."""

    num_blocks: int
    resident: tuple[int, ...]
    num_slots: int
    ring_bytes: int
    streamed_bytes: int

    @property
    def num_resident(self) -> int:
        return len(self.resident)

    @property
    def num_streamed(self) -> int:
        return self.num_blocks - self.num_resident


@dataclass(frozen=True)
class PassTimes:
    """Predicted seconds of one pass."""

    compute: float
    transfer: float

    @property
    def transfer_bound(self) -> bool:
        return self.transfer > self.compute

    @property
    def total(self) -> float:
        """Transfers overlap compute, so the slower of the two counts."""
        return max(self.compute, self.transfer)


@dataclass(frozen=True)
class Candidate:
    """One way to denoise."""

    model: ModelFootprint
    work: WorkSize
    limits: Limits
    choice: Choice
    blocks: BlockPlacement
    host: HostMemory
    denoise: DenoiseMemory
    times: PassTimes


# A candidate's choice with one more thing switched on, or None where there is no more of it.
Step = Callable[[Candidate], Choice | None]


def spread_residents(num_blocks: int, num_resident: int) -> tuple[int, ...]:
    """Indices of residents spread evenly between streamed blocks, so that each buys time for the next transfer."""
    return tuple(i for i in range(num_blocks) if (i + 1) * num_resident // num_blocks > i * num_resident // num_blocks)


def candidates(model: ModelFootprint, work: WorkSize, limits: Limits) -> Iterator[Candidate]:
    """Candidates from the leanest up; each is at least as fast as the one before and has no fewer residents."""
    return _from_the_leanest(_Maker(model, work, limits))


def _from_the_leanest(maker: _Maker) -> Iterator[Candidate]:
    model, work, limits = maker.model, maker.work, maker.limits
    by_hand = limits.blocks_to_swap >= 0
    num_resident = model.num_blocks - limits.blocks_to_swap if by_hand else 0
    queries = QUERY_CHUNKS[0] if model.streams_queries and not work.all_queries else None
    packed_keys = model.packs_keys and not work.all_queries
    # who sets how many blocks arrive ahead means blocks
    in_stages = bool(model.stage_bytes) and limits.num_slots is None
    transient = model.transient_bytes > 0
    choice = Choice(
        TOKEN_CHUNKS[0], _head_groups(model)[0], False, num_resident, transient, queries, in_stages, packed_keys
    )
    candidate = maker.make(choice)
    yield candidate
    seconds = candidate.times.total
    compute: list[Step] = [
        _fair_chunk, _fair_packed, _exact_keys, _fewer_groups, _fair_queries, _larger_chunk, _more_queries,
        _kept_fixed, _whole_blocks,
    ]  # fmt: skip
    transfers: list[Step] = [_exact_keys, _whole_blocks, _kept_fixed, _cached_text]
    if not by_hand:
        transfers.append(_more_residents)
    while True:
        steps = transfers + compute if candidate.times.transfer_bound else compute + transfers
        upgrades = [maker.make(better) for step in steps if (better := step(candidate))]
        if not upgrades:
            return
        free = [upgrade for upgrade in upgrades if upgrade.denoise.total <= candidate.denoise.total]
        candidate = (free or upgrades)[0]
        if candidate.times.total <= seconds:  # blocks of unequal size can make one slower: leave it out
            seconds = candidate.times.total
            yield candidate


def fastest_candidate(
    model: ModelFootprint, work: WorkSize, limits: Limits, budget_bytes: int, spare_bytes: int = 0
) -> Candidate | None:
    """The fastest way to denoise in so many bytes, None where there is none.

    `spare_bytes` of them are left where a leaner way than that does: the leanest ones may take all.
    Of the candidates that fit the last one holds most weights; what is too little for the next one goes into larger
    pieces, for which others that hold fewer weights, and compute no faster by it, may have more room.
    """
    maker = _Maker(model, work, limits)
    known = list(_from_the_leanest(maker))
    leanest = min(each.denoise.total for each in known)
    if leanest > budget_bytes:
        return None
    budget_bytes = max(budget_bytes - spare_bytes, leanest)
    fitting = [each for each in known if each.denoise.total <= budget_bytes]
    first_of_weights = {_weights_of(each.choice): each for each in reversed(fitting) if not each.times.transfer_bound}
    starts = [fitting[-1], *first_of_weights.values()]
    ways = [way for start in starts for way in _in_larger_pieces(start, maker) if way.denoise.total <= budget_bytes]
    return min(ways, key=_slowness)


def _weights_of(choice: Choice) -> tuple[int, bool, bool, bool]:
    """Which weights are on the device."""
    return choice.num_resident, choice.cache_text_kv, choice.transient_fixed, choice.in_stages


def _in_larger_pieces(candidate: Candidate, maker: _Maker) -> Iterator[Candidate]:
    """The same weights on the device, with all or larger pieces of everything else."""
    steps: tuple[Step, ...] = (_exact_keys, _fewer_groups, _more_queries, _larger_chunk)
    known = {candidate.choice}
    ways = [candidate]
    while ways:
        way = ways.pop()
        yield way
        for step in steps:
            if (choice := step(way)) is not None and choice not in known:
                known.add(choice)
                ways.append(maker.make(choice))


def _slowness(candidate: Candidate) -> tuple[float, int, float, float, bool, int]:
    """By time; by what would be faster if the predicted rates are wrong; then by memory.

    Of rings those of whole blocks: stages computed in less time than predicted would be waited for.
    """
    times, choice = candidate.times, candidate.choice
    residents = candidate.blocks.num_resident
    return times.total, -residents, times.compute, times.transfer, choice.transient_fixed, candidate.denoise.total


def _larger_chunk(candidate: Candidate) -> Choice | None:
    chunk = candidate.choice.token_chunk
    if chunk >= min(candidate.work.rows, TOKEN_CHUNKS[-1]):
        return None
    return replace(candidate.choice, token_chunk=TOKEN_CHUNKS[TOKEN_CHUNKS.index(chunk) + 1])


def _fewer_groups(candidate: Candidate) -> Choice | None:
    fewer = [groups for groups in _head_groups(candidate.model) if groups < candidate.choice.head_groups]
    return replace(candidate.choice, head_groups=fewer[0]) if fewer else None


def _fair_chunk(candidate: Candidate) -> Choice | None:
    fair = FAIR_PACKED_CHUNK if candidate.choice.packed_keys else FAIR_CHUNK
    return _larger_chunk(candidate) if candidate.choice.token_chunk < fair else None


def _fair_queries(candidate: Candidate) -> Choice | None:
    """Queries of more rows, but not of all."""
    chunk = candidate.choice.query_chunk
    return _more_queries(candidate) if chunk is not None and chunk < QUERY_CHUNKS[-1] else None


def _fair_packed(candidate: Candidate) -> Choice | None:
    """The same where keys and values are unpacked for every such chunk."""
    return _fair_queries(candidate) if candidate.choice.packed_keys else None


def _exact_keys(candidate: Candidate) -> Choice | None:
    """Keep keys and values as they were computed."""
    return replace(candidate.choice, packed_keys=False) if candidate.choice.packed_keys else None


def _more_queries(candidate: Candidate) -> Choice | None:
    choice, work = candidate.choice, candidate.work
    if choice.allowed_queries(work) == work.rows:
        return None
    more = next((chunk for chunk in QUERY_CHUNKS if choice.allowed_queries(work) < chunk < work.tokens), None)
    return replace(choice, query_chunk=more)


def _cached_text(candidate: Candidate) -> Choice | None:
    """Cache the text's keys and values where that spares more bytes per pass than residents of the same size."""
    model, blocks = candidate.model, candidate.blocks
    if candidate.choice.cache_text_kv or not model.text_kv_bytes:
        return None
    cost = model.text_cache_bytes(candidate.work) - (blocks.num_resident + blocks.num_slots) * model.text_kv_bytes
    spared = blocks.num_streamed * model.text_kv_bytes
    return replace(candidate.choice, cache_text_kv=True) if cost < spared else None


def _kept_fixed(candidate: Candidate) -> Choice | None:
    """Keep what is needed only before the blocks: its copy in every pass hides behind nothing."""
    return replace(candidate.choice, transient_fixed=False) if candidate.choice.transient_fixed else None


def _whole_blocks(candidate: Candidate) -> Choice | None:
    return replace(candidate.choice, in_stages=False) if candidate.choice.in_stages else None


def _more_residents(candidate: Candidate) -> Choice | None:
    """More residents, so many that the streamed count is a multiple of the slots: prefetch then wraps seamlessly."""
    slots, streamed = _num_slots(candidate.limits), candidate.blocks.num_streamed
    if streamed == 0:
        return None
    fewer = (streamed - 1) // slots * slots
    if fewer <= slots:  # a ring as large as what streams through it: rather keep everything
        fewer = 0
    parking, num_blocks = candidate.limits.parking, candidate.model.num_blocks
    if parking is not None and num_blocks - fewer > parking.most_resident(candidate.model.block_bytes):
        return None
    return replace(candidate.choice, num_resident=candidate.model.num_blocks - fewer)


def _num_slots(limits: Limits) -> int:
    return limits.num_slots or DEFAULT_SLOTS


def _head_groups(model: ModelFootprint) -> list[int]:
    """Numbers of head groups worth having, most first: even ones, of 2 heads up to what runs at full speed, or one."""
    heads = model.num_heads
    even = [groups for groups in range(heads, 0, -1) if heads % groups == 0 and heads // groups >= FEWEST_HEADS] or [1]
    full = next((groups for groups in even if heads // groups >= FULL_SPEED_HEADS), 1)
    return [groups for groups in even if groups >= full or groups == 1]


@dataclass(frozen=True)
class _Weights:
    """Where blocks are and come from, for all candidates that have the same on the device; `transfer` in seconds."""

    blocks: BlockPlacement
    host: HostMemory
    bytes: WeightBytes
    transfer: float


class _Maker:
    """Makes candidates for one piece of work; what several have in common is computed once."""

    def __init__(self, model: ModelFootprint, work: WorkSize, limits: Limits):
        self.model, self.work, self.limits = model, work, limits
        self._weights: dict[tuple[int, bool, bool], _Weights] = {}
        self._passes: dict[tuple[object, ...], tuple[DenoiseMemory, float]] = {}

    def make(self, choice: Choice) -> Candidate:
        """The way that `choice` says."""
        model, work, limits = self.model, self.work, self.limits
        held = (choice.num_resident, choice.cache_text_kv, choice.in_stages)
        weights = self._weights.get(held)
        if weights is None:
            weights = self._weights[held] = _weights_on_device(model, limits, choice, work.cards)
        # all but what says where blocks are
        key = (
            choice.token_chunk, choice.head_groups, choice.cache_text_kv, choice.transient_fixed, choice.query_chunk,
            choice.packed_keys,
        )  # fmt: skip
        known = self._passes.get(key)
        if known is None:
            of_a_pass = replace(choice, num_resident=0, in_stages=False)
            known = denoise_memory(model, work, of_a_pass, limits), compute_seconds(model, work, of_a_pass, limits)
            self._passes[key] = known
        memory, seconds = known
        times = PassTimes(seconds, weights.transfer)
        denoise = memory.holding(weights.bytes)
        return Candidate(model, work, limits, choice, weights.blocks, weights.host, denoise, times)


def _weights_on_device(model: ModelFootprint, limits: Limits, choice: Choice, num_cards: int) -> _Weights:
    sizes = model.streamable_bytes(choice.cache_text_kv)
    resident = spread_residents(model.num_blocks, choice.num_resident)
    kept = set(resident)
    streamed = tuple(size for index, size in enumerate(sizes) if index not in kept)
    num_slots = min(_num_slots(limits), len(streamed))
    total = sum(streamed)
    travelling = [index for index in range(model.num_blocks) if index not in kept]
    host, transfer = find_host_memory(model, sizes, travelling, limits, num_cards)
    ring = ring_bytes(streamed, num_slots)
    if choice.in_stages and streamed:
        stages = [size for index, each in enumerate(model.stage_bytes) if index not in kept for size in each]
        ring = min(ring, pair_bytes(stages))
        transfer *= STAGED_TRANSFER
    blocks = BlockPlacement(model.num_blocks, resident, num_slots, ring, total)
    return _Weights(blocks, host, WeightBytes(sum(sizes) - total, ring, host.pinned_bytes), transfer)
