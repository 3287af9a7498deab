"""Several cards that share a pass, on the CPU: bit for bit as one device, in any order of events, whatever fails."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.attention.sdpa import Sdpa
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import FramePackModel, Frames, History, Prompt, StepNag
from lowvram_video.fused.eager import EagerOps
from lowvram_video.sampling.caching.followed_cache import FollowedCache
from lowvram_video.sampling.caching.framepack import TeaCache
from lowvram_video.team.carriers import AS_THEY_ARE, Carrier, InEightBits, packed
from lowvram_video.team.heads import AttendMany, HeadExchange
from lowvram_video.team.link import HostLink, Link, Mark
from lowvram_video.team.mail import Mail, TeamError, TeamStopped
from lowvram_video.team.share import Part
from lowvram_video.team.spans import even_spans, group_sizes, head_spans, length, run_length
from lowvram_video.team.streams import wait_for_device, wait_until_idle
from lowvram_video.team.team import Team
from lowvram_video.transformer.nag import NagSettings
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import Extras, WanModel
from torch import Tensor

from . import tiny_framepack
from .tiny import randomize

CPU = torch.device("cpu")
TIMEOUT = 20.0  # seconds: a hang is a failure, not a test that never ends
WAN = WanConfig("t2v", 140, 192, 7, 2, text_dim=32, freq_dim=32)  # 7 heads: uneven for 2, 3 and 4 cards
FRAMEPACK = replace(tiny_framepack.CONFIG, num_heads=5)


def team_of(num_cards: int, links: Sequence[Link] | None = None, timeout: float = TIMEOUT) -> Team:
    return Team([CPU] * num_cards, links, timeout)


def share_pass(models: Sequence[Any], team: Team, sizes: tuple[int, ...] | None = None, in_step: bool = True) -> None:
    for rank, model in enumerate(models):
        model.share = team.share(rank, range(len(models)), sizes, in_step=in_step)


def cut_at(count: int, cuts: set[int]) -> tuple[int, ...]:
    """`count` things in groups that end at these places, where there are so many."""
    return tuple(stop - start for start, stop in pairwise([0, *sorted(cut for cut in cuts if cut < count), count]))


class TestSpans:
    @given(count=st.integers(0, 200), parts=st.integers(1, 9))
    def test_parts_are_even_and_complete(self, count, parts):
        spans = even_spans(count, parts)
        assert [spans[0].start, spans[-1].stop, len(spans)] == [0, count, parts]
        assert all(one.stop == other.start for one, other in pairwise(spans))
        assert max(map(length, spans)) - min(map(length, spans)) <= 1

    @given(heads=st.integers(1, 50), cards=st.integers(1, 9), cuts=st.sets(st.integers(1, 49), max_size=6))
    def test_every_head_is_one_card_s_in_one_group(self, heads, cards, cuts):
        sizes = cut_at(-(-heads // cards), cuts)
        spans = head_spans(heads, cards, sizes)
        assert [length(group[0]) for group in spans] == [*sizes]
        assert sorted(head for group in spans for span in group for head in range(span.start, span.stop)) == [
            *range(heads)
        ]
        assert all(any(map(length, group)) for group in spans)

    @given(size=st.integers(1, 400), cards=st.integers(1, 8))
    def test_runs_divide_a_timestep_s_tokens(self, size, cards):
        run = run_length(size, cards)
        assert size % run == 0 and size // run >= min(size, cards)


class TestWan:
    @pytest.mark.parametrize(
        ("num_cards", "head_groups", "sizes"), [(2, 1, (1, 2, 1)), (2, 3, None), (3, 1, (1, 2)), (4, 3, None)]
    )
    @pytest.mark.parametrize("per_frame", [False, True])
    def test_equal_to_one_device(self, num_cards, head_groups, sizes, per_frame):
        latent, text = random_like((2, 16, 3, 10, 12), 1), random_like((2, 8, 32), 2)
        timestep = (
            torch.tensor([[900.0, 0.0, 300.0], [20.0, 500.0, 700.0]]) if per_frame else torch.tensor([900.0, 20.0])
        )
        models = [wan(head_groups) for _ in range(num_cards)]
        with torch.inference_mode():
            expected = models[0](latent, timestep, text)
            team = team_of(num_cards)
            for in_step in (True, False, True):
                share_pass(models, team, sizes, in_step)
                made = team.run(lambda rank: models[rank](latent, timestep, text))
                assert all(one.equal(expected) for one in made)
        team.close()

    @pytest.mark.parametrize("variant", ["vace", "vace of two", "vace of none", "reference", "camera"])
    def test_variants_are_shared_too(self, variant):
        config = {
            "vace": replace(WAN, vace_layers=1, vace_channels=96),
            "reference": replace(WAN, reference_channels=16),
            "camera": replace(WAN, camera_channels=24),
        }[variant.split()[0]]
        extras = {
            "vace": Extras(vace_frames=(random_like((1, 96, 3, 8, 6), 5),), vace_strengths=(0.7,)),
            "vace of two": Extras(  # a block of VACE attends once for each
                vace_frames=tuple(random_like((1, 96, 3, 8, 6), seed) for seed in (5, 6)), vace_strengths=(0.7, 0.4)
            ),
            "vace of none": Extras(),
            "reference": Extras(reference=random_like((1, 16, 8, 6), 5)),
            "camera": Extras(camera=random_like((1, 24, 3, 64, 48), 5)),
        }[variant]
        latent, text, timestep = random_like((1, 16, 3, 8, 6), 1), random_like((1, 8, 32), 2), torch.tensor([700.0])
        models = [wan(1, config) for _ in range(3)]
        with torch.inference_mode():
            expected = models[0](latent, timestep, text, extras=extras)
            team = team_of(3)
            share_pass(models, team)
            made = team.run(lambda rank: models[rank](latent, timestep, text, extras=extras))
        assert all(one.equal(expected) for one in made)
        team.close()

    def test_too_few_tokens_are_refused_by_all(self):
        models, team = [wan(1) for _ in range(4)], team_of(4)
        share_pass(models, team)
        latent, text = random_like((1, 16, 1, 2, 2), 1), random_like((1, 8, 32), 2)
        with pytest.raises(ValueError, match="1 tokens cannot be shared by 4 cards: use fewer cards"):
            team.run(lambda rank: models[rank](latent, torch.tensor([5.0]), text))


class TestFramePack:
    @pytest.mark.parametrize(
        ("num_cards", "cached", "nag"), [(2, True, False), (3, False, False), (4, True, False), (3, False, True)]
    )
    def test_equal_to_one_device(self, num_cards, cached, nag):
        models = [framepack() for _ in range(num_cards)]
        history = History(frames_of(2, [0, 10], 1), frames_of(2, [11, 12], 2), frames_of(4, [13, 14, 15, 16], 3))
        noisy, image = frames_of(3, [1, 2, 3], 4), random_like((6, FRAMEPACK.dim), 5)
        prompt = Prompt(random_like((1, 7, 24), 6), random_like((1, 12), 7))
        with torch.inference_mode():
            times = torch.tensor([900.0, 880.0, 860.0, 500.0])
            steps = models[0].conditions(prompt, times, 6000.0)
            if nag:
                other = Prompt(-prompt.text[:, 3:], prompt.pooled)
                negative = models[0].conditions(other, times, 6000.0)
                guided = zip(steps, negative, strict=True)
                steps = [replace(step, nag=StepNag(against, NagSettings())) for step, against in guided]
            alone = TeaCache(len(steps), threshold=1e9) if cached else None
            shared: list[Any] = [TeaCache(len(steps), threshold=1e9), *(FollowedCache() for _ in models[1:])]
            expected = []
            for index, step in enumerate(steps):
                if alone is not None:
                    alone.begin_step(index)
                expected.append(models[0](noisy, history, step, image, alone))
            team = team_of(num_cards)
            for index, step in enumerate(steps):
                share_pass(models, team, in_step=index % 2 == 0)
                shared[0].begin_step(index)
                caches = shared if cached else [None] * num_cards
                made = team.run(
                    lambda rank, step=step, caches=caches: models[rank](noisy, history, step, image, caches[rank])
                )
                assert all(one.equal(expected[index]) for one in made)
        team.close()


@dataclass
class Pending:
    """A copy that a lazy link has not made yet."""

    pairs: list[tuple[Tensor, Tensor]]
    done: bool = False


class LazyLink(HostLink):
    """Copies at the last moment allowed, or at some moment before: it shows who reads too early or writes too early."""

    def __init__(self, seed: int, lock: threading.Lock) -> None:
        self.random, self.lock = random.Random(seed), lock
        self.waiting: list[Pending] = []

    def offer(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Mark]:
        self.dawdle()
        return tensors, None

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        pending = Pending(list(pairs))
        for own, _ in pending.pairs:
            own.fill_(float("nan"))
        self.waiting.append(pending)
        self.dawdle()
        return pending

    def wait(self, mark: Mark) -> None:
        self.dawdle()
        if mark is not None:
            self.make(mark)

    def dawdle(self) -> None:
        time.sleep(self.random.choice((0, 0, 0, 0.001)))
        if self.waiting and self.random.random() < 0.3:
            self.make(self.waiting.pop(self.random.randrange(len(self.waiting))))

    def make(self, pending: Pending) -> None:
        with self.lock:
            if not pending.done:
                for own, other in pending.pairs:
                    own.copy_(other)
                pending.done = True


class TestAnyOrder:
    @settings(max_examples=25, deadline=None)
    @given(
        num_cards=st.integers(2, 4),
        num_heads=st.integers(1, 18),
        tokens=st.integers(4, 11),
        cuts=st.sets(st.integers(1, 8), max_size=4),
        batch=st.integers(1, 2),
        seed=st.integers(0, 1000),
        way=st.sampled_from(["at once", "in turns", "by one thread"]),
    )
    def test_attention_is_that_of_one_device(self, num_cards, num_heads, tokens, cuts, batch, seed, way):
        q, k, v = (random_like((batch, tokens, num_heads, 8), seed + each) for each in range(3))
        attend = Sdpa(CPU).attend
        expected = attend(q, k, v)
        spans, lock = even_spans(tokens, num_cards), threading.Lock()
        sizes = cut_at(-(-num_heads // num_cards), cuts)
        links = [LazyLink(seed + rank, lock) for rank in range(num_cards)]
        team = Team([CPU] * num_cards, links, TIMEOUT, random.Random(seed).choice)

        def layers(rank: int) -> Tensor:
            part = Part(team.share(rank, range(num_cards), sizes, in_step=way == "by one thread"), spans)
            own = [tensor[:, spans[rank]].clone() for tensor in (q, k, v)]
            results = []

            def blocks() -> Iterator[None]:
                for _ in range(2):
                    used = [tensor.clone() for tensor in own]
                    part.attend(used[0], used[1], used[2], attend, 1)
                    used[1].fill_(float("nan"))  # the next layer's
                    used[2].fill_(float("nan"))
                    results.append(used[0])
                    yield

            part.run(blocks(), CPU)
            assert results[0].equal(results[1])
            return results[1]

        with torch.inference_mode():
            for _ in range(2):
                assert torch.cat(team.run(layers, way != "at once"), 1).equal(expected)
        team.close()


class TestPacked:
    @pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.bfloat16), (6, torch.bfloat16), (6, torch.float32)])
    def test_it_is_the_heads_side_by_side(self, head_dim, dtype):
        """In words of 16 bytes where heads are whole ones, and else too."""
        tensors = random_like((3, 9, 5, head_dim), 1).to(dtype).unbind(0)
        for heads in (slice(0, 2), slice(1, 4), slice(4, 5)):
            expected = torch.stack([tensor[:, heads] for tensor in tensors], 1)
            out = torch.full_like(expected, float("nan"))
            assert packed(tensors, heads).equal(expected) and packed(tensors, heads, out).equal(expected)
            assert out.equal(expected)


class TestEightBits:
    """Where the user computes in 8 bits, what cards exchange may travel so."""

    @pytest.mark.parametrize(("num_cards", "num_heads", "groups", "batch"), [(2, 4, 1, 1), (3, 7, 2, 2), (4, 3, 1, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_attention_is_nearly_that_of_one_device_by_half_of_the_bytes(
        self, num_cards, num_heads, groups, batch, dtype
    ):
        q, k, v = (random_like((batch, 33, num_heads, 128), each).to(dtype) for each in range(3))
        expected = Sdpa(CPU).attend(q.float(), k.float(), v.float())
        sent: dict[str, int] = {}
        made = {}
        for name, carrier in (("exact", AS_THEY_ARE), ("packed", InEightBits(EagerOps()))):
            links = [CountingLink() for _ in range(num_cards)]
            made[name] = attended_by(team_of(num_cards, links), (q, k, v), groups, carrier)
            sent[name] = sum(link.nbytes for link in links)
        assert made["exact"].equal(Sdpa(CPU).attend(q, k, v))
        error = float((made["packed"].float() - expected).norm() / expected.norm())
        print(f"{num_cards} cards, {dtype}: relative error {error:.2e}")
        assert 0 < error < 0.012
        assert sent["packed"] <= sent["exact"] * (1 + 5 / 128) / dtype.itemsize

    def test_results_beside_the_first_travel_too(self):
        q, k, v = (random_like((1, 9, 5, 16), each) for each in range(3))
        outs = [torch.empty(1, length(span), 5, 16) for span in even_spans(9, 2)]
        attend = Sdpa(CPU).attend
        made = attended_by(
            team_of(2), (q, k, v), 2, InEightBits(EagerOps()), lambda *qkv: [attend(*qkv), -attend(*qkv)], outs
        )
        for result, sign in ((made, 1), (torch.cat(outs, 1), -1)):
            expected = sign * attend(q, k, v)
            assert float((result - expected).norm() / expected.norm()) < 0.012


class CountingLink(HostLink):
    nbytes = 0

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        pairs = list(pairs)
        self.nbytes += sum(own.nbytes for own, _ in pairs)
        return super().fetch(pairs, after)


def attended_by(
    team: Team,
    qkv: tuple[Tensor, Tensor, Tensor],
    groups: int,
    carrier: Carrier,
    attend: AttendMany = lambda *qkv: [Sdpa(CPU).attend(*qkv)],
    more: Sequence[Tensor] = (),
) -> Tensor:
    """Attention of all cards' tokens `[B, N, H, D]`; `more` is each card's second result."""
    num_cards = len(team.devices)
    spans = even_spans(qkv[0].shape[1], num_cards)
    sizes = group_sizes(-(-qkv[0].shape[2] // num_cards), groups)

    def layer(rank: int) -> Tensor:
        q, k, v = (tensor[:, spans[rank]].clone() for tensor in qkv)
        outs = more[rank : rank + 1]
        HeadExchange(team.exchanges[rank], range(num_cards), spans, (q, k, v), sizes, outs, carrier).run(attend)
        return q

    with torch.inference_mode():
        made = torch.cat(team.run(layer), 1)
    team.close()
    return made


class TestTurns:
    def test_one_runs_at_a_time(self):
        team, inside = team_of(3), 0

        def task(rank: int) -> None:
            nonlocal inside
            for _ in range(5):
                for other in {0, 1, 2} - {rank}:
                    team.mail.put(rank, other, "any", None)
                inside += 1
                time.sleep(0.001)
                assert inside == 1
                inside -= 1
                for other in {0, 1, 2} - {rank}:
                    team.mail.take(other, rank, "any")

        team.run(task)
        team.close()

    @pytest.mark.parametrize(
        ("num_cards", "in_step", "most"), [(2, True, 0), (4, True, 0), (2, False, 1), (4, False, 2)]
    )
    def test_a_block_has_few_of_them(self, num_cards, in_step, most):
        """Each is a thread that sleeps and is woken: of two cards each needs one for a block, or one asks for all."""
        turns = []
        latent, timestep, text = random_like((1, 16, 2, 4, 6), 1), torch.tensor([700.0]), random_like((1, 8, 32), 2)
        for num_layers in (1, 4):
            models, team = [wan(1, replace(WAN, num_layers=num_layers)) for _ in range(num_cards)], team_of(num_cards)
            share_pass(models, team, in_step=in_step)
            with torch.inference_mode():
                team.run(lambda rank, models=models: models[rank](latent, timestep, text))
            turns.append(team.mail.num_turns)
            team.close()
        assert turns[1] - turns[0] <= 3 * num_cards * most

    def test_who_waits_long_is_patient_while_others_get_on(self, monkeypatch):
        """One thread asks for all blocks of a pass while the others wait for its end."""
        now, mail = 0.0, Mail(3, timeout_seconds=10.0)
        monkeypatch.setattr("lowvram_video.team.mail.time", SimpleNamespace(monotonic=lambda: now))

        def get_on() -> None:
            nonlocal now
            for _ in range(3):
                time.sleep(0.12)  # the one that waits looks up
                mail.put(1, 2, "any", None)
                now += 9.0
            mail.put(1, 0, "done", "made")

        other = threading.Thread(target=get_on)
        other.start()
        assert mail.take(1, 0, "done") == "made"
        other.join()

    def test_the_card_that_hangs_is_named_whoever_asked_it(self):
        """One thread, the last card's, asks all cards for their blocks."""
        team, over = team_of(3, timeout=0.5), threading.Event()
        parts = [team.share(rank, range(3)).part(6) for rank in range(3)]
        qkv = [random_like((1, 2, 3, 4), seed) for seed in range(3)]

        def blocks(rank: int) -> Iterator[None]:
            parts[rank].attend(*qkv, lambda q, k, v: q, 1)
            if rank == 1:
                over.wait(20)
            yield

        def task(rank: int) -> None:
            parts[rank].run(blocks(rank), CPU)

        with pytest.raises(TeamError, match=r"card 1 .*hangs or has gone"):
            team.run(task)
        over.set()

    def test_a_letter_that_nobody_will_send_is_an_error_at_once(self):
        team, begun = team_of(2, timeout=60), time.monotonic()
        with pytest.raises(TeamError, match=r"card \d waits for 'any' of card \d, which will send none"):
            team.run(lambda rank: team.mail.take(1 - rank, rank, "any"))
        with pytest.raises(TeamError, match="card 0 waits for 'any' of card 1, which will send none"):
            team.run(lambda rank: None if rank else team.mail.take(1, 0, "any"))
        assert time.monotonic() - begun < 10
        assert team.run(lambda rank: rank) == [0, 1]
        team.close()

    def test_whoever_leaves_a_team_that_was_stopped_does_not_hide_why(self):
        team = team_of(2)

        def task(rank: int) -> None:
            if rank == 0:
                team.mail.take(1, 0, "any")
            else:
                team.mail.stop()  # as an interrupt of the other does, which is woken later

        with pytest.raises(TeamStopped):
            team.run(task)
        team.close()


