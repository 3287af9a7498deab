"""The tables of docs/other_nodes.md: a node works as with core's model, by its formula, or is refused in one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
import torch
from other_nodes import (
    COMPILERS,
    SETTINGS,
    defaults_of,
    inputs_of,
    known,
    known_of_kjnodes,
    listed,
    patched,
    section,
    table,
)
from safetensors.torch import save_file
from test_framepack import CONFIG, run, said
from test_framepack import save as save_framepack
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save
from torch import Tensor

CORE, KJNODES = table("Nodes of ComfyUI"), table("Nodes of KJNodes")
EFFECT = 1e-5
VIDEO = empty_latent(size=(4, 4, 6))


class Vae:
    """In place of one: latents of pictures, for nodes that keep them for a sampler of their own."""

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.zeros(1, 16, 1, pixels.shape[1] // 8, pixels.shape[2] // 8)


def settings_of(name: str, family: str = "wan") -> dict[str, Any]:
    """Those of a node, what begins with @ made for the family."""
    made: dict[str, Callable[[], Any]] = {
        "@latent": lambda: VIDEO,
        "@conditioning": lambda: prompts(9)[0] if family == "wan" else said(30),
        "@vae": Vae,
        "@image": lambda: torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(1)),
        "@mask": lambda: torch.ones(1, 32, 48),
        "@operation": lambda: lambda latent, **_: latent * 1.1,
        "@lora": lambda: f"table_{family}.safetensors",
        "@lora tensors": lambda: LORA_OF[family](),
    }
    given = SETTINGS.get(name, {})
    return {key: made[value]() if isinstance(value, str) and value in made else value for key, value in given.items()}


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


def fails(*attempts: Callable[[], Tensor]) -> None:
    for attempt in attempts:
        with pytest.raises(Exception, match=r"\S"):
            attempt()


def check_wan(models: Path, node: type[Any], name: str, fate: str) -> None:
    path, settings = save(models, "t2v"), settings_of(name)
    (our_model, plain), (core_model, core_plain) = unpatched(path)
    if fate == "refused":
        refusal_of(lambda: wan(patched(node, our_model, settings)))
        return
    if fate == "fails":
        fails(lambda: wan(patched(node, our_model, settings)), lambda: wan(patched(node, core_model, settings)))
        return
    for_core = settings | ({"backend": "eager"} if name in COMPILERS else {})  # of all of core's network at once
    got, want = wan(patched(node, our_model, settings)), wan(patched(node, core_model, for_core))
    assert relative_error(got, want) < 1e-3
    effect = relative_error(got, plain)
    assert (effect > EFFECT) == (fate == "works") == (relative_error(want, core_plain) > EFFECT), effect


def check_framepack(models: Path, framepack: Any, node: type[Any], name: str, fate: str) -> None:
    changes, settings = GUIDED, settings_of(name, "framepack")
    if fate == "refused":
        refusal_of(lambda: run(patched(node, framepack, settings), **changes))
        return
    if fate == "fails":
        fails(lambda: run(patched(node, framepack, settings), **changes))
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


@pytest.fixture(autouse=True, scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("loras")
    for family, make in LORA_OF.items():
        save_file(make(), folder / f"table_{family}.safetensors")
    folder_paths.add_model_folder_path("loras", str(folder))


@pytest.mark.parametrize(
    ("name", "on_wan", "on_framepack"),
    [pytest.param(*row, id=row[0], marks=[pytest.mark.newest] if row[0] in COMPILERS else []) for row in CORE],
)
def test_a_node_of_comfyui(
    models: Path, framepack: Any, monkeypatch: pytest.MonkeyPatch, name: str, on_wan: str, on_framepack: str
) -> None:
    node = known().get(name)
    if node is None:
        pytest.skip(f"this ComfyUI has no {name}")
    check_wan(models, node, name, on_wan)  # the compiler's code once
    without_inductor(monkeypatch)
    check_framepack(models, framepack, node, name, on_framepack)


@pytest.mark.parametrize(("name", "on_wan", "on_framepack"), KJNODES, ids=[row[0] for row in KJNODES])
def test_a_node_of_kjnodes(
    models: Path, framepack: Any, monkeypatch: pytest.MonkeyPatch, name: str, on_wan: str, on_framepack: str
) -> None:
    node = known_of_kjnodes()[name]
    without_inductor(monkeypatch)
    check_wan(models, node, name, on_wan)
    check_framepack(models, framepack, node, name, on_framepack)


def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our blocks are traced as ever, and run by PyTorch: generating code for them takes half a minute each time."""
    compile_module = torch.nn.Module.compile

    def traced(self: torch.nn.Module, *, backend: str, options: dict[str, Any], **others: Any) -> None:
        assert backend == "inductor", backend
        compile_module(self, backend="eager", **others)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)


