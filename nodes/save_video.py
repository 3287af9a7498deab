"""A latent straight to a video file: its frames are encoded as they are decoded, and never lie in RAM together."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..video.codecs import CODECS, H264, available_codecs
from ..video.writer import check_rate
from .bridge import host
from .bridge.decoding import decode_frames, num_frames
from .bridge.saving import NewVideo, sound_of
from .decode import save_latent
from .inputs import ADVANCED, keep_latent_input, latent_input, tile_input, vae_input


class SaveVideo(io.ComfyNode):
    """A Wan or FramePack latent to a video file in the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMSaveVideo",
            display_name="Save Video (Low VRAM)",
            description="Decodes a latent and writes the frames to a video file as they are made: no frames gather in "
            "RAM, so that length costs none. Instead of VAE Decode, Create Video and Save Video. The file has the "
            "workflow in it: drop it on the page.",
            search_aliases=["save mp4", "export video", "video combine", "vae decode", "h264", "hevc", "av1"],
            is_output_node=True,
            inputs=[
                latent_input(),
                vae_input(),
                io.Audio.Input("audio", optional=True, tooltip="Sound, cut to the video's length."),
                io.String.Input(
                    "filename_prefix", default="video/LowVRAM",
                    tooltip="Of the file in the output folder; a number follows, and no file is replaced.",
                ),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=240.0, step=0.01,
                    tooltip="Frames a second: 16 for Wan 2.1 and 2.2 14B, 24 for TI2V 5B, 30 for FramePack.",
                ),
                io.Combo.Input(
                    "codec", options=[codec.title for codec in available_codecs()], default=H264.title,
                    tooltip="H.264 plays everywhere. HEVC and AV1 files are smaller; not all browsers and players "
                    "know them.",
                ),
                io.Int.Input(
                    "crf", default=16, min=0, max=63,
                    tooltip="Quality: lower is better and larger. H.264 looks like the original at about 16, HEVC at "
                    "20 (both up to 51), AV1 at 25.",
                ),
                tile_input("As in Decode Video (Tiled, Low VRAM). 0: whole frames if they fit, else what does."),
                keep_latent_input(ADVANCED),
            ],
            outputs=[io.Video.Output("video", tooltip="The saved video; of several, the first.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        samples: dict[str, Any],
        vae: Any,
        filename_prefix: str,
        fps: float,
        codec: str,
        crf: int,
        tile_size: int,
        keep_latent: bool,
        audio: Any = None,
    ) -> io.NodeOutput:
        check_rate(fps)
        latent: Tensor = samples["samples"]
        wanted = next(each for each in CODECS if each.title == codec)
        wanted.check(crf)
        seconds = num_frames(vae, latent) / fps
        tags, sounds = host.workflow_tags(cls.hidden), sound_of(audio, len(latent), seconds)
        if keep_latent:
            save_latent(latent)
        paths = []
        for video, sound in zip(latent.split(1), sounds, strict=True):
            new = NewVideo(filename_prefix, fps, wanted, crf, tags, sound)
            paths.append(new.write(decode_frames(vae, video, tile_size)))
        return io.NodeOutput(
            InputImpl.VideoFromFile(str(paths[0])), ui=ui.PreviewVideo([host.saved_result(path) for path in paths])
        )
