"""Wan's VAE in strips of rows: the same as in whole frames, no row convolved twice, and what the plan says of them."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.fused.frame_ops import EagerFrameOps
from lowvram_video.fused.frame_select import difference, select_frame_ops
from lowvram_video.memory.plan.tiles import LEAST_ROWS, strip_rows, thinner_strips
from lowvram_video.memory.plan.vae_footprint import VaeFootprint
from lowvram_video.memory.stream import pinned
from lowvram_video.vae import recording, strips
from lowvram_video.vae.files import to_channels_last
from lowvram_video.vae.inbox import Inbox
from lowvram_video.vae.outbox import Courier, Parcel, in_ram, touch
from lowvram_video.vae.recording import fingerprint
from lowvram_video.vae.retries import pieces_fitting
from lowvram_video.vae.strips import Strips
from lowvram_video.vae.tiling import WHOLE, Tile, decode_in, encode_fitting, retry_ways
from lowvram_video.video.pictures import to_levels, to_uint8
from lowvram_video.wanvideo.footprint import WAN21_ENCODER, WAN21_VAE, WAN22_ENCODER, WAN22_VAE
from lowvram_video.wanvideo.vae import coding, strip
from lowvram_video.wanvideo.vae import model as vae_model
from lowvram_video.wanvideo.vae.blocks import CausalConv3d
from lowvram_video.wanvideo.vae.checkpoint import to_official_names
from lowvram_video.wanvideo.vae.coding import page_elements
from lowvram_video.wanvideo.vae.heights import Heights, Kind, agreeing_rows, find_heights, try_heights
from lowvram_video.wanvideo.vae.model import VAEConfig, WanVAE
from lowvram_video.wanvideo.vae.rows import Convolution, StripPlan, cut_alike, cut_rows
from lowvram_video.wanvideo.vae.strip import FrameRing, copy_rows, in_words, ring_rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TINY = {
    "2.1": replace(vae_model.WAN21_VAE, encoder_dim=8, decoder_dim=8),
    "2.2": replace(vae_model.WAN22_VAE, encoder_dim=8, decoder_dim=16),
}
BOUND = 1e-5  # maximum error over the maximum, in float32


def tiny(config: VAEConfig) -> WanVAE:
    torch.manual_seed(0)
    vae = WanVAE(config)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
    return vae


@pytest.fixture(scope="module", params=list(TINY))
def vae(request: pytest.FixtureRequest) -> WanVAE:
    return tiny(TINY[request.param])


def random_latent(vae: WanVAE, frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator)


def random_video(vae: WanVAE, latents: int, height: int, width: int) -> Tensor:
    stride, generator = vae.config.spatial_stride, torch.Generator().manual_seed(latents)
    return torch.rand(1, 3, 4 * latents - 3, height * stride, width * stride, generator=generator) * 2 - 1


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def whole(vae: WanVAE, latent: Tensor) -> Tensor:
    return torch.cat(list(vae.decode_pieces(latent)), dim=2)


def in_strips(vae: WanVAE, latent: Tensor, way: Strips) -> Tensor:
    return torch.cat(list(decode_in(vae, latent, way)), dim=2)


# --- numbers ---------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    frames=st.integers(1, 4), height=st.integers(1, 7), width=st.integers(1, 4), rows=st.integers(1, 70),
    waits=st.booleans(), data=st.data(),
)  # fmt: skip
def test_strips_of_any_height_give_whole_frames(vae, frames, height, width, rows, waits, data):
    latent, way = random_latent(vae, frames, height, width), Strips(max(rows, vae.config.patch_size), waits)
    assert relative_error(in_strips(vae, latent, way), whole(vae, latent)) <= BOUND


@settings(max_examples=8, deadline=None)
@given(frames=st.integers(1, 4), height=st.integers(1, 6), width=st.integers(1, 3), rows=st.integers(1, 70),
       waits=st.booleans())  # fmt: skip
def test_strips_of_any_height_encode_as_whole_frames(vae, frames, height, width, rows, waits):
    video, way = random_video(vae, frames, height, width), Strips(max(rows, vae.config.spatial_stride), waits)
    assert relative_error(vae.encode_strips(video, way), vae.encode(video)) <= BOUND


@pytest.mark.parametrize("height, rows", [(19, 72), (33, 40)])
def test_strips_of_high_frames_encode_as_whole_ones(vae, height, rows):
    """So high that every layer, the first too, sees new rows in each strip."""
    video = random_video(vae, 2, height, 1)
    assert relative_error(vae.encode_strips(video, Strips(rows)), vae.encode(video)) <= BOUND


def test_a_long_video(vae):
    latent, video = random_latent(vae, 41, 3, 2), random_video(vae, 41, 2, 1)
    want, want_latent = whole(vae, latent), vae.encode(video)
    for waits in (False, True):
        way = Strips(10 * vae.config.patch_size, waits)
        assert relative_error(in_strips(vae, latent, way), want) <= BOUND, way
        way = Strips(vae.config.spatial_stride, waits)
        assert relative_error(vae.encode_strips(video, way), want_latent) <= BOUND, way


def test_several_videos_at_once_and_channels_last(vae, monkeypatch):
    other = tiny(vae.config)
    other.load_state_dict({name: to_channels_last(each) for name, each in vae.state_dict().items()}, assign=True)
    monkeypatch.setattr(strip, "KEPT_KERNEL_BYTES", 0)  # as of wide convolutions
    latent = random_latent(vae, 3, 4, 3, batch=2)
    want = whole(vae, latent)
    for each in (vae, other):
        assert relative_error(in_strips(each, latent, Strips(14, True)), want) <= BOUND
    video = torch.cat([random_video(vae, 2, 3, 2), random_video(vae, 2, 3, 2).flip(3)])
    assert relative_error(other.encode_strips(video, Strips(vae.config.spatial_stride)), vae.encode(video)) <= BOUND


def test_strips_match_diffusers():
    for config in TINY.values():
        torch.manual_seed(0)
        patch = config.patch_size
        reference = AutoencoderKLWan(
            base_dim=config.encoder_dim, decoder_base_dim=config.decoder_dim, z_dim=config.z_dim,
            is_residual=config.residual_shortcuts, patch_size=patch if patch > 1 else None,
            in_channels=3 * patch**2, out_channels=3 * patch**2, scale_factor_spatial=config.spatial_stride,
        ).eval()  # fmt: skip
        vae = WanVAE(config)
        names = to_official_names(reference.state_dict())
        vae.load_state_dict({names[name]: each for name, each in reference.state_dict().items()})
        latent, video = random_latent(vae, 3, 4, 3), random_video(vae, 3, 3, 2)
        mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (config.latent_mean, config.latent_std))
        with torch.no_grad():
            decoded = reference.decode(latent * std + mean).sample
            encoded = (reference.encode(video).latent_dist.mode() - mean) / std
        assert relative_error(in_strips(vae, latent, Strips(12)).clamp(-1.0, 1.0), decoded) <= 1e-4
        assert relative_error(vae.encode_strips(video, Strips(config.spatial_stride)), encoded) <= 1e-4


def test_no_row_is_convolved_twice(vae, monkeypatch):
    """In strips every convolution makes as many rows as of whole frames, which is each row of each frame once."""
    latent, video = random_latent(vae, 3, 6, 2), random_video(vae, 3, 4, 2)
    rows: Counter[tuple[int, ...]] = Counter()
    convolve, conv2d = FrameRing.convolve, F.conv2d

    def counted(ring: FrameRing, weight: Tensor) -> Tensor:
        out = convolve(ring, weight)
        rows[weight.data_ptr(),] += out.shape[2]
        return out

    def counted_2d(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
        out = conv2d(x, weight, *rest, **named)
        if weight.shape[2:] == (3, 3) and weight.shape[1] == x.shape[1]:
            rows["2d", weight.shape[0], out.shape[3]] += out.shape[2]  # type: ignore[index]
        return out

    monkeypatch.setattr(FrameRing, "convolve", counted)
    monkeypatch.setattr(F, "conv2d", counted_2d)
    whole(vae, latent)
    vae.encode(video)
    want = dict(rows)
    for height in (2, 10, 34):
        rows.clear()
        in_strips(vae, latent, Strips(height))
        vae.encode_strips(video, Strips(max(height, vae.config.spatial_stride)))
        assert dict(rows) == want, f"strips of {height} rows"


@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_may_make_more_rows_than_a_strip_needs(vae, monkeypatch, batch):
    """As they do where that gives the bits of whole frames."""
    latent, video = random_latent(vae, 3, 6, 2, batch=batch), random_video(vae, 3, 4, 2)
    want, want_encoded = whole(vae, latent), vae.encode(video)

    class Higher(Heights):
        def rows(self, layer: nn.Module, needed: int) -> int:
            return needed + 3 if needed else 0

    monkeypatch.setattr(strip, "find_heights", lambda plan, *_: Higher() if plan.num_strips > 1 else Heights())
    for waits in (False, True):
        assert relative_error(in_strips(vae, latent, Strips(14, waits)), want) <= BOUND
        assert relative_error(vae.encode_strips(video, Strips(vae.config.spatial_stride, waits)), want_encoded) <= BOUND


@pytest.fixture
def rounding_kernels(monkeypatch) -> Iterator[Callable[[Callable[[int, int], bool]], list[int]]]:
    """Makes convolutions round otherwise where they are not told to be exact, by channels and rows of their result.

    The channels that are made from then on are in the list.
    """
    conv2d = F.conv2d

    def install(is_exact: Callable[[int, int], bool]) -> list[int]:
        tried: list[int] = []

        def rounded(x: Tensor, weight: Tensor, **named: Any) -> Tensor:
            out = conv2d(x.double(), weight.double(), **named).float()
            tried.append(out.shape[1])
            return out if is_exact(out.shape[1], out.shape[2]) else out * (1 + 2**-20)

        monkeypatch.setattr(F, "conv2d", rounded)
        agreeing_rows.cache_clear()
        return tried

    yield install
    agreeing_rows.cache_clear()


def test_heights_are_those_that_round_alike(rounding_kernels):
    """With a kernel that rounds otherwise where rows do not come in fours, and no height that suits 9 and more."""
    rounding_kernels(lambda channels, rows: rows % 4 == 0 and (rows < 10 or rows == 40))
    for stride, width, padding in ((1, 6, 1), (2, 7, 0)):
        convolution = Convolution(4, 2, (3, 3), stride, width, padding)
        kind = Kind(convolution, 1, torch.float32, torch.device("cpu"), True)
        assert agreeing_rows(kind, 40, (1, 2, 4, 7, 8, 36, 40)) == (4, 4, 4, 8, 8, 40, 40)
        assert agreeing_rows(kind, 40, (4, 9, 36)) is None
    kept = replace(kind, convolution=Convolution(4, 2, (3, 3), 1, 6, 1, is_kept=True))
    assert agreeing_rows(kept, 40, (1, 3, 6, 8)) is None, "1 would have to be 4"
    assert agreeing_rows(kept, 40, (3, 6, 8)) == (4, 8, 8)


def test_heights_cost_no_more_than_an_eighth_of_the_thickest_strip(rounding_kernels):
    rounding_kernels(lambda channels, rows: rows in (18, 40))
    kind = Kind(Convolution(4, 2, (3, 3), 1, 6, 1), 1, torch.float32, torch.device("cpu"), True)
    assert agreeing_rows(kind, 40, (8, 16)) == (18, 18)
    assert agreeing_rows(kind, 40, (8, 15)) is None


def test_heights_are_those_of_all_convolutions_or_none(vae, rounding_kernels):
    """A part of them would cost time, and the bits of whole frames are lost with the first that has none."""
    plan, _ = vae.decoding((1, vae.config.z_dim, 3, 6, 2)).plan(32)
    last = next(iter(plan.convolutions))
    colors, few = plan.convolutions[last].out_channels, plan.layers[last].strip(plan.num_strips - 1).out
    rounding_kernels(lambda channels, rows: (channels, rows) != (colors, few))
    found = try_heights(plan, 1, torch.empty(0), True)
    assert {layer for layer, _ in found} == set(plan.convolutions)
    assert {key: rows for key, rows in found.items() if rows != key[1]} == {(last, few): few + 1}

    tried = rounding_kernels(lambda channels, rows: channels != colors or rows == plan.layers[last].outputs.height)
    assert try_heights(plan, 1, torch.empty(0), True) == {}
    assert set(tried) == {colors}, "nothing is tried after the first that has none"


def test_heights_are_none_where_memory_does_not_suffice_to_try(vae, monkeypatch):
    def exhausted(*args: Any, **named: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plan, _ = vae.decoding((1, vae.config.z_dim, 3, 6, 2)).plan(14)
    agreeing_rows.cache_clear()
    monkeypatch.setattr(F, "conv2d", exhausted)
    assert try_heights(plan, 1, torch.empty(0), True) == {}


def test_heights_are_tried_on_the_gpu_alone_and_leave_its_random_numbers(vae):
    plan, _ = vae.decoding((1, vae.config.z_dim, 3, 6, 2)).plan(14)
    state = torch.get_rng_state()
    heights = find_heights(plan, 1, torch.empty(0), True)
    assert all(heights.rows(layer, 5) == 5 for layer in plan.layers)
    assert torch.equal(torch.get_rng_state(), state)


# --- recorded steps --------------------------------------------------------------------------------------


class CpuGraph(TorchDispatchMode):
    """Records as a GPU does: what is recorded writes to no memory that was there before, and is done later, on the same
    memory, whatever Python holds then."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named, schema = kwargs or {}, operation._schema
        written = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
        if written:
            names = [each.name for each in schema.arguments]
            result = named["out"] if written == ["out"] else args[names.index(written[0])]
        else:
            result = operation(*args, **named)
        if written:
            self.done.append((operation, args, named, None))
        elif isinstance(result, Tensor) and not any(
            isinstance(each, Tensor) and each.untyped_storage()._cdata == result.untyped_storage()._cdata
            for each in args
        ):  # no view
            self.done.append((operation, args, named, result))
        return result

    def play(self) -> None:
        for operation, args, named, result in self.done:
            again = operation(*args, **named)
            if result is not None and "empty" not in operation.overloadpacket.__name__:
                result.copy_(again)


