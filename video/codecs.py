"""How a video's pictures are encoded: what people call the codec, and ffmpeg's encoders for it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache

import imageio_ffmpeg

ASK_SECONDS = 20.0  # for a list that takes a tenth of one


@dataclass(frozen=True)
class Codec:
    """A codec; `encoders` are ffmpeg's for it, the best first, each with its own options.

    `crf` runs from 0 to `max_crf`; `good_crf` looks like the original to most. `tag` is what an MP4 calls its stream
    where players are particular.
    """

    title: str
    encoders: tuple[tuple[str, tuple[str, ...]], ...]
    max_crf: int
    good_crf: int
    tag: str = ""

    def check(self, crf: int) -> None:
        """ValueError, before frames are made, where this crf or ffmpeg cannot be used."""
        if not 0 <= crf <= self.max_crf:
            raise ValueError(
                f"crf is {crf}; {self.title} takes 0 (best) to {self.max_crf}, and {self.good_crf} looks like the "
                "original to most"
            )
        if self not in available_codecs():
            names = " or ".join(name for name, _ in self.encoders)
            raise ValueError(
                f"this ffmpeg ({imageio_ffmpeg.get_ffmpeg_exe()}) has no {names}, which encodes {self.title}: choose "
                f"{H264.title}, or update it: pip install -U imageio-ffmpeg"
            )

    def options(self, crf: int, suffix: str) -> list[str]:
        """ffmpeg's options that encode pictures so, into a file that ends in `suffix`."""
        encoder, own = self.encoders[0]
        if len(self.encoders) > 1:
            there = _encoders(imageio_ffmpeg.get_ffmpeg_exe())
            encoder, own = next((each for each in self.encoders if each[0] in there), self.encoders[0])
        tag = ["-tag:v", self.tag] if self.tag and suffix.lower() in (".mp4", ".mov") else []
        return ["-c:v", encoder, "-crf", str(crf), *own, *tag]


H264 = Codec("H.264", (("libx264", ()),), max_crf=51, good_crf=16)
HEVC = Codec("HEVC", (("libx265", ("-x265-params", "log-level=error")),), max_crf=51, good_crf=20, tag="hvc1")
AV1 = Codec(
    "AV1",
    # what each encodes in about the time that x264 takes
    (("libsvtav1", ("-preset", "8")), ("libaom-av1", ("-cpu-used", "8", "-row-mt", "1"))),
    max_crf=63,
    good_crf=25,
)
CODECS = (H264, HEVC, AV1)


def available_codecs() -> tuple[Codec, ...]:
    """Those that the ffmpeg here can encode; H.264 where it cannot be asked, as starting it says what is wrong."""
    try:
        there = _encoders(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:  # no ffmpeg
        return (H264,)
    return tuple(codec for codec in CODECS if codec is H264 or any(name in there for name, _ in codec.encoders))


@cache
def _encoders(program: str) -> frozenset[str]:
    """The names of an ffmpeg's video encoders; none where it does not say."""
    try:
        answer = subprocess.run(
            [program, "-hide_banner", "-encoders"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(re.findall(r"^ V\S{5} (\S+)", answer.stdout.decode(errors="replace"), re.MULTILINE))
