"""The pipeline against a loop written out with diffusers' schedulers, and every way to run it against the others."""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from lowvram_video.attention.sdpa import Sdpa
from lowvram_video.memory.plan.footprint import GIB, Limits, WorkSize
from lowvram_video.memory.plan.host_memory import RAM_MARGIN_BYTES
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.memory.stream.disk_blocks import DiskBlocks
from lowvram_video.memory.stream.host_blocks import HostBlocks
from lowvram_video.memory.stream.ring import DeviceRing
from lowvram_video.memory.stream.streams import Span
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import Conditions, WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.wanvideo.text.checkpoint import load_text_encoder
from lowvram_video.wanvideo.text.encoder import GatedFeedForward
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from lowvram_video.wanvideo.vae.model import WanVAE
from PIL import Image
from torch import Tensor

from .tiny import load_wan, save_files, save_wan

CPU = torch.device("cpu")
UNLIMITED = 1 << 60
REQUEST = WanRequest(
    "a red ball moves left", "two cats", width=48, height=32, num_frames=9, seed=3, num_steps=4, shift=3.0, guidance=4.0
)


class Conditioned(WanPipeline):
    """Keeps what the model was shown."""

    conditions: Conditions

    def _denoise(self, request: WanRequest, conditions: Conditions, sigmas: Tensor) -> Tensor:
        self.conditions = conditions
        return super()._denoise(request, conditions, sigmas)


