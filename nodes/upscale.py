"""FlashVSR: a finished video made larger."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..attention.select import ATTENTION_MODES
from ..runtime.settings import DTYPES
from ..system.output_lock import OutputLock
from ..wanvideo.upscale.colour import COLOUR_FIXES
from ..wanvideo.upscale.film import GOOD_CRF, FilmPlace, UpscaleFilm
from ..wanvideo.upscale.request import LOCAL_RANGES, SCALES, VERSIONS, UpscaleRequest, files_of
from ..weights.linear.compute import QUANTIZATIONS
from ..weights.lora.file import LoraChoice
from ..weights.lora.sound import check_strengths
from .bridge import host
from .bridge.upscaling import FlashVSR, FlashVSRModel, flashvsr_files, flashvsr_path, source_of, upscaler_at_work
from .inputs import ADVANCED, check_numbers
from .loaders import settings_of
from .lora import lora_stamp

BESIDE = "beside the model"
NO_LORA = "none"


class LoadFlashVSRModel(io.ComfyNode):
    """FlashVSR's four files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMLoadFlashVSRModel",
            display_name="Load FlashVSR Model (Low VRAM)",
            description="Opens FlashVSR's files for Upscale Video (Low VRAM). Their weights are read when a video is "
            "made larger, and stream from RAM while it is.",
            search_aliases=["flashvsr", "upscale model", "video super resolution", "vsr", "low vram"],
            inputs=[
                io.Combo.Input(
                    "model_name", options=flashvsr_files(),
                    tooltip="FlashVSR's transformer: FlashVSR1_1.safetensors, Wan2_1-T2V-1.1_3B_FlashVSR_fp32, "
                    "Wan2_1-T2V-1_3B_FlashVSR_fp32 or diffusion_pytorch_model_streaming_dmd, in "
                    "models/diffusion_models or models/FlashVSR.",
                ),
                io.Combo.Input(
                    "version", options=list(VERSIONS), default="1.1",
                    tooltip="Which FlashVSR the files are of: nothing in them tells.",
                ),
                *(
                    io.Combo.Input(name, options=[BESIDE, *flashvsr_files()], default=BESIDE, tooltip=tip)
                    for name, tip in (
                        ("projection", "LQ_proj_in.safetensors or Wan2_1_FlashVSR_LQ_proj_model_bf16.safetensors."),
                        ("decoder", "TCDecoder.safetensors or Wan2_1_FlashVSR_TCDecoder_fp32.safetensors."),
                        ("prompt", "Prompt.safetensors, FlashVSR's one encoded prompt."),
                    )
                ),
                io.Combo.Input(
                    "compute_dtype", options=list(DTYPES), default="auto", tooltip="As in Load Wan Video Model.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "attention_mode", options=list(ATTENTION_MODES), default="auto",
                    tooltip="Of attention to the prompt, and of all where sparse_ratio is 0.", extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "quantization", options=list(QUANTIZATIONS), default="none",
                    tooltip="As in Load Wan Video Model: fp8 and int8 halve the weights in RAM.", extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "lora_name", options=[NO_LORA, *host.model_files(host.LORA_FOLDER, (".safetensors",))],
                    default=NO_LORA, tooltip="A LoRA in models/loras for the transformer, of Wan 2.1 1.3B.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "lora_strength", default=1.0, min=-100.0, max=100.0, step=0.01,
                    tooltip="1: as it was trained. 0: not at all.", extra_dict=ADVANCED,
                ),
            ],
            outputs=[FlashVSR.Output("flashvsr")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, model_name: str, projection: str, decoder: str, prompt: str, **others: Any) -> str:
        lora = others.get("lora_name", NO_LORA)
        stamps = [lora_stamp(None if lora == NO_LORA else lora)]
        for name in (model_name, projection, decoder, prompt):
            with suppress(ValueError, OSError, AttributeError):  # beside the model, missing, or of another node
                stat = flashvsr_path(name).stat()
                stamps.append(f"{stat.st_size} {stat.st_mtime_ns}")
        return " ".join(stamps)

    @classmethod
    def execute(
        cls,
        model_name: str,
        version: str,
        projection: str,
        decoder: str,
        prompt: str,
        compute_dtype: str,
        attention_mode: str,
        quantization: str,
        lora_name: str = NO_LORA,
        lora_strength: float = 1.0,
    ) -> io.NodeOutput:
        others = (None if name == BESIDE else flashvsr_path(name) for name in (projection, decoder, prompt))
        settings = settings_of(compute_dtype, attention_mode, quantization)
        files = replace(files_of(flashvsr_path(model_name), *others), loras=chosen_lora(lora_name, lora_strength))
        return io.NodeOutput(FlashVSRModel(files, settings, version))


