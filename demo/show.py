"""What a newcomer sees first: a few prompts as one video and one contact sheet."""

from __future__ import annotations

import io
import time
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from ..runtime.progress import Progress
from ..system.atomic_files import write_file
from ..video.writer import VideoWriter, check_writable
from .files import make_clip, open_demo

PROMPTS = (
    "a red ball moves left",
    "a blue square moves right in the snow",
    "a yellow triangle moves up at night",
    "a green ball moves quickly down",
    "a pink square moves slowly left at night",
    "a cyan triangle moves right",
)
COLUMNS = 3
ZOOM = 3
FRAMES_SHOWN = 6
CAPTION_HEIGHT = 18


def make_demo(output: Path, seed: int, device: torch.device, progress: Progress) -> str:
    """Write `output` (mp4) and the contact sheet beside it (png); returns what was made and what it used."""
    check_writable(output)
    began = time.monotonic()
    pipeline = open_demo(device)
    progress.begin("demo")
    clips = []
    for number, prompt in enumerate(PROMPTS):
        clips.append(make_clip(pipeline, prompt, seed + number))
        progress.update(number + 1, len(PROMPTS))
    progress.end()
    grid = rearrange(torch.stack(clips), "(r c) t h w d -> t (r h) (c w) d", c=COLUMNS)
    with VideoWriter(output, pipeline.defaults.fps) as writer:
        writer.write(_zoomed(grid))
    sheet = output.with_suffix(".png")
    _save_sheet(sheet, clips)
    seconds = time.monotonic() - began
    return (
        f"{output}: {len(clips)} clips of {clips[0].shape[0]} frames, {sheet}: the same as a contact sheet\n"
        f"{seconds:.1f} s in all on {device}; the last clip used:\n{pipeline.report().table()}"
    )


def _save_sheet(path: Path, clips: list[Tensor]) -> None:
    """A row per prompt under its words, frames from first to last."""
    num_frames, height, width, _ = clips[0].shape
    shown = [round(i * (num_frames - 1) / (FRAMES_SHOWN - 1)) for i in range(FRAMES_SHOWN)]
    cell_height, cell_width = height * ZOOM // 2, width * ZOOM // 2
    row_height = cell_height + CAPTION_HEIGHT
    sheet = Image.new("RGB", (FRAMES_SHOWN * cell_width, len(clips) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (prompt, clip) in enumerate(zip(PROMPTS, clips, strict=True)):
        draw.text((4, row * row_height + 3), prompt, fill="black")
        for column, index in enumerate(shown):
            frame = Image.fromarray(clip[index].numpy()).resize((cell_width, cell_height), Image.Resampling.BICUBIC)
            sheet.paste(frame, (column * cell_width, row * row_height + CAPTION_HEIGHT))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_file(path, buffer.getvalue())


def _zoomed(video: Tensor) -> Tensor:
    """Frames enlarged by whole pixels: small clips are hard to watch."""
    return video.repeat_interleave(ZOOM, dim=1).repeat_interleave(ZOOM, dim=2)
