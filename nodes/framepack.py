"""FramePack's sampler: a video section by section, kept on disk as it grows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..framepack.decoding import decode_section
from ..framepack.film import Film
from ..framepack.generation import NOTHING, SPATIAL_STRIDE, Generation, MadeSection
from ..framepack.model import Prompt
from ..framepack.request import Material, ModelIdentity, Sampling, run_settings
from ..framepack.runs import RunStore
from ..framepack.sections import FRAMES_PER_SECOND, Section, num_frames
from ..sampling.solver import StepInfo
from . import host
from .framepack_engine import FramePackEngine
from .framepack_inputs import EndImage, EndImageOptions, timed_prompt_of
from .hunyuan_vae import native_decoder
from .patcher import StreamedModelPatcher
from .patches import patch_identity

logger = logging.getLogger(__name__)

SAMPLERS = ("unipc_bh1", "unipc_bh2", "euler", "dpm++_2m")
LOADER = "Load FramePack Model (Low VRAM)"


class FramePackSampler(io.ComfyNode):
    """Makes a FramePack video and keeps every section as soon as it is done."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMFramePackSampler",
            display_name="FramePack Sampler (Low VRAM)",
            description="Makes a video section by section. Every section is saved when it is done, so that the same "
            "request goes on where it stopped after a crash, an interrupt or a restart. With a VAE connected the "
            "video file grows section by section, too.",
            search_aliases=["framepack", "framepack f1", "image to video", "long video"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip=f"A MODEL of {LOADER}."),
                io.Conditioning.Input("positive", tooltip="CLIP Text Encode or FramePack Timed Prompt."),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed only where cfg is above 1."),
                io.Latent.Input("start_latent", optional=True, tooltip="The start image, by VAE Encode."),
                io.ClipVisionOutput.Input(
                    "image_embeds", optional=True, tooltip="The start image, by CLIP Vision Encode with crop none."
                ),
                EndImage.Input("end_image", optional=True, tooltip="FramePack End Image: the picture to end at."),
                io.Latent.Input(
                    "initial_samples", optional=True, tooltip="A video to change, by denoise_strength below 1."
                ),
                io.Latent.Input(
                    "extend_samples", optional=True, tooltip="A video to go on from (F1 models), by VAE Encode."
                ),
                io.Vae.Input("vae", optional=True, tooltip="hunyuan_video_vae: the video is saved as it grows."),
                io.Float.Input(
                    "total_second_length", default=5.0, min=0.1, max=600.0, step=0.1,
                    tooltip="Of the video, at 30 frames a second; rounded to whole sections.",
                ),
                io.Int.Input(
                    "latent_window_size", default=9, min=1, max=33,
                    tooltip="Latents per section: 4 frames each. 9 is what FramePack was trained with; fewer take "
                    "less memory.",
                ),
                io.Int.Input("steps", default=30, min=1, max=200, tooltip="Per section. 25 to 30 are usual."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=30.0, step=0.1,
                    tooltip="FramePack is distilled: 1. Above 1 the negative prompt counts, and steps take twice as "
                    "long.",
                ),
                io.Float.Input(
                    "guidance_scale", default=10.0, min=0.0, max=32.0, step=0.1, tooltip="The distilled guidance."
                ),
                io.Float.Input(
                    "shift", default=0.0, min=0.0, max=100.0, step=0.1, tooltip="Of the noise levels. 0: by the size."
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                    tooltip="The same seed and settings make the same video.",
                ),
                io.Boolean.Input(
                    "use_teacache", default=True,
                    tooltip="Skips steps that change little: about twice as fast, slightly less exact.",
                ),
                io.Float.Input(
                    "teacache_rel_l1_thresh", default=0.15, min=0.0, max=1.0, step=0.01,
                    tooltip="How much change is little. Higher skips more.",
                ),
                io.Float.Input(
                    "gpu_memory_preservation", default=0.0, min=0.0, max=128.0, step=0.25,
                    tooltip="GB of VRAM that stay free for others: a hard limit. 0: planned from what is free, or as "
                    "Block Swap says.",
                ),
                io.Combo.Input("sampler", options=list(SAMPLERS), default="unipc_bh1", tooltip="FramePack's first."),
                io.Float.Input(
                    "denoise_strength", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="With initial_samples: 1 makes a new video, 0 keeps the given one.",
                ),
                io.Float.Input(
                    "cfg_rescale", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="With cfg above 1: brings contrast back.", extra_dict={"advanced": True},
                ),
                io.Int.Input(
                    "width", default=640, min=64, max=4096, step=16,
                    tooltip="Used only without a start latent.", extra_dict={"advanced": True},
                ),
                io.Int.Input(
                    "height", default=608, min=64, max=4096, step=16,
                    tooltip="Used only without a start latent.", extra_dict={"advanced": True},
                ),
                io.Int.Input(
                    "one_frame_index", default=0, min=0, max=1000,
                    tooltip="0: a video. N: a single picture, N latents after the start image.",
                    extra_dict={"advanced": True},
                ),
                io.Boolean.Input(
                    "resume", default=True,
                    tooltip="Sections are kept in output/framepack, and the same request goes on where it stopped.",
                ),
                io.String.Input(
                    "filename_prefix", default="video/FramePack", tooltip="Of the growing video, in the output folder."
                ),
            ],
            outputs=[
                io.Latent.Output("samples", tooltip="The whole video's latents."),
                io.Video.Output("video", tooltip="The saved video; only with a VAE."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list[Any],
        width: int,
        height: int,
        gpu_memory_preservation: float,
        resume: bool,
        filename_prefix: str,
        negative: list[Any] | None = None,
        start_latent: dict[str, Any] | None = None,
        image_embeds: Any = None,
        end_image: EndImageOptions | None = None,
        initial_samples: dict[str, Any] | None = None,
        extend_samples: dict[str, Any] | None = None,
        vae: Any = None,
        **widgets: Any,
    ) -> io.NodeOutput:
        patcher = framepack_model(model)
        if gpu_memory_preservation:
            patcher = patcher.with_options(
                vram_budget_gb=host.vram_without(gpu_memory_preservation, patcher.load_device)
            )
        engine = cast(FramePackEngine, patcher.engine)
        latents = _Latents(patcher)
        start = latents.given(start_latent, 1)
        timed, prompts = timed_prompt_of(positive)
        end = end_image or EndImageOptions(None, None, 1.0, "linear")
        given = latents.given(extend_samples)
        pictured = given if start is None else start
        size = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
        material = Material(
            latent_size=size if pictured is None else (pictured.shape[3], pictured.shape[4]),
            timed=timed,
            prompts={name: _prompt(text, options) for name, text, options in prompts},
            negative=None if negative is None else _prompt(*negative[0]),
            start=start,
            end=latents.given(None if end.samples is None else {"samples": end.samples}, 1),
            start_features=None if image_embeds is None else _features(image_embeds.last_hidden_state),
            end_features=None if end.features is None else _features(end.features),
            start_strength=end.start_strength,
            interpolation=end.interpolation,
            initial=latents.given(initial_samples),
            given=given,
        )
        material = _with_features(material, engine)
        sampling = _sampling(engine, widgets)
        run = _Run(patcher, engine, sampling, material)
        with run.store(resume) as store, run.film(store, vae, filename_prefix) as film:
            samples = run.make(store, film, vae)
        path = None if film is None else film.path
        return io.NodeOutput({"samples": latents.made(samples)}, host.video(path), ui=_shown(path))


def framepack_model(model: Any) -> StreamedModelPatcher:
    """The MODEL as ours; ValueError for any other."""
    if isinstance(model, StreamedModelPatcher) and isinstance(model.engine, FramePackEngine):
        return model
    raise ValueError(f"FramePack Sampler (Low VRAM) samples models of {LOADER}: load a FramePack file with that node")


def _sampling(engine: FramePackEngine, widgets: dict[str, Any]) -> Sampling:
    return Sampling(
        seconds=widgets["total_second_length"],
        mode=engine.streamed.mode,
        window=widgets["latent_window_size"],
        num_steps=widgets["steps"],
        sampler=widgets["sampler"],
        guidance=widgets["guidance_scale"],
        cfg=widgets["cfg"],
        cfg_rescale=widgets["cfg_rescale"],
        shift=widgets["shift"],
        seed=widgets["seed"],
        cache_threshold=widgets["teacache_rel_l1_thresh"] if widgets["use_teacache"] else None,
        strength=widgets["denoise_strength"],
        one_frame=widgets["one_frame_index"] or None,
    )


class _Run:
    """One execution: the model loaded, sections made, kept and decoded."""

    def __init__(self, patcher: StreamedModelPatcher, engine: FramePackEngine, sampling: Sampling, material: Material):
        self.patcher, self.engine, self.sampling, self.material = patcher, engine, sampling, material
        self.sections = material.sections(sampling)
        for prompt in material.timed.unheard(self.sections):
            logger.warning("the prompt %r holds for less than a section, and is not heard", prompt)

    @contextmanager
    def store(self, resume: bool) -> Iterator[RunStore | None]:
        if not resume:
            yield None
            return
        streamed = self.engine.streamed
        identity = ModelIdentity(
            streamed.checkpoint.path.name,
            sum(info.nbytes for info in streamed.checkpoint.tensors.values()),
            tuple(patch_identity(self.patcher.patches)),
            streamed.arithmetic,
        )
        settings = run_settings(self.sampling, self.material, identity)
        with RunStore.open(host.output_folder("framepack"), settings, len(self.sections)) as store:
            height, width = self.material.latent_size
            store.check_room(4 * 16 * (self.sampling.window + 1) * height * width)
            if store.completed:
                found = store.completed, len(self.sections)
                logger.info("%s: %d of %d sections are there already, of an earlier run", store.folder, *found)
            yield store

    @contextmanager
    def film(self, store: RunStore | None, vae: Any, prefix: str) -> Iterator[Film | None]:
        if vae is None or self.sampling.one_frame is not None:
            yield None
            return
        folder = host.temporary_path(f"framepack_film_{uuid4().hex}") if store is None else store.folder / "film"
        path = _film_path(folder, prefix)
        yield Film(folder, path, FRAMES_PER_SECOND, grows="front" if self.sections[0].prepend else "back")

    def make(self, store: RunStore | None, film: Film | None, vae: Any) -> Tensor:
        """All latents of the video, in its order."""
        host.load_model(self.patcher)
        self.engine.begin_run()
        try:
            num_missing = len(self.sections) - (0 if store is None else store.completed)
            conditions = NOTHING
            if num_missing:
                conditions = self.engine.prepared(self.sampling, self.material, self.sections)
            preview = host.SamplingPreview(self.patcher, max(1, num_missing) * self.sampling.num_steps)

            def on_step(section: Section, step: StepInfo) -> None:
                preview.step(step.denoised)

            generation = Generation(
                self.engine.velocity,
                self.sampling,
                self.material,
                self.sections,
                conditions,
                self.engine.device,
                store,
                on_step,
            )
            num_before = self._add_given(film, vae)
            made: MadeSection | None = None
            for made in generation.run():
                if film is not None and made.section.number + num_before >= film.num_sections:
                    self._decode(made.to_decode, film, vae)
            assert made is not None
            if store is not None:
                store.finish()
            return made.video
        finally:
            self.engine.end_run()

    def _add_given(self, film: Film | None, vae: Any) -> int:
        """Put the video to extend before its continuation; returns how many of the film's sections that is.

        A video shorter than a section is a part of the first section's frames instead.
        """
        given = self.material.given
        if film is None or given is None or given.shape[2] < self.sampling.window:
            return 0
        if not film.num_sections:
            self._decode(given, film, vae)
        return 1

    def _decode(self, latents: Tensor, film: Film, vae: Any) -> None:
        with native_decoder(vae) as (decoder, room):
            frames = decode_section(decoder, latents, room, host.check_interrupt)
        # so many frames are shared with the section before and with the one after
        film.add(frames, num_frames(self.sampling.window))


class _Latents:
    """Latents as ComfyUI has them and as the network does."""

    def __init__(self, patcher: StreamedModelPatcher):
        self._model = patcher.model

    def given(self, latent: dict[str, Any] | None, num_frames: int | None = None) -> Tensor | None:
        """The network's fp32 latents `[1, 16, T, h, w]` on the CPU; of a picture, one frame."""
        if latent is None:
            return None
        samples: Tensor = latent["samples"]
        if samples.ndim != 5 or samples.shape[1] != 16:
            raise ValueError(
                f"a latent has the shape {list(samples.shape)}; FramePack takes [1, 16, frames, height, width]: encode "
                "with hunyuan_video_vae"
            )
        samples = self._model.process_latent_in(samples[:1].float().cpu())
        return samples if num_frames is None else samples[:, :, :num_frames]

    def made(self, samples: Tensor) -> Tensor:
        return self._model.process_latent_out(samples)


def _prompt(text: Tensor, options: dict[str, Any]) -> Prompt:
    pooled = options.get("pooled_output")
    if pooled is None:
        raise ValueError(
            "a prompt has no pooled output: encode it with DualCLIPLoader (type hunyuan_video: llava_llama3 and clip_l)"
        )
    mask = options.get("attention_mask")
    text = text[:1] if mask is None else text[:1, mask[0].bool()]
    return Prompt(text.float().cpu(), pooled[:1].float().cpu())


def _features(features: Tensor) -> Tensor:
    return features[:1].float().cpu()


def _with_features(material: Material, engine: FramePackEngine) -> Material:
    """Zeros for the picture's features where there is no picture: the network always has them."""
    if material.start_features is not None or material.end_features is not None:
        return material
    return replace(material, start_features=torch.zeros(1, 729, engine.streamed.config.image_dim))


def _film_path(folder: Path, prefix: str) -> Path:
    """Where the film is or shall be: a run that goes on keeps its file."""
    note = folder / "path.txt"
    if note.is_file() and (known := Path(note.read_text(encoding="utf-8"))).is_file():
        return known
    folder.mkdir(parents=True, exist_ok=True)
    path = host.output_path(prefix, ".mp4")
    note.write_text(str(path), encoding="utf-8")
    return path


def _shown(path: Path | None) -> Any:
    return None if path is None else ui.PreviewVideo([host.saved_result(path)])
