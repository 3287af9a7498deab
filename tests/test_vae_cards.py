"""A decoding by several cards (all of them the CPU): bit for bit one card's, whatever order they run in, or fail."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.team.mail import TeamError
from lowvram_video.team.team import Team
from lowvram_video.vae.retries import pieces_fitting
from lowvram_video.vae.strips import Strips
from lowvram_video.vae.tiling import decode_in
from lowvram_video.video.pictures import to_levels, to_uint8
from lowvram_video.wanvideo.decode_ways import Decoders, DecodeWay
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.vae import strip as strip_module
from lowvram_video.wanvideo.vae import wave as wave_module
from lowvram_video.wanvideo.vae.model import WanVAE
from lowvram_video.wanvideo.vae.wave import CardStrips, Wave, decode_on_cards
from torch import Tensor

from .test_several_cards import REQUEST, files, on_cards  # noqa: F401 - fixtures
from .test_vae_strips import TINY, allocated, random_latent, tiny  # noqa: F401 - fixtures

CPU = torch.device("cpu")
TIMEOUT = 20.0


@pytest.fixture(scope="module", params=list(TINY))
def vae(request: pytest.FixtureRequest) -> WanVAE:
    return tiny(TINY[request.param])


@pytest.fixture(scope="module")
def small() -> WanVAE:
    return tiny(TINY["2.1"])


def as_it_is(piece: Tensor) -> Tensor:
    return piece


def on(num_cards: int, vae: WanVAE, latent: Tensor, rows: int, **more: object) -> Tensor:
    team = Team([CPU] * num_cards, timeout_seconds=TIMEOUT)
    try:
        way = CardStrips(rows, num_cards)
        pieces = list(decode_on_cards([vae] * num_cards, team, latent, way, as_it_is, **more))
    finally:
        team.close()
    assert [piece.shape[2] for piece in pieces] == [1, *(4 for _ in pieces[1:])]
    return torch.cat(pieces, 2)


def alone(vae: WanVAE, latent: Tensor, rows: int) -> Tensor:
    return torch.cat(list(decode_in(vae, latent, Strips(rows), finish=as_it_is)), 2)


@settings(max_examples=4, deadline=None)
@given(num_cards=st.integers(2, 4), frames=st.integers(1, 4), height=st.integers(2, 5), rows=st.integers(8, 32))
def test_the_bits_of_one_card(vae, num_cards, frames, height, rows):
    """More strips than cards and fewer; the parts that wait are read by one while another writes further ones."""
    latent = random_latent(vae, frames, height, 1)
    assert on(num_cards, vae, latent, rows).equal(alone(vae, latent, rows))


@pytest.mark.parametrize(("num_cards", "rows", "at_work"), [(2, 8, 2), (3, 16, 2)])
def test_a_card_has_the_memory_of_one_strip(small, monkeypatch, num_cards, rows, at_work):
    """Whatever number it makes; one that makes none has none."""
    made, init = [], strip_module.Rings.__init__
    monkeypatch.setattr(strip_module.Rings, "__init__", lambda self, *given: (made.append(self), init(self, *given))[1])
    on(num_cards, small, random_latent(small, 2, 4, 1), rows)
    assert len(made) == 1 + at_work, "the first one's layers at the latent's size, and a strip of each card"


def test_what_waits_is_allocated_ahead(small, allocated):  # noqa: F811 - a fixture
    on(2, small, random_latent(small, 3, 4, 2), 12)
    assert [is_main for _, is_main in allocated] == [False] * 6


@pytest.mark.parametrize("seed", range(2))
def test_the_bits_of_one_card_in_any_order(small, monkeypatch, seed):
    """Cards that dawdle anywhere."""
    randomly, leave, latent = random.Random(seed), Wave.leave, random_latent(small, 4, 6, 2)

    def slowly(self: Wave, strip: int, event: None) -> None:
        time.sleep(randomly.choice((0, 0, 0.004)))
        leave(self, strip, event)
        time.sleep(randomly.choice((0, 0, 0.004)))

    monkeypatch.setattr(Wave, "leave", slowly)
    assert on(3, small, latent, 8).equal(alone(small, latent, 8))


class Stumble(BaseException):
    """An interrupt as hosts raise it: no Exception."""


@pytest.mark.parametrize("error", [Stumble, torch.cuda.OutOfMemoryError])
def test_a_failure_at_any_step_of_any_card_ends_all(small, monkeypatch, error):
    latent, steps = random_latent(small, 3, 3, 1), wave_module.WavePages.end
    monkeypatch.setattr(wave_module.WavePages, "end", lambda self, step: (count(), steps(self, step)))
    left = [0]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error("full")

    for at in range(1, 7):  # of two strips that leave pages, three steps each
        left[0] = at
        with pytest.raises(error):
            on(3, small, latent, 8)
    left[0] = 0
    assert on(3, small, latent, 8).equal(alone(small, latent, 8))


def test_progress_is_told_by_the_caller_s_thread_and_may_stop_all(small):
    latent, told = random_latent(small, 3, 4, 1), []

    def tell(done: int, count: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append((done, count))
        if len(told) == 2:
            raise Stumble

    with pytest.raises(Stumble):
        on(2, small, latent, 16, on_chunk=tell)
    told.clear()
    on(2, small, latent, 24, on_chunk=lambda done, count: told.append((done, count)))
    assert len(told) == 3 and {count for _, count in told} == {6} and told == sorted(told)


def test_a_card_that_never_leaves_its_rows_is_an_error():
    wave = Wave(3, lambda nbytes: torch.empty(nbytes), lambda: None, timeout_seconds=0.2)
    with pytest.raises(TeamError, match=r"strip 0 .* has not come to step 1 for 0.2 s: its card hangs or has gone"):
        wave.wait_for(0, 1)


class TestPipeline:
    def test_the_planned_strips_are_made_by_all_cards(self, files, caplog):  # noqa: F811
        decoders, plan, latent = planned(files, rows=16)
        by_all, alone, *_ = decoders.ways(plan)
        assert (by_all, alone) == (CardStrips(16, 2), Strips(16))
        with caplog.at_level("INFO"):
            made = made_by(decoders, latent, by_all)
        assert "decoding on 2 cards, in strips of 16 rows" in caplog.text
        assert made.equal(made_by(decoders, latent, alone))
        assert not any(isinstance(way, CardStrips) for way in decoders.ways(plan)[1:])

    def test_what_ran_out_of_memory_is_made_by_the_first_card(self, files, monkeypatch, caplog):  # noqa: F811
        def full(self: object, step: int) -> None:
            raise torch.cuda.OutOfMemoryError("full")

        decoders, plan, latent = planned(files, rows=16)
        want, ways = made_by(decoders, latent, Strips(16)), decoders.ways(plan)
        monkeypatch.setattr(wave_module.WavePages, "end", full)
        pieces = pieces_fitting(ways, lambda way: map(to_uint8, pieces_of(decoders, latent, way)), "decoding")
        assert torch.cat(list(pieces)).equal(to_uint8(want))
        assert "out of VRAM while decoding on 2 cards, in strips of 16 rows: next in strips of 16 rows" in caplog.text

    def test_what_another_card_fails_at_is_made_by_the_first(self, files, monkeypatch, caplog):  # noqa: F811
        def broken(self: object, step: int) -> None:
            raise RuntimeError("CUDA error: the launch timed out")

        decoders, _, latent = planned(files, rows=16)
        monkeypatch.setattr(wave_module.WavePages, "end", broken)
        assert made_by(decoders, latent, CardStrips(16, 2)).equal(made_by(decoders, latent, Strips(16)))
        assert "on 2 cards, in strips of 16 rows failed, and the first card decodes alone: RuntimeError" in caplog.text

    def test_one_card_decodes_whole_frames_and_where_ram_has_no_room_for_what_waits(self, files):  # noqa: F811
        decoders, plan, _ = planned(files, rows=16)
        whole = replace(plan, decode=replace(plan.decode, rows=0))
        short = replace(plan, limits=replace(plan.limits, ram_budget_bytes=1000))
        for each in (whole, short):
            assert not any(isinstance(way, CardStrips) for way in decoders.ways(each))
        assert not any(isinstance(way, CardStrips) for way in planned(files, 16, RunSettings())[0].ways(plan))


def planned(files, rows: int, settings: RunSettings | None = None) -> tuple[Decoders, MemoryPlan, Tensor]:  # noqa: F811
    pipeline = WanPipeline(files, settings or on_cards(2))
    pipeline.check(REQUEST)
    assert pipeline.plan is not None
    plan = replace(pipeline.plan, decode=replace(pipeline.plan.decode, rows=rows))
    decoders = pipeline.decoders(pipeline._opened_vae.build(torch.float32, CPU, "decoder"))
    return decoders, plan, random_latent(decoders.first, 3, 4, 6)


def pieces_of(decoders: Decoders, latent: Tensor, way: DecodeWay) -> Iterator[Tensor]:
    return decoders.pieces(latent, way, lambda done, count: None, to_levels)


def made_by(decoders: Decoders, latent: Tensor, way: DecodeWay) -> Tensor:
    return torch.cat(list(pieces_of(decoders, latent, way)), 2)
