"""Files that change under a run, or that somebody edited: an error or a new beginning, never a wrong video."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.memory.plan.footprint import GIB
from lowvram_video.memory.plan.host_memory import RAM_MARGIN_BYTES
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.video import reader
from lowvram_video.video.growing_state import read_state
from lowvram_video.video.growing_video import GrowingVideo
from lowvram_video.video.reader import read_end, read_pieces, read_video
from lowvram_video.video.writer import VideoWriter
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.files.open import open_checkpoint
from safetensors.torch import load_file, save_file

from .quantizers import write_gguf
from .tiny import save_files, save_wan

REQUEST = WanRequest("a red ball", width=48, height=32, num_frames=5, num_steps=3, guidance=1.0)
FROM_DISK = RunSettings(ram_budget_gib=(RAM_MARGIN_BYTES + 3 * 2**20) / GIB)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    folder = tmp_path_factory.mktemp("files")
    return replace(save_files(folder), model=save_wan(folder / "wan.safetensors", num_layers=6))


def overwrite(path: Path) -> None:
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path)


def swap(path: Path) -> None:
    other = shutil.copy(path, path.with_name("other"))
    os.replace(other, path)


@pytest.mark.parametrize("change", [overwrite, swap, Path.unlink, lambda path: os.truncate(path, 4000)])
@pytest.mark.parametrize("at", [1, 2])
def test_a_model_that_changes_while_it_streams_is_told(
    files: WanFiles, tmp_path: Path, change: Callable[[Path], object], at: int
) -> None:
    model = Path(shutil.copy(files.model, tmp_path / "wan.safetensors"))
    pipeline = WanPipeline(replace(files, model=model), FROM_DISK)
    passes: list[int] = []

    def count(*_: object) -> None:
        passes.append(len(passes))
        if len(passes) == at:
            change(model)

    pipeline.high.model.register_forward_hook(count)
    with pytest.raises(CheckpointError, match=r"wan.safetensors (was (changed|deleted) while the model streams|.*)"):
        list(pipeline.generate(REQUEST))
    assert len(passes) == at


@pytest.mark.parametrize("change", [overwrite, swap])
def test_a_vae_that_changes_before_it_is_read_is_told(
    files: WanFiles, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """Its header is read at once, its tensors hours later: where they are in another file nobody knows."""
    path = Path(shutil.copy(files.vae, tmp_path / "vae.safetensors"))
    pipeline = WanPipeline(replace(files, vae=path))
    pipeline.high.model.register_forward_hook(lambda *_: change(path))
    with pytest.raises(CheckpointError, match=r"vae\.safetensors was changed since it was opened"):
        list(pipeline.generate(REQUEST))


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_no_tensor_is_read_of_a_file_that_was_changed_since_its_header_was(tmp_path: Path, suffix: str) -> None:
    def written(name: str, value: float) -> Path:
        path, tensor = tmp_path / f"{name}.{suffix}", torch.full((4, 32), value)
        if suffix == "gguf":
            return write_gguf(path, {"a.weight": (tensor, "F32")}, "wan")
        save_file({"a.weight": tensor}, path)
        return path

    path = written("a", 1)
    os.utime(path, (1, 1))  # clocks of file systems tick some hundred times a second
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.read("a.weight"), torch.ones(4, 32))
    os.replace(written("b", 2), path)
    with pytest.raises(CheckpointError, match=rf"a\.{suffix} was changed since it was opened"):
        checkpoint.read("a.weight")
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"a\.{suffix}: cannot be read"):
        checkpoint.read("a.weight")


def test_a_model_in_ram_may_be_replaced(files: WanFiles, tmp_path: Path) -> None:
    model = Path(shutil.copy(files.model, tmp_path / "wan.safetensors"))
    whole = torch.cat(list(WanPipeline(files).generate(REQUEST)))
    pipeline = WanPipeline(replace(files, model=model))
    pipeline.high.model.register_forward_hook(lambda *_: model.unlink(missing_ok=True))
    assert torch.equal(torch.cat(list(pipeline.generate(REQUEST))), whole)


# --- film.json -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("film")
    made = GrowingVideo(folder / "parts", folder / "film.mp4")
    for value in (0, 99):
        made.add(torch.full((9, 16, 16, 3), value, dtype=torch.uint8), 3)
    made.publish()
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"num_sections": 99.5}, {"num_sections": -1}, {"num_sections": "1"}, {"height": 10**40}, {"parts": []},
        {"num_shown_parts": 7}, {"num_open": -3}, {"pixels": {"file": 3, "num_frames": 3, "sha256": ""}},
        {"parts": [{"file": "../outside.mp4", "num_frames": 9, "sha256": ""}]},
        {"parts": [{"file": "/etc/passwd", "num_frames": 9, "sha256": ""}]},
        {"parts": [{"file": "final_0-1.mp4", "num_frames": -9, "sha256": ""}]},
        {"parts": [{"file": "final_0-1.mp4", "num_frames": 1e300, "sha256": ""}]},
    ],
)  # fmt: skip
def test_an_edited_film_is_built_anew(
    film: Path, tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(film, tmp_path, dirs_exist_ok=True)
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(b"mine")
    note = tmp_path / "parts" / "film.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | change))
    with pytest.raises((ValueError, TypeError)):
        read_state(note)
    assert GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4").num_sections == 0
    assert "the video is built anew" in caplog.text and outside.read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", "", "1e400", '{"parts": 1}', " " * (2**24 + 1)])
def test_a_film_note_of_any_text_is_one_line(film: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(film, tmp_path, dirs_exist_ok=True)
    (tmp_path / "parts" / "film.json").write_text(text)
    assert not GrowingVideo.is_at(tmp_path / "parts", tmp_path / "film.mp4")
    assert GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4").num_sections == 0


# --- videos that are read --------------------------------------------------------------------------------

READS: dict[str, Callable[[Path], object]] = {
    "first": lambda path: read_video(path, 32, 32, 16, first=30),
    "end": lambda path: read_end(path, 32, 32, 16, 5),
    "pieces": lambda path: list(read_pieces(path, 32, 32, 16, 4)),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("given") / "given.mp4"
    with VideoWriter(path, 16) as writer:
        writer.write(torch.randint(0, 255, (40, 32, 32, 3), dtype=torch.uint8))
    return path


@pytest.mark.parametrize("read", list(READS))
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "changed"),
        (lambda path: os.truncate(path, 0), "changed"),
        (lambda path: os.replace(path.with_name("other.mp4"), path), "changed"),
        (Path.unlink, "deleted"),
    ],
    ids=["overwritten", "truncated", "replaced", "deleted"],
)
def test_a_video_that_changes_while_it_is_read_is_told(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str, change: Callable[[Path], object], what: str
) -> None:
    path, real, frames = Path(shutil.copy(given, tmp_path / "a.mp4")), reader._read, []
    shutil.copy(given, tmp_path / "other.mp4")

    def changing(*args: object) -> bytearray:
        frames.append(None)
        if len(frames) == 20:
            change(path)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "_read", changing)
    with pytest.raises(ValueError, match=rf"a\.mp4 was {what} while it was read"):
        READS[read](path)
    assert len(frames) == 20, "frames of another file are not even read on"
