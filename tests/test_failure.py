"""What a command says of errors of the system: which file, what is the matter, what to do."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.cli.failure import failure
from lowvram_video.system.atomic_files import write_file
from lowvram_video.video.writer import VideoError, VideoWriter, join_videos

needs_small_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a full disk of Linux's")


def system_error(number: int, *more: Any) -> OSError:
    return OSError(number, os.strerror(number), *more)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (system_error(errno.ENOSPC, "a/b"), "a/b: No space left on device: free some of that disk, or choose another"),
        (system_error(errno.ENOSPC), "a file: No space left on device: free some of that disk, or choose another"),
        (system_error(errno.EACCES, "a", None, "b"), "b: Permission denied: check the rights there, or choose another"),
        (system_error(errno.ENOENT, "model"), "model: No such file or directory: it was there before: put it back"),
        (
            OSError(errno.EIO, "the file ends at byte 7: download it again", "m"),
            "m: the file ends at byte 7: download it",
        ),
        (system_error(errno.EBADF, "a"), "a: Bad file descriptor"),
        (VideoError("a.mp4: ffmpeg stopped: check the free space"), "a.mp4: ffmpeg stopped: check the free space"),
        (ValueError("crf is 99; expected 0 to 51"), "crf is 99; expected 0 to 51"),
    ],
)
def test_errors_are_told_with_their_file_and_what_to_do(error: Exception, said: str) -> None:
    told = failure(error)
    assert told is not None and told.startswith(said) and "Errno" not in told


def full(*_: object) -> None:
    raise system_error(errno.ENOSPC)  # as a write says it: without a name


def test_a_full_disk_is_told_with_the_file_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*state\.json'") as caught:
        write_file(tmp_path / "state.json", b"{}")
    assert caught.value.filename == str(tmp_path / "state.json") and not list(tmp_path.iterdir())


@needs_small_disk
@pytest.mark.parametrize("name", ["parts.txt", "tags.txt"])
def test_a_full_disk_is_told_where_videos_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with VideoWriter(tmp_path / "part.mp4", 16, is_part=True) as writer:
        writer.write(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    real = Path.open

    def opened(self: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        return real(Path("/dev/full") if self.name == name else self, mode.replace("x", "w"), *more, **named)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="No space left on device") as caught:
        join_videos([(tmp_path / "part.mp4", 2)], tmp_path / "a.mp4", 16, {"comment": "x"})
    assert str(failure(caught.value)).startswith(f"{tmp_path / name}: No space left on device: free some")
