"""Blocks parked in another card's memory (the CPU's, under another name): lists, homes, plans, bits, giving back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.cli.main import main
from lowvram_video.memory.plan.footprint import GIB, Limits
from lowvram_video.memory.plan.host_memory import RAM_MARGIN_BYTES
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.memory.plan.parking import Amount, Homes, Parking, ParkPlace, find_homes, parse_parking
from lowvram_video.memory.plan.plan import PlanError
from lowvram_video.memory.plan.table import describe
from lowvram_video.memory.report.stream_log import StreamLog
from lowvram_video.memory.stream.layout import Part
from lowvram_video.memory.stream.parked_blocks import ParkedBlocks
from lowvram_video.memory.stream.pinned import PinnedBudget
from lowvram_video.memory.stream.shared_blocks import SharedParked
from lowvram_video.memory.stream.split_blocks import SplitBlocks
from lowvram_video.memory.stream.streams import Span
from lowvram_video.runtime import host_weights
from lowvram_video.runtime.parked import find_parking
from lowvram_video.runtime.run_limits import run_limits
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.card_links import ASSUMED_GBPS
from lowvram_video.wanvideo.streamed import StreamedWan

from .test_pipeline import latent_of
from .test_several_cards import REQUEST, WORK, file, files, inputs  # noqa: F401 - fixtures

CPU, OTHER = torch.device("cpu"), torch.device("cpu", 1)
BLOCKS = 4  # of the file's


class TestLists:
    def test_as_distorch_s_users_write_them(self):
        spec = parse_parking("cuda:0,10gb;cuda:1,15gb;cpu,*")
        assert spec.cards == ("cuda:0", "cuda:1")
        assert spec.amount("cuda:1") == Amount(15 * GIB) and spec.amount("cpu") == Amount()
        shares = parse_parking(" CUDA , 25% ; cpu,75% ;")
        assert shares.cards == ("cuda:0",) and shares.places[0][1].of(1000) == 250
        assert parse_parking("cuda:1,512mb;disk,*").amount("cuda:1") == Amount(512 * 2**20)
        assert parse_parking("cuda:1,1.5g").amount("cuda:1") == Amount(3 * 2**29)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "is no place with an amount"), ("cuda:1", "'cuda:1' is no place with an amount"),
            ("cuda:1,8gb,cpu,*", "'8gb,cpu,\\*' is no amount"), ("gpu1,8gb", "'gpu1,8gb' is no place"),
            ("cuda:1,8 gib", "'8 gib' is no amount"), ("cuda:1,-8gb", "'-8gb' is no amount"),
            ("cuda:1,0gb", "0gb is no amount of memory"), ("cuda:1,0%", "is no share"), ("cuda:1,101%", "is no share"),
            ("cuda:1,8gb;cuda:1,2gb", "cuda:1 is there twice"), ("cuda,8gb;cuda:0,2gb", "cuda:0 is there twice"),
            ("cuda:1,60%;cpu,60%", "the percentages are 120 in all"), ("cuda:1,nan", "'nan' is no amount"),
            ("cuda:1,1e99gb", "is no amount"), ("cuda:1,8gb;;cpu,*", "'' is no place"), ("cuda:-1,8gb", "is no place"),
            ("cuda:1,٣gb", "is no amount"), ("cuda:1,0.0000001b", "is no amount of memory"),
            ("cuda:1,999999999999999gb", "is no amount of memory"),
        ],
    )  # fmt: skip
    def test_damaged_ones_are_named(self, text, said):
        with pytest.raises(ValueError, match=said):
            parse_parking(text)

    @settings(deadline=None)
    @given(st.text(alphabet="cudapisk:01, ;*%.gbm-", max_size=40))
    def test_whatever_is_written_is_a_list_or_an_error_that_shows_it(self, text):
        try:
            spec = parse_parking(text)
        except ValueError as error:
            assert repr(text) in str(error)
        else:
            assert all(0 < amount.of(10**9) <= 10**9 for _, amount in spec.places)

    @settings(deadline=None)
    @given(
        st.lists(st.integers(1, 50), min_size=1, max_size=12),
        st.lists(st.integers(0, 200), max_size=3),
        st.one_of(st.none(), st.integers(-10, 300)),
        st.data(),
    )
    def test_every_block_has_one_home_that_has_room(self, sizes, rooms, ram, data):
        streamed = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1))))
        places = tuple(ParkPlace(f"cuda:{index + 1}", Amount(), room, 1.0) for index, room in enumerate(rooms))
        homes = find_homes(sizes, streamed, Parking(places), ram)
        everywhere = [index for _, blocks in homes.cards for index in blocks] + [*homes.ram, *homes.disk]
        assert sorted(everywhere) == list(range(len(sizes)))
        for (_, blocks), place in zip(homes.cards, places, strict=True):
            assert sum(sizes[index] for index in blocks) <= place.free_bytes and set(blocks) <= set(streamed)
        assert ram is None or not homes.ram or sum(sizes[index] for index in homes.ram) <= ram
        assert ram is not None or not homes.disk

    def test_a_card_that_is_not_there_is_named(self):
        with pytest.raises(ValueError, match="device 'cuda:1'"):
            find_parking(parse_parking("cuda:1,8gb"), CPU, lambda card: 0)

    def test_what_the_computing_cards_may_keep_is_a_limit_on_each(self):
        spec = parse_parking("cpu:1,8gb;cpu:2,50%;cpu:3,25%")
        parking = find_parking(spec, torch.device("cpu", 2), lambda card: GIB, [torch.device("cpu", 3)])
        assert [(place.name, place.gbps) for place in parking.cards] == [("cpu:1", ASSUMED_GBPS / 2)], (
            "both copy from it"
        )
        assert parking.most_resident([10] * 8) == 2

    def test_what_the_computing_card_may_keep_is_a_limit(self):
        parking = find_parking(parse_parking("cpu:1,8gb;cpu:2,50%"), torch.device("cpu", 2), lambda card: GIB)
        assert [place.name for place in parking.cards] == ["cpu:1"]
        assert parking.most_resident([10] * 8) == 4 and Parking(()).most_resident([10] * 8) == 8


def parked_limits(text: str, num_streamed: int = BLOCKS, free: int = GIB, **changes: Any) -> Limits:
    """On this machine's CPU, as where so many blocks stream."""
    limits = run_limits(RunSettings(parking=parse_parking(text)), StandIn(), free_on=lambda card: free)
    return replace(limits, blocks_to_swap=num_streamed, **changes)