class Recording(WanPipeline):
    """Keeps what went into the decoder: frames are too coarse for a comparison."""

    latent: Tensor

    def _denoise(self, request: WanRequest, conditions: Conditions, sigmas: Tensor) -> Tensor:
        self.latent = super()._denoise(request, conditions, sigmas).clone()
        return self.latent


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    folder = tmp_path_factory.mktemp("t2v")
    files = save_files(folder, experts=True)
    return replace(files, model=save_wan(folder / "wan.safetensors", num_layers=6), model_low=None)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("experts"), experts=True)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("i2v"), "i2v")


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("ti2v"), "ti2v")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures that need no resizing at 48x32 (and are resized at 64x64)."""
    random = np.random.default_rng(5)
    paths = [tmp_path_factory.mktemp("pictures") / f"{name}.png" for name in ("first", "last")]
    for path in paths:
        Image.fromarray(random.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(path)
    return paths


def run(pipeline: WanPipeline, request: WanRequest = REQUEST) -> Tensor:
    return torch.cat(list(pipeline.generate(request)))


def latent_of(files: WanFiles, request: WanRequest = REQUEST, settings: RunSettings = RunSettings()) -> Tensor:  # noqa: B008
    pipeline = Recording(files, settings)
    run(pipeline, request)
    return pipeline.latent


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


class Reference:
    """Wan by hand: every model resident, classifier-free guidance on the velocity, a scheduler of diffusers."""

    def __init__(self, files: WanFiles, request: WanRequest) -> None:
        self.files, self.request = files, request
        encoder = load_text_encoder(files.text_encoder)
        self.texts = [encoder.encode([prompt]) for prompt in (request.prompt, request.negative_prompt)]
        self.vae: WanVAE = WAN_FORMAT.open_file(files.vae).build(torch.float32, CPU)
        assert request.width and request.height and request.num_frames
        stride = self.vae.config.spatial_stride
        size = (request.num_frames - 1) // 4 + 1, request.height // stride, request.width // stride
        noise = torch.Generator().manual_seed(request.seed)
        self.noise = torch.randn(1, self.vae.config.z_dim, *size, generator=noise)

    def scheduler(self):
        """The scheduler of the request, on the levels 1, 1 - 1/n ... shifted as in the paper."""
        steps, shift = self.request.num_steps, self.request.shift
        assert steps and shift
        levels = [(steps - index) / steps for index in range(steps)]
        levels = [shift * level / (1 + (shift - 1) * level) for level in levels]
        if self.request.sampler == "euler":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
            scheduler.set_timesteps(sigmas=levels)
        else:
            scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
            scheduler.set_timesteps(steps)
            # its own set_timesteps keeps this far from 1, where the log signal-to-noise ratio is infinite
            scheduler.sigmas = torch.tensor([1 - 1e-6, *levels[1:], 0.0])
        scheduler.set_begin_index(0)
        return scheduler

    @torch.inference_mode()
    def latent(self, channels: Tensor | None = None, first_frame: Tensor | None = None) -> Tensor:
        model = load_wan(self.files.model)
        low = load_wan(self.files.model_low) if self.files.model_low else model
        request, scheduler, x = self.request, self.scheduler(), self.noise
        held = 0 if first_frame is None else 1
        for index, step in enumerate(scheduler.timesteps):
            sigma = float(scheduler.sigmas[index])
            is_low = self.files.model_low is not None and sigma < request.boundary
            expert, scale = (low, request.guidance) if is_low else (model, request.guidance_high or request.guidance)
            timestep = torch.full((1,), 1000 * sigma)
            if first_frame is not None:
                x[:, :, :1] = first_frame
                timestep = torch.full((1, x.shape[2]), 1000 * sigma)
                timestep[:, 0] = 0
            shown = x if channels is None else torch.cat([x, channels], dim=1)
            cond, uncond = (expert(shown, timestep, text) for text in self.texts)
            velocity = uncond + scale * (cond - uncond)
            moved = scheduler.step(velocity, step, x, return_dict=False)[0]
            x = torch.cat([x[:, :, :held], moved[:, :, held:]], dim=2)
        return x


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_text_to_video_equals_the_loop_by_hand(t2v: WanFiles, sampler: str) -> None:
    request = replace(REQUEST, sampler=sampler)
    pipeline = Recording(t2v)
    frames = run(pipeline, request)
    reference = Reference(t2v, request)
    expected = reference.latent()
    error = relative_error(pipeline.latent, expected)
    print(f"T2V, {sampler}: max relative error {error:.2e}")
    assert error <= 1e-4
    video = torch.cat(list(reference.vae.decode_pieces(expected)), dim=2)
    wanted = (video[0].permute(1, 2, 3, 0) + 1).mul(127.5).clamp(0, 255)
    assert frames.shape == (9, 32, 48, 3) and frames.dtype == torch.uint8
    assert float((frames.float() - wanted).abs().max()) <= 0.6  # half a level for rounding


def test_prompt_and_seed_decide_what_is_made(t2v: WanFiles) -> None:
    pipeline = WanPipeline(t2v)
    frames = run(pipeline)
    assert torch.equal(run(pipeline), frames)
    assert torch.equal(run(WanPipeline(t2v)), frames)
    assert not torch.equal(run(pipeline, replace(REQUEST, seed=4)), frames)
    assert not torch.equal(run(pipeline, replace(REQUEST, prompt="a blue square")), frames)
    assert not torch.equal(run(pipeline, replace(REQUEST, negative_prompt="")), frames)


def test_one_seed_gives_one_video_where_the_sampler_adds_noise(t2v: WanFiles) -> None:
    request = replace(REQUEST, sampler="lcm", guidance=1.0, timesteps=(1000.0, 937.5, 833.3, 625.0))
    assert torch.equal(run(WanPipeline(t2v), request), run(WanPipeline(t2v), request))


def test_batched_guidance_equals_guidance_in_turn(t2v: WanFiles) -> None:
    pipeline = Recording(t2v, RunSettings(batched_guidance=True))
    contexts: list[int] = []
    pipeline.high.model.register_forward_hook(lambda *_: contexts.append(len(pipeline.high._contexts)))
    run(pipeline)
    error = relative_error(pipeline.latent, latent_of(t2v))
    print(f"guidance in one batch: max relative error {error:.2e}")
    assert error <= 1e-5
    assert contexts == [1, 1, 1, 1]  # one pass per step, and the prompts are embedded once


def test_guidance_0_follows_the_negative_prompt_alone(t2v: WanFiles) -> None:
    swapped = replace(REQUEST, prompt=REQUEST.negative_prompt, negative_prompt=REQUEST.prompt, guidance=1.0)
    error = relative_error(latent_of(t2v, replace(REQUEST, guidance=0.0)), latent_of(t2v, swapped))
    assert error <= 1e-5


def test_no_guidance_makes_one_pass_per_step(t2v: WanFiles) -> None:
    pipeline = WanPipeline(t2v)
    calls: list[int] = []
    pipeline.high.model.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    run(pipeline, replace(REQUEST, guidance=1.0))
    assert calls == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("guidance", "guidance_high", "passes"),
    [(1.0, 1.0, 1), (1.0, 3.0, 2), (3.0, 1.0, 2), (3.0, None, 2), (1.0, None, 1)],
)
@pytest.mark.parametrize("batched", [False, True])
def test_what_is_planned_is_what_is_encoded(
    experts: WanFiles, guidance: float, guidance_high: float | None, passes: int, batched: bool
) -> None:
    """A negative prompt takes room and time where either expert is guided, and nothing where neither is."""
    pipeline = Conditioned(experts, RunSettings(batched_guidance=batched))
    run(pipeline, replace(REQUEST, shift=12.0, num_steps=2, guidance=guidance, guidance_high=guidance_high))
    assert pipeline.plan is not None
    work = pipeline.plan.work
    assert (work.batch, work.passes_per_step) == ((passes, 1) if batched else (1, passes))
    assert (pipeline.conditions.uncond is not None) == (passes == 2)


# --- pictures --------------------------------------------------------------------------------------------


def pixels(path: Path) -> Tensor:
    picture = torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32))
    return (picture / 127.5 - 1).permute(2, 0, 1)[None, :, None]


@pytest.mark.parametrize("given", ["image", "end_image", "both"])
def test_image_to_video_equals_the_loop_by_hand(i2v: WanFiles, pictures: list[Path], given: str) -> None:
    request = replace(
        REQUEST,
        image=None if given == "end_image" else pictures[0],
        end_image=None if given == "image" else pictures[1],
    )
    reference = Reference(i2v, request)
    video, mask = torch.zeros(1, 3, 9, 32, 48), torch.zeros(1, 4, 3, 4, 6)
    if request.image:
        video[:, :, :1], mask[:, :, 0] = pixels(request.image), 1
    if request.end_image:
        video[:, :, -1:], mask[:, 3, -1] = pixels(request.end_image), 1
    with torch.inference_mode():
        channels = torch.cat([mask, reference.vae.encode(video)], dim=1)
    latent = latent_of(i2v, request)
    error = relative_error(latent, reference.latent(channels))
    without = relative_error(reference.latent(torch.zeros_like(channels)), latent)
    print(f"I2V with {given}: max relative error {error:.2e}; without the pictures {without:.2e}")
    assert without > 1e-2
    assert error <= 1e-4


def test_the_given_frame_of_ti2v_is_held(ti2v: WanFiles, pictures: list[Path]) -> None:
    request = replace(REQUEST, width=96, height=64, image=pictures[0], sampler="euler")
    latent = latent_of(ti2v, request)
    reference = Reference(ti2v, request)
    picture = Image.open(pictures[0]).resize((96, 64), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None, :, None]
    with torch.inference_mode():
        first = reference.vae.encode(pixels)
    assert torch.equal(latent[:, :, :1], first)
    error = relative_error(latent, reference.latent(first_frame=first))
    print(f"TI2V with a picture: max relative error {error:.2e}")
    assert error <= 1e-4


def test_ti2v_makes_a_video_of_words_too(ti2v: WanFiles) -> None:
    request = replace(REQUEST, width=96, height=64)
    error = relative_error(latent_of(ti2v, request), Reference(ti2v, request).latent())
    print(f"TI2V without a picture: max relative error {error:.2e}")
    assert error <= 1e-4


# --- two experts -----------------------------------------------------------------------------------------


def test_each_expert_takes_its_noise_levels_and_one_is_in_memory(experts: WanFiles) -> None:
    request = replace(REQUEST, num_steps=6, shift=12.0, guidance_high=5.0, boundary=0.9)
    pipeline = Recording(experts)
    assert pipeline.low is not None
    calls: list[tuple[str, float, bool]] = []
    for name, model, other in (("high", pipeline.high, pipeline.low), ("low", pipeline.low, pipeline.high)):

        def note(module, args, out, name=name, other=other) -> None:  # type: ignore[no-untyped-def]
            calls.append((name, float(args[1]), other.weights.blocks is not None or other.streamer is not None))

        model.model.register_forward_hook(note)
    run(pipeline, request)
    assert [name for name, _, _ in calls] == ["high"] * 8 + ["low"] * 4
    assert all((name == "high") == (timestep >= 900) for name, timestep, _ in calls)
    assert not any(other_held for _, _, other_held in calls)
    error = relative_error(pipeline.latent, Reference(experts, request).latent())
    print(f"two experts: max relative error {error:.2e}")
    assert error <= 1e-4


@pytest.mark.parametrize("kept", [{"keep_loaded": True}, {"keep_model": True}], ids=["all", "model"])
def test_experts_that_stay_loaded_take_turns_in_memory(experts: WanFiles, kept: dict[str, bool]) -> None:
    request = replace(REQUEST, shift=12.0, boundary=0.9)
    pipeline = Recording(experts, RunSettings(**kept))
    assert pipeline.low is not None
    held: list[int] = []
    for model in (pipeline.high, pipeline.low):
        model.model.register_forward_hook(
            lambda *_: held.append(
                sum(m is not None and m.weights.blocks is not None for m in (pipeline.high, pipeline.low))
            )
        )
    frames = run(pipeline, request)
    assert torch.equal(run(pipeline, request), frames)
    assert set(held) == {1}
    pipeline.release()
    assert not pipeline.high.host_bytes and not pipeline.low.host_bytes


class CountingRegistrar:
    """Pins all that it is asked to, and counts."""

    def __init__(self) -> None:
        self.pins, self.pinned = 0, 0

    def pin(self, extent: Tensor) -> bool:
        self.pins += 1
        self.pinned += 1
        return True

    def unpin(self, extent: Tensor) -> None:
        self.pinned -= 1


def swapping(experts: WanFiles, settings: RunSettings) -> tuple[Recording, CountingRegistrar]:
    """A pipeline whose experts pin their four blocks, which are read when they run."""
    pipeline, registrar = Recording(experts, settings), CountingRegistrar()
    for model in (pipeline.high, pipeline.low):
        assert model is not None
        model.weights._registrar = registrar
    return pipeline, registrar


@pytest.mark.parametrize("keep_loaded", [False, True])
def test_an_expert_is_read_over_the_last_ones_memory(
    experts: WanFiles, monkeypatch: pytest.MonkeyPatch, keep_loaded: bool
) -> None:
    """Never more than one expert's blocks in host memory, allocated and pinned once for both."""
    request = replace(REQUEST, shift=12.0, boundary=0.9)
    settings = RunSettings(keep_loaded=keep_loaded, blocks_to_swap=2)
    plain = Recording(experts, settings)
    run(plain, request)
    pipeline, registrar = swapping(experts, settings)
    made: list[HostBlocks] = []
    begin = HostBlocks.__init__

    def noting(self: HostBlocks, *arguments: object, **named: object) -> None:
        made.append(self)
        begin(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(HostBlocks, "__init__", noting)
    frames = run(pipeline, request)
    assert len(made) == 1 and registrar.pins == 2
    assert torch.equal(pipeline.latent, plain.latent)
    assert registrar.pinned == (2 if keep_loaded else 0)
    assert torch.equal(run(pipeline, request), frames), "the first expert takes the memory back and reads its file anew"
    assert len(made) == (1 if keep_loaded else 2)


def test_an_expert_that_streams_from_disk_does_not_leave_the_other_in_memory(experts: WanFiles) -> None:
    """Its plan counts on that memory, and is from disk because even so there is too little."""
    pipeline = WanPipeline(experts, RunSettings(device=CPU))
    high, low = pipeline.high, pipeline.low
    assert low is not None
    work = WorkSize(5, 32, 32)
    high.start(high.make_plan(work, Limits(UNLIMITED)))
    assert high.host_bytes > 0
    plan = low.make_plan(work, Limits(UNLIMITED, blocks_to_swap=3))
    low.start(replace(plan, host=replace(plan.host, from_disk=True, num_staging=3)))
    assert not high.started and high.host_bytes == 0 < low.host_bytes
    low.release()


def test_a_failure_while_one_expert_replaces_the_other_leaves_neither(
    experts: WanFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(REQUEST, shift=12.0, boundary=0.9)
    pipeline, registrar = swapping(experts, RunSettings(keep_loaded=True, blocks_to_swap=2))
    assert pipeline.low is not None
    expected = run(pipeline, request)
    checkpoint = pipeline.high.checkpoint
    read_into = type(checkpoint).read_into

    def failing(self: object, name: str, out: Tensor) -> None:
        if self is checkpoint and name.startswith("blocks.1."):
            raise KeyboardInterrupt
        read_into(self, name, out)  # type: ignore[arg-type]

    monkeypatch.setattr(type(checkpoint), "read_into", failing)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, request)
    assert pipeline.high.host_bytes == pipeline.low.host_bytes == registrar.pinned == 0
    monkeypatch.undo()
    assert torch.equal(run(pipeline, request), expected)


# --- where the weights are -------------------------------------------------------------------------------


def test_a_small_ram_budget_streams_from_disk_to_the_same_bits(t2v: WanFiles) -> None:
    resident = latent_of(t2v)
    pipeline = Recording(t2v, RunSettings(ram_budget_gib=(RAM_MARGIN_BYTES + 3 * 2**20) / GIB))
    streams: list[tuple[bool, bool]] = []
    high = pipeline.high
    high.model.register_forward_hook(
        lambda *_: streams.append((isinstance(high.weights.blocks, DiskBlocks), high.ring is not None))
    )
    run(pipeline)
    assert pipeline.plan is not None and pipeline.plan.host.from_disk
    assert set(streams) == {(True, True)}
    assert torch.equal(pipeline.latent, resident)


def test_a_large_ram_budget_changes_nothing(t2v: WanFiles) -> None:
    pipeline = Recording(t2v, RunSettings(ram_budget_gib=64.0))
    run(pipeline)
    assert pipeline.plan is not None and not pipeline.plan.host.from_disk
    assert torch.equal(pipeline.latent, latent_of(t2v))


def test_blocks_to_swap_by_hand(t2v: WanFiles) -> None:
    pipeline = Recording(t2v, RunSettings(blocks_to_swap=4))
    run(pipeline)
    assert pipeline.plan is not None and pipeline.plan.blocks.num_streamed == 4
    assert torch.equal(pipeline.latent, latent_of(t2v))
    with pytest.raises(ValueError, match=r"blocks_to_swap is 7, but wan.safetensors has 6 blocks: use -1"):
        run(WanPipeline(t2v, RunSettings(blocks_to_swap=7)))


def inputs(config_in: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, config_in, 2, 4, 6, generator=generator)
    return latent, torch.tensor([700.0]), torch.randn(1, 512, 32, generator=generator)


def velocity_of(path: Path, *, swap: int, disk: bool = False, cached: bool = False, image: bool = False) -> Tensor:
    """A velocity with `swap` blocks streamed through a ring on the CPU."""
    model = StreamedWan(path, RunSettings())
    ram = RAM_MARGIN_BYTES + 3 * 2**20 if disk else None
    plan = model.make_plan(WorkSize(5, 32, 48), Limits(UNLIMITED, ram_budget_bytes=ram, blocks_to_swap=swap))
    plan = replace(plan, choice=replace(plan.choice, cache_text_kv=cached))
    latent, timestep, text = inputs(model.config.in_channels)
    tokens = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(2)) if image else None
    with torch.inference_mode():
        model.start(plan, DeviceRing(plan.blocks.ring_bytes, CPU) if swap else None)
        first = model(latent, timestep, text, tokens)
        second = model(latent, timestep, text, tokens)
    assert isinstance(model.weights.blocks, DiskBlocks) == disk
    assert torch.equal(first, second)
    assert len(model._contexts) == 1
    assert (model._contexts[0][2].keys_values is not None) == cached
    pairs = [pair for made in model._contexts[0][2].keys_values or () for pair in made.pairs]
    assert len({x.untyped_storage().data_ptr() for pair in pairs for x in pair}) == cached, "one allocation for all"
    model.release()
    assert all(parameter.is_meta for parameter in model.model.parameters())
    return first