class CpuRecorder:
    """A recorder that gives up after `most` recordings; `spoil` does something to what is played.

    It has room for one more recording at a time than `crowded`, until it forgets.
    """

    def __init__(self, most: int = 1 << 30, spoil: Callable[[CpuGraph], None] = lambda graph: None) -> None:
        self.most, self.spoil = most, spoil
        self.num_recorded = self.num_played = self.num_forgotten = 0
        self.crowded: int | None = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.num_recorded == self.most:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self.num_recorded == self.crowded:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.num_recorded += 1
        with CpuGraph() as graph:
            work()
        self.spoil(graph)

        def play() -> None:
            self.num_played += 1
            graph.play()

        return play

    def forget(self) -> None:
        self.num_forgotten += 1
        self.crowded = None


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[CpuRecorder], set[Any]]:
    """Has steps recorded; gives the kinds of strips that are the same either way, as they are found."""

    def use(recorder: CpuRecorder) -> set[Any]:
        proven: set[Any] = set()
        monkeypatch.setattr(coding, "select_recorder", lambda device: recorder)
        monkeypatch.setattr(coding, "proven_kinds", lambda device: proven)
        return proven

    return use


@pytest.mark.parametrize(("frames", "most", "num_kinds"), [(3, 1 << 30, 0), (10, 5, 1), (10, 1 << 30, 4)])
def test_recorded_steps_give_the_same(vae, recorded, frames, most, num_kinds):
    """However often they were recorded before that failed. Layers that see whole frames are a kind of their own."""
    latent, way = random_latent(vae, frames, 6, 1), Strips(2 * vae.config.spatial_stride, True)
    want, recorder = in_strips(vae, latent, way), CpuRecorder(most)
    proven = recorded(recorder)
    assert torch.equal(in_strips(vae, latent, way), want)
    assert len(proven) == num_kinds
    assert recorder.num_recorded == min(most, 4 * num_kinds + (most == 5))
    num_played = (frames + 4) * num_kinds
    assert recorder.num_played == num_played
    if num_kinds == 4:  # which need not be tried again
        assert torch.equal(in_strips(vae, latent, way), want)
        assert recorder.num_played == num_played + frames * num_kinds