@pytest.mark.parametrize("name", COMPILERS)
def test_a_compiled_model_runs_with_another_length_a_lora_and_as_another_expert(
    models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    without_inductor(monkeypatch)
    node = (known() if name in {row[0] for row in CORE} else known_of_kjnodes())[name]
    settings = {"backend": "inductor"}
    first, second = (ours(save(models, "t2v", seed=seed)) for seed in (0, 1))
    longer = empty_latent(size=(6, 4, 6))
    lora = comfy.sd.load_lora_for_models(first, None, lora_of_two_layers(), 1.0, 0)[0]
    for model, latent in ((first, VIDEO), (first, longer), (lora, VIDEO), (second, longer), (first, VIDEO)):
        got, want = (sample(one, *prompts(), latent, steps=1) for one in (patched(node, model, settings), model))
        assert relative_error(got, want) < 1e-5


def lora_of_two_layers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    made: dict[str, Tensor] = {}
    for layer in ("blocks.0.self_attn.q", "blocks.3.ffn.0"):
        rows = 384 if "ffn" in layer else 256
        made[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, 256, generator=generator) / 16
        made[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    return made


def lora_of_framepack() -> dict[str, Tensor]:
    generator, dim = torch.Generator().manual_seed(2), CONFIG.dim
    layers = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_v")
    made = {}
    for layer in layers:
        made[f"transformer.{layer}.lora_A.weight"] = torch.randn(4, dim, generator=generator) / dim**0.5
        made[f"transformer.{layer}.lora_B.weight"] = torch.randn(dim, 4, generator=generator)
    return made


LORA_OF: dict[str, Callable[[], dict[str, Tensor]]] = {"wan": lora_of_two_layers, "framepack": lora_of_framepack}
READERS, SAMPLERS = listed("Nodes that read weights"), listed("Nodes that sample")
SAGE = "WanVideoMemoryEfficientSageAttentionPatch"
TRAINS = "TrainLoraNode"  # it takes lists: see test_refusals


@pytest.mark.parametrize("name", [name for name in READERS if name != TRAINS])
def test_what_reads_weights_is_refused(models: Path, framepack: Any, tmp_path: Path, name: str) -> None:
    node = (known_of_kjnodes() if name.endswith("KJ") else known()).get(name)
    if node is None:
        pytest.skip(f"this ComfyUI has no {name}")
    for model in (ours(save(models, "t2v")), framepack):
        given = {key: model if "MODEL" in str(kind) else None for key, kind, _ in inputs_of(node)}
        with pytest.raises(ValueError, match=r"cannot be saved or merged.*ComfyUI's own loader") as error:
            patched(node, model, given | defaults_of(node))
        assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_memory_efficient_sage_is_pointed_to_the_loader(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = known_of_kjnodes()[SAGE]
    monkeypatch.setattr(sys.modules[node.__module__], "_cuda_archs", ["sm90"])  # as where sageattention is
    text = refusal_of(lambda: wan(patched(node, ours(save(models, "t2v")), {})))
    assert "blocks.0.self_attn.forward" in text and "attention_mode" in text


def test_every_node_with_a_model_stands_somewhere() -> None:
    documented = {row[0] for row in (*CORE, *KJNODES)} | {*READERS, *SAMPLERS}
    documented |= set(re.findall(r"\w+", section("Nodes that no table runs")))
    nodes = dict(known())
    if os.environ.get("KJNODES_DIR"):
        nodes |= known_of_kjnodes()
    absent = [
        name
        for name, node in nodes.items()
        if not name.startswith(("LowVRAM", "LTX")) and name not in documented and takes_model(node)
    ]
    assert not absent, absent


def takes_model(node: type[Any]) -> bool:
    try:
        return any(kind == "MODEL" for _, kind, _ in inputs_of(node))
    except Exception:  # noqa: BLE001 - of a node that reads its menus from the server's folders
        return False