def chosen_lora(name: str, strength: float) -> tuple[LoraChoice, ...]:
    """The LoRA of this name; none where it has no strength. ValueError where it is gone, or for NaN."""
    if name == NO_LORA or not strength:
        return ()
    check_strengths([strength], [name])  # ComfyUI lets NaN by
    return (LoraChoice(host.model_path(name, host.LORA_FOLDER), strength),)


class UpscaleVideo(io.ComfyNode):
    """A video, or pictures, two to four times as large, straight to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMUpscaleVideo",
            display_name="Upscale Video (Low VRAM)",
            description="Makes a video two to four times as large with FlashVSR. Frames come from its file and go to "
            "another as they are made, so that length costs no memory; rate and sound are kept. What was stopped goes "
            "on when it is queued again.",
            search_aliases=["flashvsr", "upscale", "super resolution", "enlarge", "4x", "2x", "vsr"],
            is_output_node=True,
            inputs=[
                FlashVSR.Input("flashvsr", tooltip="Of Load FlashVSR Model (Low VRAM)."),
                io.Video.Input("video", optional=True, tooltip="A video to enlarge; or connect images."),
                io.Image.Input("images", optional=True, tooltip="Frames to enlarge; all of them are in RAM."),
                io.Audio.Input("audio", optional=True, tooltip="Sound for images; a video has its own."),
                io.Combo.Input(
                    "scale", options=[str(scale) for scale in SCALES], default="2", tooltip="How many times as large."
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=host.fixed_seed(),
                    tooltip="The same seed and settings make the same video; resuming needs them.",
                ),
                io.Float.Input(
                    "vram_budget_gb", default=0.0, min=0.0, max=128.0, step=0.25,
                    tooltip="A hard limit. 0: what is free.",
                ),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=240.0, step=0.01, tooltip="Of images; a video keeps its own."
                ),
                io.String.Input(
                    "filename_prefix", default="video/Upscaled",
                    tooltip="Of the file in the output folder; a number follows, and no file is replaced.",
                ),
                io.Int.Input("crf", default=GOOD_CRF, min=0, max=51, tooltip="H.264's quality: lower is better."),
                io.Boolean.Input(
                    "resume", default=True,
                    tooltip="Keeps in output/upscale what a stopped run goes on from: some GB, until all is made.",
                ),
                io.Combo.Input(
                    "colour", options=list(COLOUR_FIXES), default="adain",
                    tooltip="How colours stay those of the small video: by each frame's mean and deviation (adain), by "
                    "its blurred colours (wavelet), or not.", extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "sparse_ratio", default=2.0, min=0.0, max=16.0, step=0.1,
                    tooltip="How much attention sees: 2 is published, 1.5 is faster. 0: all, dense, which its authors "
                    "found to look worse.", extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "local_range", options=[str(each) for each in reversed(LOCAL_RANGES)], default="11",
                    tooltip="9: sharper details; 11: steadier ones.", extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "kept_windows", default=3, min=1, max=8,
                    tooltip="Windows of 8 frames that are remembered, in RAM. Fewer take less of it.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Video.Output("video", tooltip="The saved video.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        flashvsr: FlashVSRModel,
        scale: str,
        seed: int,
        vram_budget_gb: float,
        fps: float,
        filename_prefix: str,
        crf: int,
        resume: bool,
        video: Any = None,
        images: Tensor | None = None,
        audio: Any = None,
        **how: Any,
    ) -> io.NodeOutput:
        request = UpscaleRequest(
            int(scale), seed, flashvsr.version, how["colour"], how["sparse_ratio"], int(how["local_range"]),
            how["kept_windows"],
        )  # fmt: skip
        request.check()
        check_numbers(vram_budget_gb=vram_budget_gb)
        source = source_of(video, images, audio, fps)
        settings = replace(flashvsr.settings, vram_budget_gib=vram_budget_gb or None)
        runs = host.output_folder("upscale") if resume else None
        tags = host.workflow_tags(cls.hidden)
        with upscaler_at_work(replace(flashvsr, settings=settings), source.num_frames) as upscaler:
            film = UpscaleFilm(upscaler, source, request)
            path = _make(film, filename_prefix, FilmPlace(Path(), runs, crf, tags))
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), ui=ui.PreviewVideo([host.saved_result(path)]))


def _make(film: UpscaleFilm, prefix: str, place: FilmPlace) -> Path:
    """The video in the output folder: where a stopped run had begun it, or under a new name."""
    names = host.output_names(prefix, ".mp4")
    for path in names:
        if path.exists() and not film.is_own(place, path):
            continue
        try:
            lock = OutputLock(path)
        except ValueError:  # somebody writes it now
            continue
        try:
            film.make(replace(place, output=path))
        finally:
            lock.release()
        return path
    raise AssertionError("numbers never end")
