"""Files that are there whole or not at all."""

import os
from pathlib import Path

import pytest
from lowvram_video.system.atomic_files import write_file


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_file(path, b"old")
    with pytest.raises(TypeError):
        write_file(path, None)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("failures", [2, 99])
def test_windows_may_refuse_to_replace_a_file_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    calls, real = [0], os.replace

    def refuse(source: Path, target: Path) -> None:
        calls[0] += 1
        if calls[0] <= failures:
            raise PermissionError(13, "Access is denied")
        real(source, target)

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr("lowvram_video.system.atomic_files.REPLACE_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "replace", refuse)
    if failures == 2:
        write_file(path, b"new")
        assert path.read_bytes() == b"new"
    else:
        with pytest.raises(PermissionError):
            write_file(path, b"new")
        assert path.read_bytes() == b"old" and calls[0] == 4
    assert os.listdir(tmp_path) == ["file"]