@pytest.mark.parametrize("cached", [False, True], ids=["text by block", "text cached"])
@pytest.mark.parametrize(("swap", "disk"), [(0, False), (0, True), (3, False), (3, True), (6, False), (6, True)])
def test_every_placement_of_the_blocks_gives_the_same_bits(t2v: WanFiles, swap: int, disk: bool, cached: bool) -> None:
    with torch.inference_mode():
        expected = load_wan(t2v.model)(*inputs())
    assert torch.equal(velocity_of(t2v.model, swap=swap, disk=disk, cached=cached), expected)


def test_cached_keys_and_values_of_pictures(tmp_path: Path) -> None:
    path = save_wan(tmp_path / "wan.safetensors", "i2v clip", num_layers=4)
    plain = velocity_of(path, swap=2, image=True)
    assert torch.equal(velocity_of(path, swap=2, cached=True, image=True), plain)
    assert not torch.equal(velocity_of(path, swap=2, image=False), plain)


# --- running out of memory -------------------------------------------------------------------------------


class Scarce:
    """Attention that runs out of device memory at the given calls."""

    name, exact = "scarce", True

    def __init__(self, failing: range, error: RuntimeError | None = None) -> None:
        self.inner, self.failing, self.calls = Sdpa(CPU), failing, 0
        self.error = error or torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def refuse(self, spec: object) -> None:
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise self.error
        return self.inner.attend(q, k, v)


