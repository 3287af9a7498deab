"""From files and a prompt to frames: encode, denoise, decode, each part on the device only while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..memory.plan.plan import MemoryPlan
from ..memory.report.report import RunReport
from ..runtime.latent_watch import LatentWatch
from ..runtime.progress import Progress
from ..runtime.recorded_run import RecordedRun
from ..runtime.run_limits import hold_limits
from ..runtime.run_record import RunRecord
from ..runtime.settings import RunSettings
from ..runtime.step_record import StepRecord
from ..runtime.turns import Turns
from ..sampling.caching.moments import moment_of
from ..sampling.guidance import Expert, ExpertSwitch, batch_and_passes
from ..sampling.samplers import select_sampler
from ..sampling.schedules import flow_sigmas, is_high_noise, sigmas_from_timesteps
from ..sampling.solver import Denoiser, StepInfo
from ..vae.files import Half, OpenVae
from ..vae.retries import at_work, once_more, pieces_fitting
from ..video.pictures import to_levels, to_uint8
from ..weights.lora.report import LoraReport
from .clip_vision import ClipVisionEncoder
from .conditioning import Conditions, Pictures, with_latents
from .decode_ways import Decoders, DecodeWay
from .draft import DraftDecoder
from .footprint import wan_work
from .given import check_pictures, load_pictures
from .guided import guided
from .identity import WanFiles, run_settings
from .matching import check_experts_given, check_files_match
from .network.model import Nag
from .request import WanDefaults, WanRequest, check_experts, check_request, check_size, defaults_for
from .streamed import StreamedWan
from .text.checkpoint import load_text_encoder
from .text.encoder import TextEncoder
from .vae.checkpoint import WAN_FORMAT
from .vae.model import VAEConfig, WanVAE


class WanPipeline:
    """One model's files, ready to make videos.

    Opening reads headers only and checks that the files belong together; CheckpointError where they do not.
    """

    def __init__(
        self,
        files: WanFiles,
        settings: RunSettings = RunSettings(),  # noqa: B008 - immutable
        progress: Progress = Progress(),  # noqa: B008
        runs: Path | None = None,
        between_blocks: Callable[[], None] | None = None,
    ):
        """`runs` is the folder that keeps the steps of runs (None: nothing is kept).

        `between_blocks` is called before each block of the transformer, and may raise to stop.
        """
        self.files, self.settings, self.progress, self.runs = files, settings, progress, runs
        check_experts_given(files)
        hook = between_blocks
        self.high = StreamedWan(files.model, settings, None, hook, files.loras, vace_module=files.vace_module)
        self.low: StreamedWan | None = None
        if files.model_low:
            low_module = files.vace_module_low
            self.low = StreamedWan(files.model_low, settings, None, hook, files.loras_low, vace_module=low_module)
            turns = Turns()
            turns.add(self.high)
            turns.add(self.low)
        self._opened_vae: OpenVae[VAEConfig, WanVAE] = WAN_FORMAT.open_file(files.vae)
        self.vae_config = self._opened_vae.config
        self._draft = DraftDecoder(files.decoder, self.vae_config) if files.decoder else None
        self._clip_vision = (
            ClipVisionEncoder(files.clip_vision, settings.device, settings.compute_dtype) if files.clip_vision else None
        )
        experts = [model.config for model in self.models]
        check_files_match(files, experts, self.vae_config, self._clip_vision)
        self.config = self.high.config
        self.defaults: WanDefaults = defaults_for(self.config, files.model_low is not None)
        self.plan: MemoryPlan | None = None
        self._text_encoder: TextEncoder | None = None
        self._vae: WanVAE | None = None
        self.record = RunRecord(settings.device, settings.others)
        self._run = RecordedRun(None, (), dict)  # of the last request

    @torch.inference_mode()
    def generate(self, request: WanRequest) -> Iterator[Tensor]:
        """Frames as they are decoded, uint8 `[t, H, W, 3]`. A bad request is a ValueError before anything is loaded.

        With `runs`, the steps of a run that was stopped are not made again, nor the latents of one that was finished;
        they are kept until `forget`.
        """
        request, pictures, sigmas = self.check(request)
        models, shown = self.models, pictures.all()
        self._run = RecordedRun(self.runs, models, lambda: run_settings(self.files, models, request, shown))
        assert self.plan is not None
        with self._run, self.record.run(self.plan.limits):
            try:
                latent = self._latent(request, pictures, sigmas)
                with self.record.phase("decode"):
                    yield from self._decode(latent, self.plan)
            finally:
                self.progress.end()
                self._stop()

    @torch.inference_mode()
    def denoise(self, request: WanRequest) -> Tensor:
        """The latent of a request, `[1, z, T, h, w]`, without its frames; nothing of its run is kept."""
        request, pictures, sigmas = self.check(request)
        self._run = RecordedRun(None, self.models, dict)
        assert self.plan is not None
        with self.record.run(self.plan.limits):
            try:
                return self._latent(request, pictures, sigmas)
            finally:
                self.progress.end()
                self._stop()

    def check(self, request: WanRequest) -> tuple[WanRequest, Pictures, Tensor]:
        """The request with the published settings, its pictures and its noise levels; `plan` is then that of it.

        ValueError where it cannot be made: no weights are read for that, and nothing is begun.
        """
        request = request.completed(self.defaults)
        check_request(request)
        check_experts(request, self.files.model.name, experts=self.low is not None)
        check_size(self.vae_config, self.config.patch_size[1], *request.size)
        select_sampler(request.sampler)
        sigmas = self.sigmas(request)
        check_pictures(request, self.config, self.files)
        pictures = load_pictures(request)
        self.plan = self._plan(request)
        return request, pictures, sigmas

    def forget(self) -> None:
        """The last request's video is whole and in its place: nothing of its run need be kept."""
        self._run.forget()

    @property
    def steps(self) -> StepRecord | None:
        """What is kept of the last request."""
        return self._run.record

    def sigmas(self, request: WanRequest) -> Tensor:
        """Noise levels `[steps + 1]` of a completed request."""
        if request.timesteps is not None:
            return sigmas_from_timesteps(request.timesteps)
        assert request.num_steps is not None and request.shift is not None
        return flow_sigmas(request.num_steps, request.shift, request.spacing)

    def lora_reports(self) -> list[LoraReport]:
        """How much of each LoRA is applied, those of the low-noise expert last."""
        models = self.models
        return [lora.report for model in models for lora in model.weights.loras.loras]

    def report(self) -> RunReport:
        """What the last video used."""
        return self.record.report()

    def release(self) -> None:
        """Give back the memory that is kept between videos."""
        self._text_encoder = self._vae = None
        for model in self.models:
            model.release()

    @property
    def models(self) -> list[StreamedWan]:
        """The model, or both experts, that of high noise first."""
        return [self.high] if self.low is None else [self.high, self.low]

    def _latent(self, request: WanRequest, pictures: Pictures, sigmas: Tensor) -> Tensor:
        """The video's latent, made or as it was kept."""
        kept = self._run.latent()
        if kept is not None:
            return kept.to(self.settings.device)
        with self.record.phase("encode"):
            conditions = self._encode(request, pictures)
        with self.record.phase("denoise"):
            latent = self._run.sound(lambda: self._denoise(request, conditions, sigmas))
        self._run.finish(latent)
        return latent

    def _plan(self, request: WanRequest) -> MemoryPlan:
        width, height, frames = request.size
        if request.reference is not None:  # a latent frame before the first
            frames += self.vae_config.temporal_stride
        batch, passes = batch_and_passes(request.guided, self.settings.joins_guidance)
        passes += request.nag is not None  # a prompt more, whose keys and values may be kept
        work = replace(wan_work(self.config, (width, height, frames), batch, passes), nag=request.nag is not None)
        # one plan for both experts: their blocks differ by their LoRAs alone
        models = self.models
        for model in models:
            model.choose_attention(work.tokens)
        limits = hold_limits(self.settings, self.high.model.execution, sum(model.host_bytes for model in models))
        return max(models, key=lambda model: model.weights.largest_block_bytes).make_plan(work, limits)

    def _encode(self, request: WanRequest, pictures: Pictures) -> Conditions:
        self.progress.begin("encode")
        prompts = [request.prompt, request.negative_prompt] if request.hears_negative else [request.prompt]
        text = self._encode_text(prompts).to(self.settings.device)
        nag = None if request.nag is None else Nag(text[1:], request.nag)
        uncond = text[1:] if request.guided else None
        conditions = Conditions(text[:1], uncond, self._image_tokens(pictures), nag=nag)
        if self.config.model_type in ("t2v", "ti2v") and pictures.first is None:
            return conditions
        with self._vae_at_work("encoder") as vae:
            return with_latents(conditions, vae, self.config, request, pictures)

    def _image_tokens(self, pictures: Pictures) -> Tensor | None:
        """CLIP's features of the first and the last picture, one after the other, or of a reference alone."""
        shown = [each for each in (pictures.first, pictures.last) if each is not None]
        shown = shown or [each for each in (pictures.reference,) if each is not None]
        if self._clip_vision is None or not shown:
            return None
        encoder, frames = self._clip_vision, torch.cat(shown)[:, :, 0]
        tokens = once_more(lambda: encoder.encode(frames), "encoding a picture")
        return tokens.flatten(0, 1)[None].to(self.settings.device)

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        settings = self.settings
        encoder = self._text_encoder or load_text_encoder(
            self.files.text_encoder,
            device=settings.device,
            num_tokens=self.config.text_tokens,
            keep=settings.keep_loaded and settings.ram_budget_gib is None,
        )
        self._text_encoder = encoder if settings.keep_loaded else None
        return once_more(lambda: encoder.encode(prompts), "encoding the prompts")

    def _denoise(self, request: WanRequest, conditions: Conditions, sigmas: Tensor) -> Tensor:
        assert self.plan is not None and request.num_steps is not None
        device = self.settings.device
        num_latents, height, width = self.plan.work.latent_size
        before = int(request.reference is not None)  # latent frames that are no part of the video
        in_noise = before if conditions.extras.vace_frames else 0  # the other's tokens are beside it
        shape = (1, self.config.out_channels, num_latents - before + in_noise, height, width)
        generator = torch.Generator().manual_seed(request.seed)  # on the CPU: the same noise on every machine
        noise = torch.randn(shape, generator=generator).to(device)
        levels, shift = sigmas.tolist(), None if request.timesteps is not None else request.shift

        def at_level(sigma: Tensor) -> None:
            moment = moment_of(levels, float(sigma), shift)
            self._at_step(moment.step, len(levels) - 1)
            for model in self.models:
                model.at_moment(moment)

        denoise = self._run.recorded(_Begun(lambda sigma: self._begin(request, conditions, sigma), at_level))
        if conditions.first_frame is not None:
            noise[:, :, :1] = conditions.first_frame

        watch = LatentWatch(self.high.likely_cause(f"guidance of {request.guidance:g}" if request.guided else ""))

        self._at_step(0, len(levels) - 1)
        for model in self.models:
            model.begin_steps()

        def on_step(step: StepInfo) -> None:
            self.progress.update(step.index + 1, step.num_steps)
            self._run.end_step()
            watch.step(step.index, step.num_steps, step.denoised, step.x)

        latent = select_sampler(request.sampler)(denoise, noise, sigmas, on_step, generator)
        self._stop()
        if conditions.first_frame is not None:
            latent[:, :, :1] = conditions.first_frame
        return latent[:, :, in_noise:]

    def _at_step(self, step: int, num_steps: int) -> None:
        for model in self.models:
            model.at_step(step, num_steps)

    def _begin(self, request: WanRequest, conditions: Conditions, sigma: Tensor) -> Denoiser:
        """The models at work, from this noise level on."""
        self.progress.begin("load")
        expert: Expert = "high"
        if self.low is not None and request.boundary is not None and not is_high_noise(sigma, request.boundary):
            expert = "low"
        self._start(*((self.high, self.low) if expert == "high" or self.low is None else (self.low, self.high)))
        self.progress.begin("denoise")
        return self._denoiser(request, conditions, expert)

    def _denoiser(self, request: WanRequest, conditions: Conditions, expert: Expert) -> Denoiser:
        assert request.guidance is not None
        high_scale = request.guidance if request.guidance_high is None else request.guidance_high
        high = guided(self.high, conditions, high_scale, self.settings.joins_guidance)
        if self.low is None:
            return high
        assert request.boundary is not None
        low = guided(self.low, conditions, request.guidance, self.settings.joins_guidance)

        def switch(expert: str) -> None:
            # one expert's RAM at a time
            assert self.low is not None
            gone, wanted = (self.high, self.low) if expert == "low" else (self.low, self.high)
            self.plan = gone.plan  # leaner than at first, if the device ran out of memory
            self._start(wanted, gone)

        return ExpertSwitch(high, low, request.boundary, on_switch=switch, loaded=expert)

    def _decode(self, latent: Tensor, plan: MemoryPlan) -> Iterator[Tensor]:
        """Frames as they come; where the device runs out of memory, what is missing is decoded in strips."""
        self.progress.begin("decode")
        if self._draft is not None:
            yield from self._draft.frames(latent, self.settings, self.progress.update)
            return
        with self._vae_at_work("decoder") as vae:
            decoders = self.decoders(vae)

            def frames(way: DecodeWay) -> Iterator[Tensor]:
                return map(to_uint8, decoders.pieces(latent, way, self.progress.update, to_levels))

            yield from pieces_fitting(decoders.ways(plan), frames, "decoding")

    def decoders(self, vae: WanVAE) -> Decoders:
        """How the latent is decoded, by this decoder on the first card."""
        team = None if self.high.several is None else self.high.several.team
        return Decoders(vae, self._opened_vae, self.settings, team)

    def _vae_at_work(self, half: Half) -> AbstractContextManager[WanVAE]:
        """Half of the VAE on the device; in RAM afterwards if it is kept, and then all of it."""
        settings = self.settings

        def load() -> WanVAE:
            if self._vae is None:
                only = None if settings.keep_loaded else half
                vae = self._opened_vae.build(settings.compute_dtype, settings.device, only)
                self._vae = vae if settings.keep_loaded else None
                return vae
            try:
                return self._vae.to(settings.device)
            except RuntimeError:  # what has moved goes back: nothing else would free it
                self._vae.to("cpu")
                raise

        return at_work(load, keep=settings.keep_loaded)

    def _start(self, model: StreamedWan, other: StreamedWan | None) -> None:
        """Start an expert in place of the other, whose host memory it takes where their layouts are the same."""
        assert self.plan is not None
        if other is not None:
            other.stop()
            if self.plan.host.from_disk or model.giver() is not other:
                other.release()
        model.start_fitting(self.plan, self.record.add_spans)
        self.plan = model.plan
        self.record.uses(model)

    def _stop(self) -> None:
        for model in (self.high, self.low):
            if model is None:
                continue
            if self.settings.keep_loaded or self.settings.keep_model:
                model.stop()
            else:
                model.release()
        torch.cuda.empty_cache()


class _Begun:
    """A Denoiser whose models are started when it is first asked: a run whose steps are all there needs none.

    `at_level` is told of the noise level before each call.
    """

    def __init__(self, begin: Callable[[Tensor], Denoiser], at_level: Callable[[Tensor], None]) -> None:
        self._begin, self._at_level = begin, at_level
        self._denoise: Denoiser | None = None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self._denoise is None:
            self._denoise = self._begin(sigma)
        self._at_level(sigma)
        return self._denoise(x, sigma)