def test_strips_of_one_kind_play_each_others_steps(recorded):
    vae = tiny(TINY["2.1"])
    latent, way, recorder = random_latent(vae, 5, 14, 1), Strips(2 * vae.config.spatial_stride), CpuRecorder()
    want, proven = in_strips(vae, latent, way), recorded(recorder)
    assert torch.equal(in_strips(vae, latent, way), want)
    assert (len(proven), recorder.num_recorded, recorder.num_played) == (1, 4, 4 + 2 * 5)


def test_strips_are_recorded_while_the_device_is_at_work(vae, recorded, caplog):
    """Who leaves room to others waits for the device: nobody does once kinds are known, unless there is no room."""
    latent, video = random_latent(vae, 10, 6, 1), random_video(vae, 10, 4, 1)
    way, recorder = Strips(2 * vae.config.spatial_stride, True), CpuRecorder()
    want, want_encoded = in_strips(vae, latent, way), vae.encode_strips(video, way)
    recorded(recorder)
    in_strips(vae, latent, way), vae.encode_strips(video, way)
    recorder.num_forgotten = 0
    assert torch.equal(in_strips(vae, latent, way), want)
    assert torch.equal(vae.encode_strips(video, way), want_encoded)
    assert recorder.num_forgotten == 0
    recorder.crowded = recorder.num_recorded + 6  # of the first strip's the third
    assert torch.equal(in_strips(vae, latent, way), want)
    assert recorder.num_forgotten == 1 and not caplog.text
    recorder.most, recorder.num_forgotten = recorder.num_recorded + 2, 0
    assert torch.equal(in_strips(vae, latent, way), want)
    assert recorder.num_forgotten == 2 and "call by call" in caplog.text  # each part keeps no room for nothing


