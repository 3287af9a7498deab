"""The tables of docs/other_nodes.md: a node works as with core's model, by its formula, or is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from other_nodes import SETTINGS, SLOW, known, known_of_kjnodes, patched, table
from test_framepack import run, said
from test_framepack import save as save_framepack
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save
from torch import Tensor

CORE, KJNODES = table("Nodes of ComfyUI"), table("Nodes of KJNodes")
EFFECT = 1e-5
VIDEO = empty_latent(size=(4, 4, 6))


def settings_of(name: str) -> dict[str, Any]:
    given = dict(SETTINGS.get(name, {}))
    if "latent" in given:
        given["latent"] = VIDEO
    if "conditioning" in given:
        given["conditioning"] = prompts(9)[0]
    return given


def wan(model: Any) -> Tensor:
    return sample(model, *prompts(), VIDEO, steps=4)


GUIDED = {"cfg": 3.0, "negative": said(20), "total_second_length": 0.3, "steps": 4}


@cache
def framepack_plain(model: Any) -> Tensor:
    return run(model, **GUIDED)


@cache
def unpatched(path: Path) -> tuple[tuple[Any, Tensor], tuple[Any, Tensor]]:
    """Our model and core's of a file, each with the video that it makes without any node."""
    models = ours(path), core(path)
    return tuple((model, wan(model)) for model in models)  # type: ignore[return-value]


def refusal_of(make: Callable[[], Tensor]) -> str:
    with pytest.raises(ValueError, match=r"LowVRAM|Low VRAM|FramePack|only works with TeaCacheKJ") as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def check_wan(models: Path, node: type[Any], name: str, fate: str) -> None:
    path, settings = save(models, "t2v"), settings_of(name)
    if fate == "refused":
        refusal_of(lambda: wan(patched(node, unpatched(path)[0][0], settings)))
        return
    (our_model, plain), (core_model, core_plain) = unpatched(path)
    got, want = wan(patched(node, our_model, settings)), wan(patched(node, core_model, settings))
    assert relative_error(got, want) < 1e-3
    effect = relative_error(got, plain)
    assert (effect > EFFECT) == (fate == "works") == (relative_error(want, core_plain) > EFFECT), effect


def check_framepack(models: Path, framepack: Any, node: type[Any], name: str, fate: str) -> None:
    changes = GUIDED
    settings = settings_of(name)
    if "latent" in settings or "conditioning" in settings:
        settings |= {key: value for key, value in settings.items() if key != "conditioning"}
    if fate == "refused":
        refusal_of(lambda: run(patched(node, framepack, settings), **changes))
        return
    effect = relative_error(run(patched(node, framepack, settings), **changes), framepack_plain(framepack))
    assert (effect > EFFECT) == (fate == "works"), effect


@pytest.fixture(scope="module")
def framepack(models: Path) -> Any:
    from lowvram_pack.nodes.loaders import LoadFramePackModel

    return LoadFramePackModel.execute(save_framepack(models), "auto", "fp32", "sdpa", "none").result[0]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "on_wan", "on_framepack"), CORE, ids=[row[0] for row in CORE])
def test_a_node_of_comfyui(models: Path, framepack: Any, name: str, on_wan: str, on_framepack: str) -> None:
    node = known().get(name)
    if node is None:
        pytest.skip(f"this ComfyUI has no {name}")
    check_wan(models, node, name, on_wan)
    if name not in SLOW:
        check_framepack(models, framepack, node, name, on_framepack)


@pytest.mark.parametrize(("name", "on_wan", "on_framepack"), KJNODES, ids=[row[0] for row in KJNODES])
def test_a_node_of_kjnodes(models: Path, framepack: Any, name: str, on_wan: str, on_framepack: str) -> None:
    node = known_of_kjnodes()[name]
    check_wan(models, node, name, on_wan)
    if name not in SLOW:
        check_framepack(models, framepack, node, name, on_framepack)
