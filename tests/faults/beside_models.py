"""What reads files that are no models: pictures, videos, jobs, workflows, and notes of the program's own."""

from __future__ import annotations

import json
import os
import random
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from lowvram_video.attention.backend import AttentionSpec
from lowvram_video.attention.timing import AttentionSize, kept_choices, timed_work
from lowvram_video.batch.results import Results
from lowvram_video.batch.workflow import make_prompt
from lowvram_video.cli.batch_comfyui import EXAMPLES, WorkflowReader
from lowvram_video.cli.batch_jobs import options_reader, read_jobs
from lowvram_video.sampling.caching.tables import published_tables, read_table
from lowvram_video.system.card_profile import DATA_VARIABLE
from lowvram_video.system.kept_choices import FORMAT as TIMES_FORMAT
from lowvram_video.system.output_lock import is_noted, note_output
from lowvram_video.video.pictures import load_image
from lowvram_video.video.reader import read_video, video_rate
from lowvram_video.video.writer import VideoWriter
from PIL import Image

from . import mutations
from .reader import CPU, Make, Reader, mutated, put

WIDTH, HEIGHT = 48, 32
SPEC = AttentionSpec(CPU, torch.bfloat16, 64)
SIZE = AttentionSize(1024, 4)


def beside_models(place: Path) -> Mapping[str, Reader]:
    """All of them; what they are made of is put into `place`."""
    place.mkdir(parents=True)
    pictures = [_picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")]
    (table, *_) = published_tables().values()
    workflow = (EXAMPLES / "demo.json").read_text(encoding="utf-8")
    return {
        "picture": Reader(_one_of(pictures), (lambda path: load_image(path, WIDTH, HEIGHT),)),
        "video": Reader(mutated(_video(place / "v.mp4"), mutations.any_bytes), (take_video,)),
        "jobs": Reader(_jobs, (take_jobs,)),
        "workflow": Reader(_text("w.json", workflow), (take_workflow,)),
        "results of a batch": Reader(_results, (take_results,)),
        "step cache's table": Reader(_text("t.json", table.to_json().decode()), (read_table,)),
        "attention's times": Reader(_times, (take_times,)),
        "note of an output": Reader(_note, (take_note,)),
    }


# --- reading ---------------------------------------------------------------------------------------------


def take_video(path: Path) -> None:
    """Its rate, and its frames."""
    assert video_rate(path) > 0
    assert read_video(path, WIDTH, HEIGHT, 16, first=9).shape[1:] == (HEIGHT, WIDTH, 3)


def take_jobs(path: Path) -> None:
    """Jobs of `generate`; a line that is none is said as a refusal here."""
    _, bad = read_jobs(path, options_reader(), ())
    if bad:
        raise ValueError(f"{path.name}: {bad[0].reason}")


def take_workflow(path: Path) -> None:
    """A job of it, and the prompt that a server is given."""
    read = WorkflowReader(str(path))(1, {"prompt": "a red ball", "output": "a.mp4"})
    try:
        make_prompt(read.job.request["workflow"], {})
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # as the server's worker says it
        raise ValueError(f"{path.name}: {error!r}") from error


def take_results(path: Path) -> None:
    """What a batch that goes on knows of its outputs, and another line."""
    with Results(path) as results:
        results.last(Path("a.mp4"))
        results.add("b.mp4", "made")


def take_times(path: Path) -> None:
    """What was fastest, and another choice kept."""
    with _variable(DATA_VARIABLE, str(path.parent)):
        kept, work = kept_choices({}), timed_work("auto", SPEC, SIZE)
        kept.find(work, SPEC.device)
        kept.keep(work, SPEC.device, "sdpa")
        assert kept.find(work, SPEC.device) == "sdpa"


def take_note(folder: Path) -> None:
    """Whose a video is: damage says nobody's."""
    is_noted(folder / "runs", folder / "a.mp4", "command")


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# --- what they are made of -------------------------------------------------------------------------------


def _text(name: str, plain: str) -> Make:
    """JSON of that name."""

    def make(folder: Path, draw: random.Random) -> Path:
        return put(folder / name, mutations.json_text(plain, draw))

    return make


def _picture(kind: str) -> bytes:
    """One with transparency and a camera's notes where the kind has them."""
    pixels = np.random.default_rng(1).integers(0, 255, (8, 12, 3 if kind == "JPEG" else 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a girl"
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    return file.getvalue()


def _one_of(pictures: list[bytes]) -> Make:
    def make(folder: Path, draw: random.Random) -> Path:
        raw = draw.choice(pictures)
        data = _other_size(draw) if draw.random() < 0.1 else mutations.any_bytes(raw, draw)
        return put(folder / draw.choice(["p.png", "p.jpg", "p.webp", "p"]), data)

    return make


def _other_size(draw: random.Random) -> bytes:
    """A PNG that says it has other sides and depths than its pixels are, its checksum right."""
    sides = (0, 1, 7, 4096, 65535, 2**31 - 1, 2**32 - 1)
    header = struct.pack(
        ">IIBBBBB", draw.choice(sides), draw.choice(sides), draw.choice([1, 8, 16, 99]), draw.randrange(7), 0, 0, 0
    )
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(400))), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _video(path: Path) -> Path:
    with VideoWriter(path, 16) as writer:
        writer.write(torch.randint(0, 255, (9, HEIGHT, WIDTH, 3), dtype=torch.uint8))
    return path


def _jobs(folder: Path, draw: random.Random) -> Path:
    """Some lines, of which some are damaged."""
    job = {
        "model": "wan.safetensors", "prompt": "a red ball", "output": "a.mp4", "width": 48, "height": 32, "steps": 4,
        "lora": "a.safetensors:0.5", "seed": 1, "guidance": 4.5, "overwrite": True, "device": "cpu",
    }  # fmt: skip
    lines = [json.dumps({**job, "output": f"{number}.mp4"}) for number in range(3)]
    at = draw.randrange(3)
    extra = ("\x1b[2J", "a\nb", "cuda:1", "-o", "--help", ["x"], {"x": 1})
    lines[at] = mutations.json_text(lines[at], draw, extra).decode("utf-8", "surrogateescape")
    return put(folder / "jobs.jsonl", "\n".join(lines).encode("utf-8", "surrogateescape"))


def _results(folder: Path, draw: random.Random) -> Path:
    lines = [{"output": "a.mp4", "status": status, "time": 1.0, "key": "x"} for status in ("begun", "made")]
    plain = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    damaged = b"\n".join([plain[: draw.randrange(len(plain))], mutations.json_text(json.dumps(lines[0]), draw)])
    return put(folder / "results.jsonl", damaged if draw.random() < 0.5 else mutations.any_bytes(plain, draw))


def _times(folder: Path, draw: random.Random) -> Path:
    with _variable(DATA_VARIABLE, str(folder)):
        kept_choices({}).keep(timed_work("auto", SPEC, SIZE), SPEC.device, "sage")
    plain = (folder / "attention.json").read_text()
    assert json.loads(plain)["format"] == TIMES_FORMAT
    return put(folder / "attention.json", mutations.json_text(plain, draw))


def _note(folder: Path, draw: random.Random) -> Path:
    run = folder / "runs" / "1"
    run.mkdir(parents=True)
    put(folder / "a.mp4", b"x")
    note_output(run, folder / "a.mp4", "command")
    (note,) = run.iterdir()
    put(note, mutations.json_text(note.read_text(), draw))
    return folder
