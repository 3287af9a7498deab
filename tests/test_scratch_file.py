"""Weights that are made as they are read and put on the disk: how far it is, and giving up meanwhile."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from lowvram_video.memory.stream.layout import layout_block
from lowvram_video.memory.stream.scratch_file import ScratchFile
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.lora.merged_source import MergedSource
from safetensors.torch import save_file
from torch import Tensor

NAMES = [f"{number}.weight" for number in range(4)]


class Interrupted(BaseException):
    """As ComfyUI's."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def source(tmp_path: Path) -> MergedSource:
    save_file({f"block.{name}": torch.ones(1024, 1024) for name in NAMES}, tmp_path / "model.safetensors")
    changes = {f"block.{name}": lambda weight: weight.mul_(2) for name in NAMES}
    return MergedSource(open_checkpoint(tmp_path / "model.safetensors"), changes)


def test_an_interrupt_stops_it_between_tensors_and_leaves_nothing(source: MergedSource, tmp_path: Path) -> None:
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        ScratchFile(source, [layout_block(source, "block", NAMES)], tmp_path, check)
    assert len(asked) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_it_says_how_far_it_is(
    source: MergedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layouts = [layout_block(source, "block", NAMES)]
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        scratch_file = ScratchFile(source, layouts, tmp_path)
        shown = stream.getvalue()
        assert ("weights:" in shown and "/16.8M" in shown) if stream.isatty() else shown == ""
        assert f"0.02 GiB of weights are made for streaming and put into {tmp_path}" in caplog.text
        caplog.clear()
        info = scratch_file.tensors["block.1.weight"]
        raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        made: Tensor = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        assert bool((made == 2).all())
        scratch_file.close()
