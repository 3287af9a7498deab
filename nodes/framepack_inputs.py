"""Nodes that prepare what FramePack Sampler takes: size, timed prompts, an end image."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io
from torch import Tensor

from ..framepack.buckets import nearest_bucket
from ..framepack.request import Interpolation
from ..framepack.timed_prompts import parse_timed_prompt
from .bridge import host
from .bridge.framepack_conditioning import EndImageOptions, timed_entries

EndImage = io.Custom("LOWVRAM_END_IMAGE")


class NearestBucket(io.ComfyNode):
    """The size of a video that FramePack was trained with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMFramePackNearestBucket",
            display_name="FramePack Find Nearest Bucket",
            description="The width and height that FramePack knows best for a picture's aspect.",
            search_aliases=["framepack resolution", "bucket", "find nearest bucket"],
            inputs=[
                io.Image.Input("image", tooltip="The start image."),
                io.Int.Input(
                    "base_resolution", default=640, min=64, max=2048, step=16,
                    tooltip="640 is what FramePack was trained with; 480 or 512 are faster and take less memory.",
                ),
            ],
            outputs=[io.Int.Output("width"), io.Int.Output("height")],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, base_resolution: int) -> io.NodeOutput:
        return io.NodeOutput(*nearest_bucket(image.shape[2], image.shape[1], base_resolution))


class TimedPrompts(io.ComfyNode):
    """Prompts that change along the video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMFramePackTimedPrompt",
            display_name="FramePack Timed Prompt",
            description="A prompt whose parts in brackets hold for a time: [2s: she waves] from 2 s on, "
            "[1s-3s: she sings] from 1 s to 3 s. Text outside brackets holds at all other times.",
            search_aliases=["timestamped prompt", "prompt schedule", "timed prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip="Load CLIP (Dual), type hunyuan_video."),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True,
                    default="[0s: The woman stands still] [2s: She waves at the camera]",
                    tooltip="Times are seconds of the finished video. A section (about 1.2 s) has one prompt.",
                ),
                io.Float.Input(
                    "cross_fade", default=0.0, min=0.0, max=60.0, step=0.1,
                    tooltip="Seconds over which one prompt turns into the next. 0: at once.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip: Any, text: str, cross_fade: float) -> io.NodeOutput:
        return io.NodeOutput(timed_entries(clip, parse_timed_prompt(text, cross_fade)))


class FramePackEndImage(io.ComfyNode):
    """The picture that a video goes to."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMFramePackEndImage",
            display_name="FramePack End Image",
            description="Makes the video end at a picture. Every section knows where it is heading, not the last only.",
            search_aliases=["end frame", "last frame", "first last frame framepack"],
            inputs=[
                io.Latent.Input("latent", optional=True, tooltip="The end image, by VAE Encode, of the start's size."),
                io.ClipVisionOutput.Input(
                    "image_embeds", optional=True, tooltip="The end image, by CLIP Vision Encode with crop none.",
                ),
                io.Combo.Input(
                    "embed_interpolation", options=list(get_args(Interpolation)), default="linear",
                    tooltip="linear: sections glide from the start's features to the end's. weighted_average: all see "
                    "both, the start's by start_embed_strength. disabled: only the start's.",
                ),
                io.Float.Input(
                    "start_embed_strength", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="How much the start image's features count: with weighted_average the end's get the rest. "
                    "Without effect with linear where both pictures have features.",
                ),
            ],
            outputs=[EndImage.Output("end_image")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        embed_interpolation: Interpolation,
        start_embed_strength: float,
        latent: dict[str, Any] | None = None,
        image_embeds: Any = None,
    ) -> io.NodeOutput:
        if latent is None and image_embeds is None:
            raise ValueError(
                "FramePack End Image has no picture: connect the end image by VAE Encode (latent), CLIP Vision Encode "
                "(image_embeds), or both"
            )
        return io.NodeOutput(EndImageOptions(latent, image_embeds, start_embed_strength, embed_interpolation))
