"""Ctrl-C lets the block that runs finish, and the same command goes on to the same video."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lowvram_video.cli.interrupts import PatientInterrupts
from lowvram_video.cli.main import main
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.network.blocks import WanBlock

from .test_cli import arguments, num_frames
from .tiny import save_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is where tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_one_waits_and_the_second_one_does_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interrupts = PatientInterrupts()
    interrupts.hold()
    interrupts.check()
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    assert signal.getsignal(number) is before
    interrupts.hold()
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before
    interrupts.hold()
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        interrupts.release()
    interrupts.release()
    assert signal.getsignal(number) is before


def test_what_is_ignored_stays_so() -> None:
    """As Ctrl-C is by what a script has begun in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts = PatientInterrupts()
    try:
        interrupts.hold()
        signal.raise_signal(signal.SIGINT)
        interrupts.check()
        interrupts.release()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_finishes_the_block_and_the_run_goes_on(
    files: WanFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(files, tmp_path / "whole.mp4")) == 0
    begun, done, forward = [], [], WanBlock.forward

    def struck(self: WanBlock, *given: Any, **named: Any) -> Any:
        begun.append(self)
        if len(begun) == 8:  # in the second step: the first one is recorded
            signal.raise_signal(signal.SIGINT)
        made = forward(self, *given, **named)
        done.append(self)
        return made

    monkeypatch.setattr(WanBlock, "forward", struck)
    assert main(arguments(files, tmp_path / "a.mp4")) == 130
    assert len(begun) == len(done) == 8, "the block was finished, and none after it begun"
    assert "the same command goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments(files, tmp_path / "a.mp4")) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes() and num_frames(tmp_path / "a.mp4")