@pytest.mark.parametrize("rows", [16, 640])
def test_layers_at_the_latents_size_and_strips_never_remember_beside_each_other(vae, rows, monkeypatch):
    """In memory of their own each; plans count the larger of the two, and strips that lend theirs once."""
    taken: list[weakref.ref[Any]] = []
    most = 0
    take = strip.Rings.memory.func

    def memory(rings: Any) -> Tensor:
        nonlocal most
        found = take(rings)
        if not rings.are_guests:
            taken.append(weakref.ref(found))
            most = max(most, sum(each() is not None for each in taken))
        return found

    watched = cached_property(memory)
    watched.__set_name__(strip.Rings, "memory")
    monkeypatch.setattr(strip.Rings, "memory", watched)
    in_strips(vae, random_latent(vae, 1, 96, 1), Strips(rows))
    vae.encode_strips(random_video(vae, 1, 96, 1), Strips(rows))
    assert most == 1 and len(taken) > 1


def test_layers_that_see_whole_frames_remember_in_the_memory_of_strips(vae):
    """Which are later; where that is too little in memory of their own, that is given back."""
    decoding = vae.decoding((1, vae.config.z_dim, 3, 240, 1))
    whole_plan = decoding._whole_plan()
    thick, thin = (decoding.rings(decoding.plan(rows)[0]) for rows in (640, 16))
    own = decoding.rings(whole_plan)
    assert thin.num_elements < own.num_elements < thick.num_elements and not own.are_guests
    guests, others = decoding.rings(whole_plan, thick), decoding.rings(whole_plan, thin)
    assert guests.are_guests and guests.memory.data_ptr() == thick.memory.data_ptr()
    assert len(guests.memory) == len(own.memory)
    assert not others.are_guests and len(others.memory) == len(own.memory)


def test_recorded_steps_encode_the_same(vae, recorded):
    video, way = random_video(vae, 10, 4, 1), Strips(2 * vae.config.spatial_stride)
    want, proven = vae.encode_strips(video, way), recorded(CpuRecorder())
    assert torch.equal(vae.encode_strips(video, way), want)
    assert len(proven) == 3


def lose_a_write(graph: CpuGraph) -> None:
    """Of rows that nobody but a later frame or strip sees."""
    copies = [index for index, done in enumerate(graph.done) if "copy_" in str(done[0])]
    del graph.done[copies[-1]]


def be_off_by_a_bit(graph: CpuGraph) -> None:
    _, _, _, result = next(done for done in reversed(graph.done) if done[3] is not None)
    graph.done.append((torch.ops.aten.mul_.Scalar, (result, 1 + 2**-23), {}, None))


@pytest.mark.parametrize(
    ("spoil", "which", "num_proven", "num_recorded"), [(be_off_by_a_bit, 2, 2, 12), (lose_a_write, 6, 1, 8)]
)
def test_recordings_that_are_not_the_same_are_not_used(recorded, caplog, spoil, which, num_proven, num_recorded):
    """Of the layers that see whole frames, and of the first strip."""
    vae = tiny(TINY["2.1"])
    latent, way = random_latent(vae, 10, 4, 1), Strips(2 * vae.config.spatial_stride, True)
    want = in_strips(vae, latent, way)
    recorder = CpuRecorder(spoil=lambda graph: spoil(graph) if recorder.num_recorded == which else None)
    proven = recorded(recorder)
    assert torch.equal(in_strips(vae, latent, way), want)
    assert len(proven) == num_proven
    assert "played back they are not what they were" in caplog.text
    assert recorder.num_recorded == num_recorded


