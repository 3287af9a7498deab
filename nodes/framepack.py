"""FramePack's sampler: a video section by section, kept on disk as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import InputImpl, io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..framepack.request import NUM_STEPS, SAMPLERS
from ..framepack.run.run import FramePackRun
from ..video.growing_video import GrowingVideo
from ..video.tags import Tags
from .bridge import host
from .bridge.framepack_request import LOADER, SamplerInputs
from .bridge.framepack_run import comfy_run_host, pausing, run_places
from .bridge.page import showing_nodes
from .framepack_inputs import EndImage
from .inputs import ADVANCED

VIDEO_SLOT = 1
NO_VIDEO = (
    "FramePack Sampler (Low VRAM) saves a video only with a VAE connected and one_frame_index 0: connect "
    "hunyuan_video_vae, or decode the samples output with Decode Video (Tiled, Low VRAM)"
)


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
            search_aliases=[
                "framepack", "framepack f1", "image to video", "long video", "extend video", "continue video",
            ],
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
                io.Int.Input("steps", default=NUM_STEPS, min=1, max=200, tooltip="Per section. 25 to 30 are usual."),
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
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=host.fixed_seed(),
                    tooltip="The same seed and settings make the same video; resuming needs them.",
                ),
                io.Boolean.Input(
                    "use_teacache", default=True,
                    tooltip="Skips steps that change little: about 1.5 times as fast, slightly less exact.",
                ),
                io.Float.Input(
                    "teacache_rel_l1_thresh", default=0.15, min=0.0, max=1.0, step=0.01,
                    tooltip="How much change is little. Higher skips more.",
                ),
                io.Float.Input(
                    "gpu_memory_preservation", default=0.0, min=0.0, max=128.0, step=0.25,
                    tooltip="GiB of VRAM that stay free for others: a hard limit, beside Block Swap's if that is "
                    "tighter. 0: planned from what is free, or as Block Swap says.",
                ),
                io.Combo.Input("sampler", options=list(SAMPLERS), default="unipc_bh1", tooltip="FramePack's first."),
                io.Float.Input(
                    "denoise_strength", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="With initial_samples: 1 makes a new video, 0 keeps the given one.",
                ),
                io.Float.Input(
                    "cfg_rescale", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="With cfg above 1: brings contrast back.", extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "width", default=640, min=64, max=4096, step=16,
                    tooltip="Used only without a start latent.", extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "height", default=608, min=64, max=4096, step=16,
                    tooltip="Used only without a start latent.", extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "one_frame_index", default=0, min=0, max=1000,
                    tooltip="0: a video. N: a single picture, N latents after the start image.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "resume", default=True,
                    tooltip="Sections are kept in output/framepack, and the same request goes on where it stopped.",
                ),
                io.String.Input(
                    "filename_prefix", default="video/FramePack", tooltip="Of the growing video, in the output folder."
                ),
                io.Float.Input(
                    "image_embed_strength", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="How much the start image's features (image_embeds) count. Lower leaves the prompt more "
                    "freedom.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                io.Latent.Output("samples", tooltip="The whole video's latents."),
                io.Video.Output("video", tooltip="The saved video; only with a VAE, and not of a single picture."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, **inputs: Any) -> io.NodeOutput:
        tags, shown_in = host.workflow_tags(cls.hidden), showing_nodes(cls.hidden, VIDEO_SLOT)
        videos = [_make(request, tags, shown_in) for request in SamplerInputs(model, **inputs).videos()]
        made = {"samples": torch.cat([samples for samples, _ in videos])}
        films = [film for _, film in videos if film is not None]
        if not films:
            return io.NodeOutput(made, ExecutionBlocker(NO_VIDEO))
        # a node that shows the film leaves the sampler's place to its previews; it is given the first of several
        shown = None if shown_in and len(films) == 1 else ui.PreviewVideo([host.saved_result(film) for film in films])
        return io.NodeOutput(made, InputImpl.VideoFromFile(str(films[0])), ui=shown)


def _make(request: SamplerInputs, tags: Tags, shown_in: Sequence[str]) -> tuple[Tensor, Path | None]:
    """One video's latents, and its file where it has one."""
    sampling = request.sampling()
    vae = request.vae if sampling.one_frame is None else None
    run_host = comfy_run_host(request, vae)
    places = run_places(vae, request.resume and run_host.can_resume, request.filename_prefix, tags, shown_in)
    with FramePackRun.open(run_host, sampling, request.inputs(), places) as run, pausing(run):
        samples = request.patcher.model.process_latent_out(run.make())
    return samples, run.output.video if isinstance(run.output, GrowingVideo) else None