class Stumble(BaseException):
    """An interrupt as hosts raise it: no Exception."""


class StumblingLink(HostLink):
    """Raises at its operation of a number."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error

    def offer(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Mark]:
        self.count()
        return super().offer(tensors)

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        self.count()
        return super().fetch(pairs, after)

    def wait(self, mark: Mark) -> None:
        self.count()


class TestFailures:
    @pytest.mark.parametrize(
        ("culprit", "error", "in_step"),
        [
            (0, Stumble(), True),
            (0, torch.cuda.OutOfMemoryError("full"), False),
            (2, Stumble(), False),
            (2, torch.cuda.OutOfMemoryError("full"), True),
        ],
        ids=["interrupt first", "memory first, in turns", "interrupt last, in turns", "memory last"],
    )
    def test_a_failure_at_any_exchange_ends_all(self, culprit, error, in_step):
        """At each in turn: its error is raised, nobody hangs, and the next pass is right."""
        latent, timestep, text = random_like((1, 16, 2, 8, 8), 1), torch.tensor([700.0]), random_like((1, 8, 32), 2)
        models = [wan(2, replace(WAN, num_layers=1)) for _ in range(3)]
        with torch.inference_mode():
            expected = models[0](latent, timestep, text)
            at, ended = 0, False
            while not ended:
                at += 1
                links = [StumblingLink(at if rank == culprit else 0, error) for rank in range(3)]
                team = team_of(3, links)
                share_pass(models, team, in_step=in_step)
                try:
                    team.run(lambda rank: models[rank](latent, timestep, text))
                    ended = True  # it has no operation of that number
                except type(error) as raised:
                    assert raised is error
                links[culprit].left = 0
                made = team.run(lambda rank: models[rank](latent, timestep, text))
                assert all(one.equal(expected) for one in made)
                team.close()
        assert at > 20

    def test_a_card_that_never_sends_is_an_error(self):
        team = team_of(2, timeout=0.3)
        done = threading.Event()

        def task(rank: int) -> None:
            if rank == 1:
                done.wait(TIMEOUT)
            else:
                team.exchanges[0].receive(1, "rows", [])

        begun = time.monotonic()
        with pytest.raises(TeamError, match=r"card 1 .*hangs or has gone"):
            team.run(task)
        assert time.monotonic() - begun < 5
        with pytest.raises(TeamError, match="hung before"):
            team.run(task)
        done.set()

    def test_whoever_waits_is_woken(self):
        mail = Mail(2)
        threading.Timer(0.2, mail.stop).start()
        with pytest.raises(TeamStopped):
            mail.take(0, 1, "rows")

    def test_threads_end_with_their_team(self):
        before, team = set(threading.enumerate()), team_of(3)
        assert team.run(lambda rank: rank) == [0, 1, 2]
        threads = set(threading.enumerate()) - before
        assert len(threads) == 2
        team.close()
        for thread in threads:
            thread.join(TIMEOUT)
        assert not any(thread.is_alive() for thread in threads)

    def test_nothing_of_a_failed_pass_is_kept(self):
        team = team_of(2, [HostLink(), StumblingLink(3, Stumble())])
        q = random_like((1, 8, 4, 8), 1)
        spans = even_spans(8, 2)

        def layer(rank: int) -> None:
            own = q[:, spans[rank]].clone()
            HeadExchange(team.exchanges[rank], range(2), spans, (own, own.clone(), own.clone()), (1, 1)).run(
                lambda *qkv: [Sdpa(CPU).attend(*qkv)]
            )

        with pytest.raises(Stumble):
            team.run(layer)
        assert not any(exchange._sent or exchange._arriving for exchange in team.exchanges)

    @pytest.mark.parametrize("culprit", [0, 1])
    def test_what_was_made_is_gone_with_its_error(self, culprit):
        """A leaner plan finds the cards empty, without Python's search for garbage."""
        team, made = team_of(2), []

        def layer(rank: int) -> None:
            activations = random_like((3,), rank)
            made.append(weakref.ref(activations))
            team.exchanges[rank].send(1 - rank, "rows", [activations])
            if rank == culprit:
                raise torch.cuda.OutOfMemoryError("full")
            team.mail.take(1 - rank, rank, "never")

        gc.disable()
        try:
            with suppress(torch.cuda.OutOfMemoryError):
                team.run(layer)
            wait_for(lambda: len(made) >= 1 and not any(each() is not None for each in made))
        finally:
            gc.enable()
        team.close()

    def test_a_card_that_hangs_is_not_waited_for_without_an_end(self, monkeypatch):
        class Hanging:
            def query(self) -> bool:
                return False

        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Hanging())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("this waits for ever"))
        with pytest.raises(TeamError, match=r"cuda:1 has not done in 0.05 s what it was given: it hangs or has gone"):
            wait_for_device(torch.device("cuda:1"), seconds=0.05)

    def test_a_card_that_does_not_end_its_work_is_an_error(self):
        class Hanging(HostLink):
            def synchronize(self) -> None:
                wait_until_idle([Endless()], torch.device("cuda:1"), seconds=0.1)

        class Endless:
            def query(self) -> bool:
                return False

        def task(rank: int) -> None:
            raise Stumble

        team = team_of(2, [HostLink(), Hanging()])
        with pytest.raises(Stumble):
            team.run(task)
        with pytest.raises(TeamError, match="hung before"):
            team.run(task)
        with pytest.raises(TeamError, match=r"cuda:1 has not done in 0.1 s what it was given: it hangs or has gone"):
            Hanging().synchronize()
        team.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def random_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frames_of(count: int, indices: list[int], seed: int) -> Frames:
    return Frames(random_like((1, 16, count, 8, 12), seed), torch.tensor(indices))


def wan(head_groups: int, config: WanConfig = WAN) -> WanModel:
    model = WanModel(config)
    randomize(model)
    model.execution = replace(model.execution, head_groups=head_groups)
    return model


def framepack(config: FramePackConfig = FRAMEPACK) -> FramePackModel:
    model = FramePackModel(config)
    model.load_state_dict(tiny_framepack.make_tensors(config))
    model.execution = replace(model.execution, head_groups=2)
    return model
