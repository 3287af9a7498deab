"""Tags of a video file, such as the workflow that made it, on their way into ffmpeg.

They travel in a file of ffmpeg's own text format (https://ffmpeg.org/ffmpeg-formats.html#Metadata-2): a workflow may be
longer than a command line may be (32 KB on Windows), and other processes see command lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Tags = Mapping[str, str]

BYTES_PER_TAG = 128  # of an MP4's boxes around a tag, at most


def write_tags(tags: Tags, path: Path) -> Path:
    """Have `path` hold tags as ffmpeg's `-f ffmetadata` reads them, for this user alone. OSError as the system's."""
    lines = [";FFMETADATA1", *(f"{_escaped(name)}={_escaped(value)}" for name, value in tags.items()), ""]
    path.touch(mode=0o600)
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace", newline="\n")
    return path


def tag_options(tags: Tags, index: int, suffix: str, flags: tuple[str, ...] = ()) -> list[str]:
    """ffmpeg's options by which a file that ends in `suffix` gets the tags of input `index`, where there are any.

    `flags` are further ones of an MP4. There, tags of names that Apple does not know need one of their own.
    """
    source = ["-map_metadata", str(index)] if tags else []
    if suffix.lower() not in (".mp4", ".mov"):
        return source
    wanted = [*(["use_metadata_tags"] if tags else []), *flags]
    return [*source, "-movflags", "+" + "+".join(wanted)] if wanted else source


def index_bytes(tags: Tags) -> int:
    """What an MP4's index takes for them, at most."""
    return sum(len(name.encode()) + len(value.encode(errors="replace")) + BYTES_PER_TAG for name, value in tags.items())


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "=;#\\\n" else character for character in text.replace("\0", ""))
