"""Weights that are made as they are read, with their scales: each pair once, whichever is read first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.wanvideo.checkpoint import open_wan
from lowvram_video.weights.files.checkpoint import Source
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.linear.quantize import QuantizedSource, quantize_checkpoint
from lowvram_video.weights.linear.weight_format import WeightFormat
from lowvram_video.weights.lora.merged_source import MergedSource
from safetensors.torch import save_file
from torch import Tensor

from .tiny import save_wan

LAYER = "blocks.0.ffn.0"
WEIGHT, SCALE = f"{LAYER}.weight", f"{LAYER}.weight_scale"


@dataclass(frozen=True)
class Watched:
    """A format that tells when a weight is unpacked."""

    format: WeightFormat
    note: Callable[[], None]

    def dequantize(self, packed: Any, dtype: torch.dtype) -> Tensor:
        self.note()
        return self.format.dequantize(packed, dtype)


def quantised(folder: Path, note: Callable[[], None]) -> Source:
    path = save_wan(folder / "wan.safetensors", dtype=torch.bfloat16)
    source = quantize_checkpoint(open_wan(path)[1], "int8")
    assert isinstance(source, QuantizedSource)
    layers = {name: replace(layer, format=Watched(layer.format, note)) for name, layer in source.layers.items()}
    return replace(source, layers=layers)


def merged(folder: Path, note: Callable[[], None]) -> Source:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        WEIGHT: torch.randn(64, 32, generator=generator).to(torch.float8_e4m3fn),
        SCALE: torch.rand(64, 1, generator=generator),
    }
    save_file(tensors, folder / "fp8.safetensors")

    def doubled(weight: Tensor) -> Tensor:
        note()
        return weight.mul_(2)

    return MergedSource(open_checkpoint(folder / "fp8.safetensors"), {WEIGHT: doubled})


MAKERS = pytest.mark.parametrize("make", [quantised, merged])


def read(source: Source, name: str) -> Tensor:
    out = torch.empty(source.tensors[name].nbytes, dtype=torch.uint8)
    source.read_into(name, out)
    return out


@MAKERS
@pytest.mark.parametrize("order", [(WEIGHT, SCALE), (SCALE, WEIGHT)])
def test_a_pair_is_made_once(tmp_path: Path, make: Callable[..., Source], order: tuple[str, ...]) -> None:
    made: list[int] = []
    (tmp_path / "other").mkdir()
    source, other = make(tmp_path, lambda: made.append(1)), make(tmp_path / "other", lambda: None)
    found = {name: read(source, name) for name in order}
    assert len(made) == 1
    for name in reversed(order):
        assert torch.equal(read(other, name), found[name])
    assert torch.equal(read(source, WEIGHT), found[WEIGHT]), "and again as often as it is wanted"


@MAKERS
def test_a_scale_waits_for_a_weight_that_is_being_made(tmp_path: Path, make: Callable[..., Source]) -> None:
    """As eight readers meet: the small scales are read while the last large weight is still in work."""
    begun, go_on, made = threading.Event(), threading.Event(), []

    def note() -> None:
        made.append(1)
        begun.set()
        assert go_on.wait(20)

    source = make(tmp_path, note)
    with ThreadPoolExecutor(2) as readers:
        weight = readers.submit(read, source, WEIGHT)
        assert begun.wait(20)
        scale = readers.submit(read, source, SCALE)
        threading.Timer(0.2, go_on.set).start()
        weight.result(), scale.result()
    assert len(made) == 1


@pytest.mark.parametrize("kept", [0, 3 * 64 * 32])
def test_weights_that_nobody_fetches_do_not_pile_up(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram_video.weights.linear.made_pairs import MadePairs

    monkeypatch.setattr("lowvram_video.weights.linear.made_pairs.KEPT_BYTES", kept)
    pairs, out, made = MadePairs(), torch.empty(64 * 32, dtype=torch.uint8), []

    def make(weight: Tensor) -> Tensor:
        made.append(1)
        weight.fill_(7)
        return torch.ones(1)

    for number in range(5):
        pairs.read_scale(f"layer {number}", torch.empty(4, dtype=torch.uint8), out.numel(), make)
    for number in reversed(range(5)):
        pairs.read_weight(f"layer {number}", out, make)
        assert bool((out == 7).all())
    assert len(made) - 5 == (4 if not kept else 2), "the latest are at hand, the others are made again"
