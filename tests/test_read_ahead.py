"""What is read to be copied to the device: ahead of whoever takes it, but little of it at a time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from lowvram_video.memory.stream.layout import in_one_piece
from lowvram_video.runtime import fixed_weights
from lowvram_video.runtime.fixed_weights import FixedWeights
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.files.checkpoint import Checkpoint
from lowvram_video.weights.files.read_ahead import read_ahead
from lowvram_video.weights.lora.file import LoraChoice
from safetensors.torch import load_file, save_file
from torch import Tensor

from .loras import make_factors, save_lora
from .tiny import save_wan

PIECE = 1000
META = torch.device("meta")


def test_in_order_and_never_more_than_may_be_ahead() -> None:
    sizes = [3, 3, 1, 12, 2, 2, 2, 5, 9, 1]
    taken: list[int] = []

    def read(index: int) -> int:
        ahead = sizes[len(taken) + 1 : index]  # not yet taken, but for the one that is asked for
        assert not ahead or sum(ahead) + sizes[index] <= 6
        return index

    with ThreadPoolExecutor(1) as threads:
        for made in read_ahead(((size, partial(read, index)) for index, size in enumerate(sizes)), threads, 6):
            taken.append(made)
    assert taken == list(range(len(sizes)))


def test_the_next_is_read_while_one_is_used() -> None:
    begun = Event()
    with ThreadPoolExecutor(1) as threads:
        made = read_ahead([(9, lambda: False), (9, lambda: begun.set() or True)], threads, 6)
        assert next(made) is False and begun.wait(10)
        assert list(made) == [True]


def test_an_error_comes_in_its_turn_and_ends_the_reading() -> None:
    read: list[int] = []

    def fail() -> int:
        raise OSError("the disk is gone")

    def note(index: int) -> int:
        read.append(index)
        return index

    jobs: list[Callable[[], int]] = [partial(note, 0), fail, *(partial(note, index) for index in range(2, 9))]
    with ThreadPoolExecutor(1) as threads:
        made = read_ahead(((1, job) for job in jobs), threads, 3)
        assert next(made) == 0
        with pytest.raises(OSError, match="the disk is gone"):
            next(made)
    assert len(read) < 6
    assert list(read_ahead([], threads)) == []


def fixed_of(model: StreamedWan, device: torch.device) -> FixedWeights:
    return FixedWeights(model.model, model.weights, model.parts, device)


def test_fixed_weights_reach_the_device_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A14B's time projection alone has 300 MiB: beside an expert in RAM that is too much."""
    model = StreamedWan(save_wan(tmp_path / "wan.safetensors"), RunSettings())
    names, read, read_into = model.weights.fixed_names(), [], Checkpoint.read_into
    total = sum(model.weights.source.tensors[name].nbytes for name in names)

    def watched(self: Checkpoint, name: str, out: Tensor) -> None:
        read.append(out.numel())
        read_into(self, name, out)

    monkeypatch.setattr(fixed_weights, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(Checkpoint, "read_into", watched)
    fixed_of(model, META).load(names)
    assert sum(read) == total > 20 * PIECE and max(read) == PIECE


def scaled(path: Path, layer: str) -> Path:
    """The file with a layer in fp8 and a scale beside it."""
    tensors = load_file(path)
    weight = tensors[f"{layer}.weight"]
    scale = weight.abs().max() / 448
    tensors |= {f"{layer}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{layer}.scale_weight": scale}
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, path)
    return path


KINDS = {
    "of the file": (False, []),
    "one merged": (False, ["time_embedding.2.weight"]),
    "one merged with its scale": (True, ["time_embedding.2.weight", "time_embedding.2.weight_scale"]),
}


@pytest.mark.parametrize(("has_scale", "merged"), KINDS.values(), ids=KINDS)
def test_pieces_make_the_stored_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_scale: bool, merged: list[str]
) -> None:
    path, loras = save_wan(tmp_path / "wan.safetensors"), []
    if has_scale:
        scaled(path, "time_embedding.2")
    if merged:
        factors = make_factors(layers=["time_embedding.2"])
        loras = [LoraChoice(save_lora(tmp_path / "lora.safetensors", factors, "official"), 1.0)]
    model = StreamedWan(path, RunSettings(lora_mode="merge"), loras=loras)
    want = {name: model.weights.read_tensor(name) for name in model.weights.fixed_names()}
    changed = [name for name in want if not torch.equal(want[name], model.checkpoint.read(name))]
    assert sorted(changed) == merged
    placed: dict[str, Tensor] = {}

    def on_the_cpu(infos: Any, pieces: Any, device: torch.device) -> dict[str, Tensor]:
        assert device == META
        placed.update(in_one_piece(infos, pieces, torch.device("cpu")))
        return {}

    monkeypatch.setattr(fixed_weights, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(fixed_weights, "in_one_piece", on_the_cpu)
    fixed_of(model, META).load(list(want))
    assert all(torch.equal(placed[name], want[name]) for name in want)