class StandIn:
    """As much of an `Execution` as limits look at."""

    class ops:
        name = "eager"

    class attention:
        workspace = None

    watch = None


def started(path: Path, limits: Limits, **settings: Any) -> StreamedWan:
    model = StreamedWan(path, RunSettings(**settings))
    model.start_fitting(model.make_plan(WORK, limits))
    return model


def expected(path: Path) -> torch.Tensor:
    model = started(path, limits_for(CPU))
    made = model(*inputs())
    model.release()
    return made


def parked_bytes(model: StreamedWan) -> int:
    return sum(model.weights.parked_on(torch.device("cpu", number)) for number in (1, 2))


def num_parked(homes: Homes) -> int:
    return sum(len(blocks) for _, blocks in homes.cards)


def homes_of(model: StreamedWan) -> Homes:
    assert model.plan is not None and model.plan.host.homes is not None
    return model.plan.host.homes


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def block_bytes(file) -> int:  # noqa: F811
    return StreamedWan(file, RunSettings()).weights.layouts[0].nbytes


class TestPasses:
    @pytest.mark.parametrize("text", ["cpu:1,*", "cpu:1,50%;cpu,*", "cpu:1,30%;cpu:2,30%;cpu,*", "cpu:1,1kb;cpu,*"])
    def test_the_bits_of_one_in_ram(self, file, text):  # noqa: F811
        model = started(file, parked_limits(text))
        for _ in range(2):
            assert model(*inputs()).equal(expected(file))
        parked = num_parked(homes_of(model))
        assert parked == {"cpu:1,*": 4, "cpu:1,50%;cpu,*": 2, "cpu:1,30%;cpu:2,30%;cpu,*": 2}.get(text, 0)
        assert parked_bytes(model) == parked * model.weights.layouts[0].nbytes
        model.release()
        assert parked_bytes(model) == 0

    def test_cards_then_ram_then_the_disk(self, file, block_bytes):  # noqa: F811
        """RAM may be kept small by hand; then two of the four come from the disk."""
        model = started(file, parked_limits(f"cpu:1,30%;cpu,{block_bytes}b;disk,*"))
        homes = homes_of(model)
        assert [len(homes.cards[0][1]), len(homes.ram), len(homes.disk)] == [1, 1, 2]
        assert model.plan is not None and model.plan.host.from_disk
        assert model(*inputs()).equal(expected(file))
        assert "1 block is parked on cpu:1" in describe(model.plan)
        assert "2 blocks are read from the file in every pass" in describe(model.plan)
        model.release()

    def test_ram_that_is_too_small_is_for_what_reads_the_disk(self, file, block_bytes):  # noqa: F811
        model = started(
            file, parked_limits("cpu:1,1kb;cpu,*", ram_budget_bytes=RAM_MARGIN_BYTES + int(3.5 * block_bytes))
        )
        assert [num_parked(homes_of(model)), len(homes_of(model).ram), len(homes_of(model).disk)] == [0, 1, 3]
        assert model(*inputs()).equal(expected(file))
        model.release()

    def test_residents_are_not_parked(self, file):  # noqa: F811
        model = started(file, parked_limits("cpu:1,*", num_streamed=2))
        assert num_parked(homes_of(model)) == 2 and len(homes_of(model).ram) == 2
        assert model(*inputs()).equal(expected(file))
        model.release()

    def test_a_card_s_room_is_no_more_than_is_free(self, file, block_bytes):  # noqa: F811
        model = started(file, parked_limits("cpu:1,*", free=2 * block_bytes))
        assert num_parked(homes_of(model)) == 2
        model.release()

    def test_given_back_between_passes(self, file):  # noqa: F811
        """What was parked comes from RAM, or the disk, from the next start on; the bits stay."""
        want = expected(file)
        for ram in (None, RAM_MARGIN_BYTES + 30 * 2**20):
            model = started(file, parked_limits("cpu:1,50%;cpu,*", ram_budget_bytes=ram))
            assert model(*inputs()).equal(want)
            assert parked_bytes(model) > 0
            model.stop()
            model.weights.unpark(OTHER)
            assert parked_bytes(model) == 0
            model.start_fitting(model.make_plan(WORK, parked_limits("cpu:1,50%;cpu,*", free=0, ram_budget_bytes=ram)))
            assert model(*inputs()).equal(want) and num_parked(homes_of(model)) == 0
            model.release()

    def test_a_card_without_room_after_all_is_left(self, file, monkeypatch, caplog):  # noqa: F811
        def full(*_: Any) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(ParkedBlocks, "_read", full)
        model = started(file, parked_limits("cpu:1,50%;cpu,*"))
        assert "has no room for the blocks that were to be parked there" in caplog.text
        assert model(*inputs()).equal(expected(file))
        model.release()

    def test_an_interrupt_while_they_are_read_leaves_nothing(self, file):  # noqa: F811
        class Interrupt(BaseException):
            pass

        left = [3]

        def hook() -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Interrupt

        model = StreamedWan(file, RunSettings(), between_blocks=hook)
        plan = model.make_plan(WORK, parked_limits("cpu:1,50%;cpu,*"))
        with pytest.raises(Interrupt):
            model.start_fitting(plan)
        assert model.weights.blocks is None and model.host_bytes == 0
        left[0] = 10**6
        model.start_fitting(plan)
        assert model(*inputs()).equal(expected(file))
        model.release()

    def test_through_a_pinned_pair_where_cards_do_not_reach_each_other(self, file, monkeypatch):  # noqa: F811
        class Pins:
            def pin(self, extent: torch.Tensor) -> bool:
                return True

            def unpin(self, extent: torch.Tensor) -> None:
                return

        source = StreamedWan(file, RunSettings()).weights
        blocks = SplitBlocks(source.layouts)
        budget = PinnedBudget(Pins(), GIB)
        blocks.settle(range(4), lambda layouts: ParkedBlocks(source.source, layouts, OTHER, True, budget))
        want, model = expected(file), StreamedWan(file, RunSettings())
        model.weights.blocks = blocks
        monkeypatch.setattr(model.weights, "read", lambda plan: None)
        model.start_fitting(model.make_plan(WORK, parked_limits("cpu:1,*")))
        assert model(*inputs()).equal(want)
        (home,) = blocks.homes
        assert 0 < blocks.pinned_bytes == blocks.host_bytes <= 2 * (home.source.parked_bytes // 4 + 4096)
        model.release()
        assert budget.pinned_bytes == 0

    @pytest.mark.parametrize("text", ["cpu:1,*", "cpu:1,30%;cpu,*", "cpu:1,30%;cpu,1b;disk,*"])
    def test_cards_that_share_passes_have_one_copy_of_what_is_parked(self, file, text):  # noqa: F811
        """The bits of one card, before and after the memory is given back; what one card's leaves belongs to none."""
        want, model = expected(file), started(file, parked_limits(text), others=(CPU, CPU))
        assert model.several is not None
        (parked,) = (home.source for home in model.weights.homes if isinstance(home.source, ParkedBlocks))
        for other in model.several.others:
            shared = [home.source for home in other.weights.homes if isinstance(home.source, SharedParked)]
            assert [each.extents for each in shared] == [parked.extents] and other.weights.parked_on(OTHER) == 0
            assert other.weights.pinned_bytes == 0
        for _ in range(2):
            assert model(*inputs()).equal(want)
        model.stop()
        model.weights.unpark(OTHER)
        model.start_fitting(model.make_plan(WORK, parked_limits(text, free=0)))
        assert model(*inputs()).equal(want) and parked_bytes(model) == 0
        model.release()
        model.use_cards(())
        model.start_fitting(model.make_plan(WORK, parked_limits(text)))
        assert model(*inputs()).equal(want) and parked_bytes(model) > 0
        model.release()
        assert parked_bytes(model) == 0

    def test_each_card_s_own_way_to_what_is_parked(self, file, monkeypatch):  # noqa: F811
        """One of those that compute does not reach it: that one has a pinned pair, and nobody else."""
        monkeypatch.setattr(host_weights, "reaches", lambda device, card: device.index != 2)
        model = StreamedWan(file, RunSettings(others=(torch.device("cpu", 2),)))
        model.start_fitting(model.make_plan(WORK, parked_limits("cpu:1,*")))
        assert model.several is not None
        sources = [each.weights.homes[0].source for each in (model, *model.several.others)]
        assert [source.staged for source in sources] == [False, True]
        model.release()


class TestPlans:
    def test_what_is_parked_need_not_be_in_ram(self, file, block_bytes):  # noqa: F811
        """With the second card's memory half of the RAM is enough, and nothing is read from the disk."""
        model, ram = StreamedWan(file, RunSettings()), RAM_MARGIN_BYTES + int(3.5 * block_bytes)
        plan = model.make_plan(WORK, parked_limits("cpu:1,50%;cpu,*", ram_budget_bytes=ram))
        assert not plan.host.from_disk and plan.host.homes is not None and num_parked(plan.host.homes) == 2
        assert model.make_plan(WORK, replace(limits_for(CPU), ram_budget_bytes=ram)).host.from_disk

    def test_transfers_take_as_long_as_the_places_are_fast(self, file, block_bytes):  # noqa: F811
        model = StreamedWan(file, RunSettings())
        limits = replace(limits_for(CPU), blocks_to_swap=BLOCKS, h2d_gbps=10.0)
        place = ParkPlace("cuda:1", Amount(), 2 * block_bytes, 40.0)
        plan = model.make_plan(WORK, replace(limits, parking=Parking((place,))))
        staged = 1.6 if plan.choice.in_stages else 1.0
        sizes = plan.model.streamable_bytes(plan.choice.cache_text_kv)
        assert plan.times.transfer == pytest.approx(staged * sizes[0] * (2 / 10e9 + 2 / 40e9))

    def test_too_little_ram_for_what_reads_the_disk_is_told(self, file):  # noqa: F811
        model = StreamedWan(file, RunSettings())
        with pytest.raises(PlanError, match="3 staging buffers and the process need"):
            model.make_plan(WORK, parked_limits("cpu:1,30%;cpu,*", ram_budget_bytes=RAM_MARGIN_BYTES))


class TestReport:
    def test_tells_what_was_spared_and_whether_it_was_faster(self):
        log = StreamLog()
        for place, seconds in ((0, 0.1), (1, 0.025), (2, 0.1), (3, 0.025)):
            log.add([Span("stall", place, place, place), Span("copy", place, place, place + seconds, 10**9)])
        parked = log.parked("cuda:1", 2, 3 * GIB, frozenset({1, 3}))
        assert parked.line() == (
            "parked on cuda:1: 2 blocks, 3.00 GiB of RAM spared; 2.0 GB came at 40.0 GB/s, faster than the others "
            "(10.0 GB/s)"
        )
        assert log.parked("cuda:1", 4, GIB, frozenset(range(4))).line().endswith("4.0 GB came at 16.0 GB/s")
        assert StreamLog().parked("cuda:1", 2, GIB, frozenset({1})).line().endswith("1.00 GiB of RAM spared")

    def test_places_are_those_of_the_parked_blocks(self, file):  # noqa: F811
        model = started(file, parked_limits("cpu:1,50%;cpu,*"))
        ((card, num_blocks, parked, places),) = model.parked_blocks()
        assert (card, num_blocks, parked) == ("cpu:1", 2, parked_bytes(model))
        stages = len(model.weights.layouts[0].spans(Part.ALL, model.plan is not None and model.plan.choice.in_stages))
        assert len(places) == 2 * stages and max(places) < 4 * stages
        model.release()
        assert model.parked_blocks() == []


class TestCommandLine:
    def test_two_experts_park_in_turn(self, files):  # noqa: F811
        """The second one finds the card free."""
        request = replace(REQUEST, guidance=1.0)
        want = latent_of(files, request)
        assert latent_of(files, request, RunSettings(parking=parse_parking("cpu:1,50%;cpu,*"))).equal(want)

    def test_a_list_that_is_none_is_an_error_of_its_flag(self, capsys):
        with pytest.raises(SystemExit):
            main(["generate", "--model", "x.safetensors", "--prompt", "a", "--park", "cuda:1"])
        assert "--park: parking 'cuda:1': 'cuda:1' is no place with an amount" in capsys.readouterr().err