def test_what_a_recorded_step_made_lasts(recorded):
    """Although all steps of one kind are made in the same memory."""
    recorded(CpuRecorder())
    vae = tiny(TINY["2.1"])
    latent, way, pieces = random_latent(vae, 10, 2, 1), Strips(vae.config.spatial_stride), list[Tensor]()

    def keep(piece: Tensor) -> Tensor:
        pieces.append(piece)
        return piece.clone()

    want = in_strips(vae, latent, way)
    list(decode_in(vae, latent, way, None, keep))
    strips = [torch.cat(pieces[first : first + 10], dim=2) for first in range(0, len(pieces), 10)]
    assert torch.equal(torch.cat(strips, dim=3), want)


def test_fingerprints_are_of_all_bits(monkeypatch):
    monkeypatch.setattr(recording, "WORDS_AT_ONCE", 1024)
    numbers = torch.randn(10_003)
    want = fingerprint([numbers])
    assert torch.equal(fingerprint([numbers.clone()]), want)
    for first, second in ((0, 1), (4, 5000), (0, 2), (0, 2048), (10_000, 10_002)):
        others = numbers.clone()
        others[[first, second]] = others[[second, first]]
        assert not torch.equal(fingerprint([others]), want)
    for place in (0, 1, 5001, 10_002):
        others = numbers.clone()
        others[place] = -others[place]
        assert not torch.equal(fingerprint([numbers, others]), fingerprint([numbers, numbers]))
    assert fingerprint([torch.zeros(0), torch.ones(3, dtype=torch.uint8)]).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("wanted", "allocator", "timed", "hip"),
    [(None, "native", False, None), ("0", "native", False, None), (None, "cudaMallocAsync", False, None),
     (None, "native", True, None), (None, "native", False, "6.4")],
)  # fmt: skip
def test_steps_are_recorded_where_that_is_known_to_work(monkeypatch, wanted, allocator, timed, hip):
    monkeypatch.setattr(recording, "CudaRecorder", str)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", timed)
    monkeypatch.delenv("LOWVRAM_RECORD_STEPS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("LOWVRAM_RECORD_STEPS", wanted)
    known = (wanted, allocator, timed, hip) == (None, "native", False, None)
    assert recording.select_recorder(torch.device("cuda", 1), hip) == ("cuda:1" if known else None)
    assert recording.select_recorder(torch.device("cpu"), hip) is None


def test_a_recording_that_fails_leaves_pytorchs_allocator_as_it_was(monkeypatch):
    """PyTorch ends what is allocated for a recording only where that can be ended."""

    class Graph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            assert (pool, capture_error_mode) == ("pool", "thread_local")

        def capture_end(self) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    class Stream:
        device_index = 1

        def __init__(self, device: torch.device) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

    left: list[tuple[Any, ...]] = []
    fakes: dict[str, Any] = {
        "Stream": Stream, "CUDAGraph": Graph, "graph_pool_handle": lambda: "pool", "empty_cache": lambda: None,
        "current_stream": lambda device: None, "stream": lambda stream: nullcontext(),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: left.append((name, *args)), raising=False)
    with pytest.raises(RuntimeError, match="during capture"):
        recording.CudaRecorder(torch.device("cuda", 1)).record(lambda: None)
    assert left == [("_cuda_endAllocateToPool", 1, "pool"), ("_cuda_releasePool", 1, "pool")]

    def exhausted() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # not what it led to
        recording.CudaRecorder(torch.device("cuda", 1)).record(exhausted)


# --- frames on their way ---------------------------------------------------------------------------------


def test_pieces_come_in_order_once_the_last_strip_is_done(vae):
    latent = random_latent(vae, 4, 4, 2)
    done: list[tuple[int, int]] = []
    pieces = decode_in(vae, latent, Strips(24), lambda *call: done.append(call))
    first = next(pieces)
    parts = done[-1][1]
    assert first.shape[2] == 1 and parts % 4 == 0 and done[-1][0] == parts - 4 + 2
    assert [piece.shape[2] for piece in pieces] == [4, 4, 4] and done[-1] == (parts, parts)


@pytest.mark.parametrize("way", [WHOLE, Strips(12), Strips(12, True), Tile(32)], ids=str)
def test_frames_are_finished_and_put_where_they_are_wanted(vae, way):
    latent = random_latent(vae, 2, 4, 3)
    stride = vae.config.spatial_stride
    want = torch.cat([to_uint8(piece) for piece in decode_in(vae, latent, way)])
    into = torch.empty(1, 5, 4 * stride, 3 * stride, 3, dtype=torch.uint8)
    pieces = list(decode_in(vae, latent, way, None, to_levels, into.permute(0, 4, 1, 2, 3)))
    got = torch.cat([to_uint8(piece) for piece in pieces])
    assert got.dtype == torch.uint8 and (got.int() - want.int()).abs().max() <= 1
    assert torch.equal(into[0], got)
    assert all(piece.data_ptr() >= into.data_ptr() for piece in pieces)


class Watched(Tensor):
    """Notes the shapes of what is brought to a device, which is watched no further."""

    brought: list[tuple[int, ...]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func is not Tensor.to:
            if isinstance(result, Watched):
                result.brought = args[0].brought
            return result
        args[0].brought.append(tuple(args[0].shape))
        return result.as_subclass(Tensor)


@pytest.mark.parametrize("rows", [None, 12])
def test_nobody_waits_for_the_device_at_each_latent_frame(vae, monkeypatch, rows):
    """As one would who brings it a frame, or the statistics of latents, from memory that is not pinned."""
    statistics, asked = WanVAE._latent_statistics, list[None]()
    monkeypatch.setattr(WanVAE, "_latent_statistics", lambda self: asked.append(None) or statistics(self))
    plain = random_latent(vae, 3, 2, 1)
    latent = plain.as_subclass(Watched)
    latent.brought = []
    pieces = vae.decode_pieces(latent) if rows is None else vae.decode_strips(latent, Strips(rows), lambda piece: piece)
    got = torch.cat(list(pieces), dim=2)
    assert (latent.brought, len(asked)) == ([plain.shape], 1)
    assert relative_error(got, whole(vae, plain)) <= BOUND


def test_an_abandoned_decode_gives_its_memory_back(vae):
    unpinned: list[int] = []

    class Counting:
        def pin(self, extent: Tensor) -> bool:
            return True

        def unpin(self, extent: Tensor) -> None:
            unpinned.append(extent.numel())

    way = Strips(12, True, Counting())
    pieces = decode_in(vae, random_latent(vae, 3, 4, 2), way)
    next(pieces)
    assert not unpinned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda *given: None)
        pieces.close()
    assert len(unpinned) == 6  # a page of rows between strips for each latent frame, and that at the latent's size
    assert str(way) == str(Strips(12, True)) and way == Strips(12, True)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Sizes of the RAM in which strips wait, and whether the main thread took it."""
    taken, allocate = list[tuple[int, bool]](), pinned.allocate_extent

    def noted(nbytes: int) -> Tensor:
        taken.append((nbytes, threading.current_thread() is threading.main_thread()))
        return allocate(nbytes)

    monkeypatch.setattr(pinned, "allocate_extent", noted)
    return taken


@pytest.mark.parametrize("encodes", [False, True])
def test_what_waits_is_allocated_ahead(vae, allocated, encodes):
    """To the byte: nobody allocates what a thread has, and it has nothing that nobody asks for."""
    if encodes:
        vae.encode_strips(random_video(vae, 3, 4, 2), Strips(vae.config.spatial_stride, True))
    else:
        in_strips(vae, random_latent(vae, 3, 4, 2), Strips(12, True))
    by_main = [nbytes for nbytes, is_main in allocated if is_main]
    ahead = [nbytes for nbytes, is_main in allocated if not is_main]
    assert len(by_main) == 3 * encodes  # frames at the latent's size, whose channels it learns as it goes
    assert len(ahead) == 6 - len(by_main) and len(set(ahead[-3:])) == 1


def test_memory_ahead_is_what_was_asked_for():
    def allocate(nbytes: int) -> Tensor:
        asked.append(nbytes)
        if nbytes == 13:
            raise MemoryError("no RAM")
        return torch.zeros(nbytes)

    asked: list[int] = []
    with strips.allocated_ahead(allocate, [5, 7, 13, 5]) as take:
        assert [len(take(nbytes)) for nbytes in (7, 5, 3, 5, 5)] == [7, 5, 3, 5, 5]
        with pytest.raises(MemoryError, match="no RAM"):
            take(13)
    assert sorted(asked) == [3, 5, 5, 5, 7, 13]
    asked = []
    with strips.allocated_ahead(allocate, [5, 5, 5, 5]) as take:  # one at a time: pinning keeps others from the device
        take(5)
        time.sleep(0.05)
        assert asked == [5, 5]
    begun, asked = threading.Event(), []

    def wait(nbytes: int) -> Tensor:
        asked.append(nbytes)
        begun.wait()
        return torch.zeros(nbytes)

    with strips.allocated_ahead(wait, [5, 7]) as take:  # of a pass that ends early
        threading.Timer(0.05, begun.set).start()
    assert asked == [5] or asked == [5, 7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parts_are_brought_whole():
    device = torch.device("cuda", 0)
    inbox, video = Inbox(device), torch.randn(1, 3, 40, 64, 256)
    parts = [video[:, :, first : first + 4, ::2] for first in range(0, 40, 4)] + [video[:, :, :1]]
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    for part in parts:
        there = inbox.bring(part)
        busy = busy @ busy / 64  # the device is behind
        sums.append(there.double().sum())
    assert torch.allclose(torch.stack(sums).cpu(), torch.stack([part.double().sum() for part in parts]))


def test_pages_are_touched_in_the_frames_that_will_be_written_alone():
    video = torch.ones(1, 6, 40, 50, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    touch(video[:, :, 2:4])
    changed = (video != 1).sum(dim=(0, 1, 3, 4))
    assert changed[2:4].min() > 0 and not changed[[0, 1, 4, 5]].any()
    touch(video[:, :, :, 10:20])  # no memory without gaps
    assert torch.equal((video != 1).sum(dim=(0, 1, 3, 4)), changed)


def test_what_was_made_before_an_error_is_passed_on():
    def failing():
        yield torch.zeros(1, 3, 1, 2, 2)
        yield torch.ones(1, 3, 4, 2, 2)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    seen = []
    with pytest.raises(torch.cuda.OutOfMemoryError):
        for piece in in_ram(failing(), lambda piece: piece):
            seen.append(piece.shape[2])
    assert seen == [1, 4]


def test_pinned_memory_has_one_piece_at_a_time(monkeypatch):
    """Whole frames are large, and PyTorch rounds pinned memory up to powers of two."""
    sent, pinned = [], []

    def send(courier: Courier, piece: Tensor) -> Parcel:
        sent.append(courier.num_under_way)
        pinned.append(len(sent) - len(seen))
        return Parcel(piece.permute(0, 2, 3, 4, 1).contiguous())

    monkeypatch.setattr(Courier, "send", send)
    video, seen = torch.randn(1, 3, 9, 4, 4), []
    for piece in in_ram(iter(video.split([1, 4, 4], dim=2)), lambda piece: piece):
        seen.append(piece)
    assert torch.equal(torch.cat(seen, dim=2), video)
    assert pinned == [1, 1, 1] and sent == [1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_whole_frames_take_one_piece_of_pinned_memory():
    pieces = torch.rand(1, 3, 9, 480, 832, device="cuda").split([1, 4, 4], dim=2)
    torch.cuda.reset_peak_host_memory_stats()
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    got = torch.cat(list(in_ram(iter(pieces), lambda piece: piece)), dim=2)
    assert torch.equal(got, torch.cat(pieces, dim=2).cpu())
    peak = torch.cuda.host_memory_stats()["allocated_bytes.peak"] - before
    assert peak <= 2 ** (pieces[1].nbytes - 1).bit_length() + 2 ** (pieces[0].nbytes - 1).bit_length()


@pytest.mark.parametrize("given_place", [True, False])
def test_no_piece_passes_for_one_that_was_lost_on_its_way(given_place):
    """Whatever operation memory runs out in, what was given before is the beginning of the video."""
    video = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 3, 9, 2, 2).contiguous()
    counted = OutOfMemoryAt(0)
    with counted:
        list(in_ram(iter(video.split(2, dim=2)), lambda piece: piece))
    assert counted.count > 8
    for at in range(1, counted.count + 1):
        into = torch.full_like(video, -1.0) if given_place else None
        seen = []
        with OutOfMemoryAt(at), suppress(torch.cuda.OutOfMemoryError):
            for piece in in_ram(iter(video.split(2, dim=2)), lambda piece: piece, into):
                seen.append(piece)
        frames = torch.cat(seen, dim=2) if seen else video[:, :, :0]
        assert frames.equal(video[:, :, : frames.shape[2]]), at


class OutOfMemoryAt(TorchDispatchMode):
    """The n-th operation finds no memory; 0 only counts."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self._at:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return func(*args, **(kwargs or {}))


# --- ways ------------------------------------------------------------------------------------------------


def test_out_of_memory_leads_to_thinner_strips(vae, monkeypatch, caplog):
    latent = random_latent(vae, 3, 8, 4)
    want = torch.cat([to_uint8(piece) for piece in decode_in(vae, latent, WHOLE)])
    height, width = (side * vae.config.spatial_stride for side in latent.shape[3:])
    real, failures = WanVAE.decode_strips, [2]

    def scarce(vae: WanVAE, latent: Tensor, way: Strips, *rest: Any) -> Any:
        for piece in real(vae, latent, way, *rest):
            if failures[0]:
                failures[0] -= 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            yield piece

    monkeypatch.setattr(WanVAE, "decode_strips", scarce)
    ways = [Strips(height - 8), *retry_ways(vae, Strips(height - 8), (height, width))]
    got = torch.cat(list(pieces_fitting(ways, lambda way: map(to_uint8, decode_in(vae, latent, way)), "decoding")))
    assert (got.int() - want.int()).abs().max() <= 1
    assert caplog.text.count("out of VRAM while decoding in strips") == 2 and "tiles" not in caplog.text


def test_what_follows_a_way_that_failed(vae):
    size = (720, 1280)
    after = retry_ways(vae, WHOLE, size)
    rows = [way.rows for way in after if isinstance(way, Strips)]
    assert rows == list(thinner_strips(720)) and rows[0] == 360 and rows[-1] == LEAST_ROWS
    assert after[len(rows) :] == [Tile(256), Tile(128)] and all(way.in_ram for way in after[: len(rows)])
    assert retry_ways(vae, Strips(48), size)[:2] == [Strips(48, True), Strips(24, True)]
    assert retry_ways(vae, Strips(48, True), size)[0] == Strips(24, True)
    assert retry_ways(vae, Strips(16), size)[0] == Strips(16, True)  # the thinnest: nothing but tiles is left
    by_hand = retry_ways(vae, Tile(512), size)
    assert isinstance(by_hand[0], Strips) and by_hand[0].rows * 1280 <= 512**2


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 3000), rows=st.integers(1, 3000))
def test_cuts_cover_a_frame(height, rows):
    ends = cut_rows(height, rows)
    sizes = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    assert ends[-1] == height and min(sizes) > 0 and max(sizes) <= rows and max(sizes) - min(sizes) <= 1
    assert all(each > 0 for each in strip_rows(height))
    assert list(strip_rows(height)) == sorted(strip_rows(height), reverse=True)


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 3000), rows=st.integers(1, 3000), unit=st.sampled_from([1, 8, 16]))
def test_strips_are_alike_where_they_can_be(height, rows, unit):
    ends = cut_alike(height, rows, unit)
    sizes = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    assert ends[-1] == height and min(sizes) > 0 and max(sizes) <= rows and len(ends) == len(cut_rows(height, rows))
    if len(set(sizes[:-1])) > 1:  # equal ones would be too high, or too few
        step = -(-height // (len(ends) * unit)) * unit
        assert step > rows or step * (len(ends) - 1) >= height
    else:
        assert sizes[-1] <= sizes[0] + 1


def test_copies_in_words_have_the_same_bits():
    for channels, dtype in ((16, torch.bfloat16), (24, torch.bfloat16), (12, torch.bfloat16), (8, torch.float32)):
        frame = torch.randn(1, channels, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last)
        frame[0, 0, 0] = torch.nan
        out = torch.zeros(1, 3 * channels, 8, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
        copy_rows(frame[:, :, 1:5], out[:, channels : 2 * channels, 2:6])
        got, want = (
            each.contiguous().view(torch.uint8) for each in (out[:, channels:-channels, 2:6], frame[:, :, 1:5])
        )
        assert torch.equal(got, want)
        assert out.count_nonzero() == frame[:, :, 1:5].count_nonzero()
        assert len(in_words(frame, out)) == 2


def test_a_vae_without_strips_says_so():
    from lowvram_video.framepack.vae.model import HunyuanVAE
    from lowvram_video.framepack.vae.model import VAEConfig as HunyuanConfig

    hunyuan = HunyuanVAE(HunyuanConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4))
    with pytest.raises(ValueError, match=r"HunyuanVideo VAE cannot be decoded in strips: its norms see whole frames"):
        next(decode_in(hunyuan, torch.zeros(1, 16, 1, 4, 4), Strips(16)))
    with pytest.raises(ValueError, match=r"HunyuanVideo VAE cannot be encoded in strips"):
        encode_fitting(hunyuan, torch.zeros(1, 3, 1, 32, 32), Strips(16))
    assert all(isinstance(way, Tile) for way in retry_ways(hunyuan, WHOLE, (720, 1280)))


# --- the plan --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "footprint", "decodes"),
    [
        (vae_model.WAN21_VAE, WAN21_VAE, True), (vae_model.WAN22_VAE, WAN22_VAE, True),
        (vae_model.WAN21_VAE, WAN21_ENCODER, False), (vae_model.WAN22_VAE, WAN22_ENCODER, False),
    ],
    ids=["2.1 decodes", "2.2 decodes", "2.1 encodes", "2.2 encodes"],
)  # fmt: skip
@pytest.mark.parametrize(("height", "width"), [(736, 1280), (480, 832)])
def test_the_plan_knows_what_strips_hold(config, footprint: VaeFootprint, decodes, height, width):
    """By the arithmetic of the layers themselves: what convolutions hold, and what strips leave to each other."""
    vae = WanVAE(config, device="meta", dtype=torch.bfloat16)
    stride = config.spatial_stride
    latent = (1, config.z_dim, 21, height // stride, width // stride)
    coding = vae.decoding(latent) if decodes else vae.encoding((1, 3, 81, height, width))
    for rows in strip_rows(height):
        if not decodes and rows % stride:
            continue
        plan, _ = coding.plan(rows)
        held, left = held_bytes(plan), 2 * page_elements(plan, 1)
        a_pixel = footprint.cache_bytes_per_pixel - footprint.whole_bytes_per_pixel
        planned = rows * width * a_pixel + width * footprint.strip_bytes_per_column
        assert held <= planned * 1.01, f"strips of {rows} rows"
        if rows >= 64:
            assert planned <= held * 1.2
        assert left <= footprint.seam_bytes_per_column * width * 1.02 <= left * 1.2
    dims = (config.decoder_dim if decodes else config.encoder_dim) * config.dim_mult[-1]
    assert footprint.waiting_bytes_per_position == 2 * dims


def held_bytes(plan: StripPlan) -> int:
    return sum(
        2 * 3 * layer.in_channels * ring_rows(layer, rows.counts_out[-1]) * rows.inputs.width
        for layer, rows in plan.layers.items()
        if isinstance(layer, CausalConv3d)
    )


# --- steps between convolutions --------------------------------------------------------------------------


def test_eager_steps_are_their_formulas():
    x, other = (torch.randn(2, 32, 3, 4) for _ in range(2))
    bias, gamma = torch.randn(32), torch.rand(32)
    out = torch.empty_like(x)
    EagerFrameOps().norm_silu(x.clone(), bias, gamma, out)
    y = x + bias.view(-1, 1, 1)
    assert torch.allclose(out, F.silu(F.normalize(y, dim=1) * math.sqrt(32) * gamma.view(-1, 1, 1)), atol=1e-6)
    summed = x.clone()
    EagerFrameOps().add_(summed, bias, other.clone(), gamma)
    assert torch.equal(summed, y + (other + gamma.view(-1, 1, 1)))
    assert select_frame_ops(torch.device("cpu"), torch.bfloat16).name == "eager"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_give_pytorchs_bits(dtype):
    ops = select_frame_ops(torch.device("cuda"), dtype)
    assert ops.name != "eager"
    assert difference(ops, EagerFrameOps(), torch.device("cuda"), dtype) is None