class Ringed(StreamedWan):
    """Streams on the CPU too, as it would on a GPU."""

    def _make_ring(self, plan: MemoryPlan) -> DeviceRing:
        return DeviceRing(plan.blocks.ring_bytes, CPU)


def scarce_model(
    path: Path, failing: range, error: RuntimeError | None = None
) -> tuple[StreamedWan, Scarce, MemoryPlan]:
    """A model that believes to be making a large video, so that there are leaner plans."""
    model = Ringed(path, RunSettings())
    scarce = Scarce(failing, error)
    model.model.execution = replace(model.model.execution, attention=scarce)
    return model, scarce, model.make_plan(WorkSize(401, 720, 1280), Limits(UNLIMITED))


def test_a_pass_that_runs_out_of_memory_is_repeated_with_a_leaner_plan(
    t2v: WanFiles, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode():
        expected = load_wan(t2v.model)(*inputs())
        model, scarce, plan = scarce_model(t2v.model, range(5, 6))
        model.start(plan)
        with caplog.at_level(logging.INFO):
            velocity = model(*inputs())
    assert model.plan is not None and model.ring is not None
    assert model.plan.denoise.total < plan.denoise.total
    assert plan.blocks.num_streamed == 0 < model.plan.blocks.num_streamed and model.ring.nbytes > 0
    error = relative_error(velocity, expected)
    print(f"after a retry: max relative error {error:.2e}")
    assert error <= 1e-5
    messages = [record.message for record in caplog.records if "out of VRAM" in record.message]
    assert len(messages) == 1
    assert "the pass is repeated" in messages[0]
    with torch.inference_mode():
        assert torch.equal(model(*inputs()), velocity)
    assert scarce.calls == 6 + 2 * 12  # the failed pass stopped at once
    model.release()


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_memory_that_a_library_lacks_is_retried_as_torchs_is(t2v: WanFiles, message: str) -> None:
    model, _, plan = scarce_model(t2v.model, range(5, 6), RuntimeError(message))
    with torch.inference_mode():
        expected = load_wan(t2v.model)(*inputs())
        model.start(plan)
        assert relative_error(model(*inputs()), expected) <= 1e-5
    assert model.plan is not None and model.plan.denoise.total < plan.denoise.total
    model.release()


def test_prompts_are_encoded_again_where_memory_was_lacking(t2v: WanFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = WanPipeline(t2v, RunSettings(device=CPU))
    expected = pipeline._encode_text(["a red ball"])
    errors = [RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]
    forward = GatedFeedForward.forward

    def scarce(self: GatedFeedForward, x: Tensor) -> Tensor:
        if errors:
            raise errors.pop()
        return forward(self, x)

    monkeypatch.setattr(GatedFeedForward, "forward", scarce)
    assert torch.equal(pipeline._encode_text(["a red ball"]), expected)


def test_another_error_of_a_pass_is_no_lack_of_memory(t2v: WanFiles) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    model, scarce, plan = scarce_model(t2v.model, range(5, 6), error)
    model.start(plan)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(*inputs())
    assert model.plan is plan and scarce.calls == 6
    model.release()


@pytest.mark.parametrize("failing", [range(0), range(5, 6)], ids=["at first", "after a pass"])
def test_memory_that_runs_out_while_starting_is_no_end(
    t2v: WanFiles, monkeypatch: pytest.MonkeyPatch, failing: range
) -> None:
    with torch.inference_mode():
        expected = load_wan(t2v.model)(*inputs())
    model, _, plan = scarce_model(t2v.model, failing)
    make_ring, tried = model._make_ring, list[MemoryPlan]()

    def make(wanted: MemoryPlan) -> DeviceRing:
        tried.append(wanted)
        if len(tried) == 1 + len(failing):  # the start, or the one after the pass that failed
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return make_ring(wanted)

    monkeypatch.setattr(model, "_make_ring", make)
    model.start_fitting(plan)
    with torch.inference_mode():
        velocity = model(*inputs())
    sizes = [wanted.denoise.total for wanted in tried]
    assert len(sizes) == 2 + len(failing) and sizes == sorted(set(sizes), reverse=True)
    assert model.plan is tried[-1]
    assert relative_error(velocity, expected) <= 1e-5
    model.release()


def test_as_many_keys_and_values_are_kept_as_were_planned(t2v: WanFiles, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts that follow each other replace each other; for prompts that take turns the pass is planned anew."""
    model = Ringed(t2v.model, RunSettings())
    work = WorkSize(5, 32, 48, passes_per_step=2)
    plan = model.make_plan(work, Limits(UNLIMITED, blocks_to_swap=6))
    plan = replace(plan, choice=replace(plan.choice, cache_text_kv=True))
    latent, timestep, _ = inputs()
    texts = [torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    made: list[int] = []
    with torch.inference_mode():
        model.start(plan)
        embed = model.model.embed_context
        model.model.embed_context = lambda *given: made.append(1) or embed(*given)
        want = [model(latent, timestep, text) for text in texts]
        assert len(made) == 4 and len(model._contexts) == 2 and model.plan is plan
        for _ in range(5):
            got = [model(latent, timestep, text) for text in texts[1:]]
        assert all(torch.equal(one, other) for one, other in zip(got, want[1:], strict=True))
        assert len(made) < 4 + 8, "each of the three is embedded once more, and once after planning anew"
        assert model.plan.work.passes_per_step == 3 and model.plan.work == replace(work, passes_per_step=3)
    model.release()


def test_what_was_read_from_the_disk_moves_to_ram_when_there_is_some(t2v: WanFiles) -> None:
    model = StreamedWan(t2v.model, RunSettings())
    scarce = Limits(UNLIMITED, ram_budget_bytes=RAM_MARGIN_BYTES + 3 * 2**20, blocks_to_swap=6)
    with torch.inference_mode():
        for limits, kind in ((scarce, DiskBlocks), (replace(scarce, ram_budget_bytes=None), HostBlocks)):
            plan = model.make_plan(WorkSize(5, 32, 48), limits)
            model.start(plan, DeviceRing(plan.blocks.ring_bytes, CPU))
            assert isinstance(model.weights.blocks, kind)
        held = model.weights.blocks
        model.start(model.make_plan(WorkSize(5, 32, 48), scarce), DeviceRing(plan.blocks.ring_bytes, CPU))
        assert model.weights.blocks is held, "what RAM holds is not read again"
    model.release()


def test_a_visit_that_fails_leaves_the_streamer_usable(t2v: WanFiles) -> None:
    model = Ringed(t2v.model, RunSettings())
    plan = model.make_plan(WorkSize(5, 32, 48), Limits(UNLIMITED, blocks_to_swap=6))

    def fail(block: torch.nn.Module) -> None:
        raise KeyboardInterrupt

    with torch.inference_mode():
        model.start(replace(plan, choice=replace(plan.choice, cache_text_kv=True)))
        want = model(*inputs())
        assert model.streamer is not None and any(model.streamer._held)  # of the next pass
        with pytest.raises(KeyboardInterrupt):
            model.visit(fail)
        assert not any(model.streamer._held)  # the source was set up for the visit
        assert torch.equal(model(*inputs()), want)
    model.release()


def test_a_card_that_need_not_be_here_is_planned_as_one(t2v: WanFiles) -> None:
    model = StreamedWan(t2v.model, RunSettings(dtype=torch.bfloat16))
    limits = limits_for(torch.device("cuda"), vram_budget_gib=8.0, ram_budget_gib=32.0, measure=False)
    plan = model.make_plan(WorkSize(5, 32, 48), limits)
    assert plan.blocks.num_streamed == 0 and not plan.host.from_disk  # a CPU's settings, but no CPU's limits


def test_without_a_budget_what_is_free_of_ram_decides(t2v: WanFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    want = latent_of(t2v)
    monkeypatch.setattr("lowvram_video.runtime.run_limits.available_ram_bytes", lambda: RAM_MARGIN_BYTES + 3 * 2**20)
    pipeline = Recording(t2v, RunSettings(pinned_memory=False))
    run(pipeline)
    assert pipeline.plan is not None and pipeline.plan.host.from_disk
    assert torch.equal(pipeline.latent, want)
    assert pipeline.plan.limits.pinned_cap_bytes == 0


def test_what_a_kept_model_holds_is_not_wanted_again(t2v: WanFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Recording(t2v, RunSettings(keep_loaded=True))
    run(pipeline)
    monkeypatch.setattr("lowvram_video.runtime.run_limits.available_ram_bytes", lambda: RAM_MARGIN_BYTES)
    run(pipeline)
    assert pipeline.plan is not None and not pipeline.plan.host.from_disk
    pipeline.high.release()


class Pinning:
    """A registrar that never refuses."""

    def pin(self, extent: Tensor) -> bool:
        return True

    def unpin(self, extent: Tensor) -> None:
        return


def test_lent_weights_and_blocks_are_pinned_under_one_cap(t2v: WanFiles) -> None:
    model = Ringed(t2v.model, RunSettings(), registrar=Pinning())
    limits = Limits(UNLIMITED, blocks_to_swap=6, pinned_cap_bytes=1 << 30)
    model.start(model.make_plan(WorkSize(5, 32, 48), limits))
    budget = model.weights.budget
    assert budget is not None and 0 < budget.pinned_bytes == model.pinned_bytes
    before = budget.pinned_bytes
    model.fixed.keep_away(("time_embedding",))
    assert model.fixed.transient is not None and model.fixed.pinned_bytes == budget.pinned_bytes - before > 0
    model.release()
    assert budget.pinned_bytes == 0


def test_memory_that_never_suffices_ends_in_the_error(t2v: WanFiles) -> None:
    model, scarce, plan = scarce_model(t2v.model, range(10**9))
    model.start(plan)
    with torch.inference_mode(), pytest.raises(torch.cuda.OutOfMemoryError):
        model(*inputs())
    assert 1 < scarce.calls < 100
    model.release()
    assert model.weights.blocks is None


# --- ends of a run ---------------------------------------------------------------------------------------


class Interrupting:
    """Progress that raises at one point of a run."""

    def __init__(self, phase: str, error: type[BaseException] | None = None) -> None:
        self.phase, self.error, self.titles = phase, error, list[str]()

    def begin(self, title: str) -> None:
        self.titles.append(title)

    def update(self, done: int, total: int) -> None:
        if self.error is not None and self.titles[-1] == self.phase:
            error, self.error = self.error, None
            raise error("now")

    def end(self) -> None:
        return


def assert_released(pipeline: WanPipeline) -> None:
    assert pipeline.high.weights.blocks is None and pipeline.high.streamer is None and pipeline.high.ring is None
    assert all(parameter.is_meta for parameter in pipeline.high.model.parameters())
    assert not pipeline.high._contexts
    assert pipeline._vae is None and pipeline._text_encoder is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("phase", ["denoise", "decode"])
def test_an_exception_leaves_the_pipeline_usable(t2v: WanFiles, phase: str, error: type[BaseException]) -> None:
    pipeline = WanPipeline(t2v, progress=Interrupting(phase, error))
    with pytest.raises(error, match="now"):
        run(pipeline)
    assert_released(pipeline)
    assert torch.equal(run(pipeline), run(WanPipeline(t2v)))
    assert_released(pipeline)


def test_closing_the_generator_leaves_the_pipeline_usable(t2v: WanFiles) -> None:
    pipeline = WanPipeline(t2v)
    frames: Iterator[Tensor] = pipeline.generate(REQUEST)
    first = next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert_released(pipeline)
    assert torch.equal(run(pipeline)[: len(first)], first)


def test_frames_come_as_they_are_decoded(t2v: WanFiles) -> None:
    assert [len(frames) for frames in WanPipeline(t2v).generate(REQUEST)] == [1, 4, 4]


def test_kept_models_give_the_same_and_stay_off_the_device(t2v: WanFiles) -> None:
    pipeline = WanPipeline(t2v, RunSettings(keep_loaded=True))
    frames = run(pipeline)
    assert pipeline.high.weights.blocks is not None and pipeline.high.streamer is None
    source = pipeline.high.weights.blocks
    assert torch.equal(run(pipeline), frames)
    assert pipeline.high.weights.blocks is source


def test_the_report_has_the_three_phases(t2v: WanFiles) -> None:
    progress = Interrupting("")
    pipeline = WanPipeline(t2v, progress=progress)
    run(pipeline)
    report = pipeline.report()
    assert [phase.name for phase in report.phases] == ["encode", "denoise", "decode"]
    assert all(phase.seconds > 0 and phase.rss_peak_bytes > 0 for phase in report.phases)
    assert progress.titles == ["encode", "load", "denoise", "decode"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"width": 50}, "50x32 cannot be made: this model needs sides that are multiples of 16; use 48x32"),
        ({"height": 0}, "48x0 cannot be made"),
        ({"num_frames": 8}, "8 frames cannot be made: Wan makes 4n [+] 1 frames; use 5 or 9"),
        ({"num_frames": 0}, "0 frames cannot be made: .*; use 1 or 5"),
        ({"num_frames": -4}, "-4 frames cannot be made: .*; use 1 or 5"),
        ({"num_steps": 0}, "num_steps is 0; at least 1"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"guidance": float("nan")}, "guidance is nan: use a finite number"),
        ({"boundary": 1.5}, "boundary is 1.5: use a sigma between 0 and 1"),
        ({"guidance_high": 1.0}, "guidance_high is 1.0, .* of Wan 2.2 A14B, but there is only wan.safetensors"),
        ({"guidance_high": 3.0, "guidance": 1.0}, "guidance_high is 3.0, for the high-noise expert"),
        (
            {"boundary": 0.9},
            "boundary is 0.9, where the low-noise expert of Wan 2.2 A14B takes over, but there is only",
        ),
        ({"seed": -1}, "seed is -1: use a whole number from 0"),
        ({"sampler": "magic"}, "Sampler 'magic' does not exist; choose one of euler"),
        ({"spacing": "magic"}, "spacing is 'magic'; expected one of uniform"),
        ({"timesteps": (0.5, 0.25)}, "look like sigmas"),
        (
            {"image": Path("cat.png")},
            "is a text-to-video model and takes no picture: leave out cat.png",
        ),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_loaded(t2v: WanFiles, change: dict, message: str) -> None:
    progress = Interrupting("")
    with pytest.raises(ValueError, match=message):
        run(WanPipeline(t2v, progress=progress), replace(REQUEST, **change))
    assert progress.titles == []


def test_experts_without_a_published_boundary_want_one(ti2v: WanFiles) -> None:
    progress = Interrupting("")
    pipeline = WanPipeline(replace(ti2v, model_low=ti2v.model), progress=progress)
    request = replace(REQUEST, width=64)
    with pytest.raises(ValueError, match=r"no boundary is known for .*ti2v.safetensors.*--boundary.*--model-low"):
        run(pipeline, request)
    assert progress.titles == []
    # both experts are guided alike unless told otherwise
    same = replace(ti2v, model_low=ti2v.model)
    request = replace(request, height=64, boundary=0.5)
    assert torch.equal(latent_of(same, request), latent_of(same, replace(request, guidance_high=request.guidance)))
    assert torch.equal(latent_of(same, request), latent_of(ti2v, replace(request, boundary=None)))


class Half(torch.nn.Module):
    """A VAE of which only a half finds room on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.place = CPU

    def to(self, place: Any) -> torch.nn.Module:  # type: ignore[override]
        self.place = torch.device(place)
        if self.place != CPU:
            raise RuntimeError("CUDA error: out of memory")
        return self


def test_a_kept_vae_that_finds_no_room_goes_back_to_ram(t2v: WanFiles) -> None:
    pipeline = WanPipeline(t2v, RunSettings(keep_loaded=True))
    pipeline.settings = replace(pipeline.settings, device=torch.device("meta"))
    pipeline._vae = kept = Half()
    with pytest.raises(RuntimeError, match="out of memory"), pipeline._vae_at_work("decoder"):
        pass
    assert kept.place == CPU


def test_pictures_that_do_not_suit_the_model(i2v: WanFiles, ti2v: WanFiles, pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"wan_i2v.safetensors makes a video of a picture: give --image"):
        run(WanPipeline(i2v))
    with pytest.raises(ValueError, match=r"gone.png: there is no such picture"):
        run(WanPipeline(i2v), replace(REQUEST, image=Path("gone.png")))
    with pytest.raises(ValueError, match=r"takes a first frame only: leave out .*last.png"):
        run(WanPipeline(ti2v), replace(REQUEST, width=64, end_image=pictures[1]))


def test_running_out_of_memory_while_decoding_loses_no_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = WanPipeline(save_files(tmp_path), RunSettings())
    request = WanRequest("a red ball", width=160, height=32, num_frames=9, num_steps=1)
    want = torch.cat(list(pipeline.generate(request)))
    decode, failures = WanVAE.decode_pieces, [1]

    def failing(vae: WanVAE, latent: torch.Tensor) -> Iterator[torch.Tensor]:
        for index, frames in enumerate(decode(vae, latent)):
            if failures and index == 2:
                failures.pop()
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            yield frames

    monkeypatch.setattr(WanVAE, "decode_pieces", failing)
    got = torch.cat(list(pipeline.generate(request)))
    assert torch.equal(got[:5], want[:5])
    assert (got.int() - want.int()).abs().max() <= 1, "strips are exact"
    assert "out of VRAM while decoding whole: next in strips of 16 rows, with their borders in RAM" in caplog.text


def test_what_timed_streams_did_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = WanPipeline(save_files(tmp_path), RunSettings())
    stop = StreamedWan.stop

    def stopping(model: StreamedWan) -> None:
        if model.started and model._on_spans is not None:
            now = time.perf_counter()
            model._on_spans(
                [Span("copy", 0, now - 0.009, now - 0.005, 1000), Span("stall", 0, now - 0.009, now - 0.008)]
            )
            model._on_spans([Span("compute", 0, now - 0.008, now)])
        stop(model)

    monkeypatch.setattr(StreamedWan, "stop", stopping)
    for _ in pipeline.generate(WanRequest("a red ball", width=32, height=32, num_frames=5, num_steps=1)):
        pass
    stream = pipeline.report().stream
    assert stream is not None and stream.bytes_streamed == 1000 and stream.num_passes == 1
    assert stream.stall_ms_per_pass == pytest.approx(1.0)
