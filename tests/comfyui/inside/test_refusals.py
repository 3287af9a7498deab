"""Nodes that want of our MODEL what it has not: one line each that says what to do, and no file."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from lowvram_pack.nodes.bridge.native_model import EntryValueError
from other_nodes import defaults_of, known, patched
from test_framepack import folders, model, run, said  # noqa: F401 - fixtures
from test_other_nodes import lora_of_two_layers
from tiny_models import empty_latent, ours, prompts, sample, save

GUIDED = {"cfg": 3.0, "total_second_length": 0.3, "steps": 2}


def wan(models: Path) -> Any:
    return ours(save(models, "t2v"))


def said_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_lora_is_not_extracted_from_it(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    with_lora = comfy.sd.load_lora_for_models(wan(models), None, lora_of_two_layers(), 1.0, 0)[0]
    node = known()["LoraSave"]
    for one in (wan(models), with_lora):
        given = defaults_of(node) | {"model_diff": one, "lora_type": "standard"}
        with pytest.raises(ValueError, match=r"cannot be saved or merged.*ComfyUI's own loader") as error:
            node.execute(**given)
        said_of(error)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_lora_is_not_trained_on_it(models: Path) -> None:
    if "force_deepcopy" not in inspect.signature(ModelPatcher.clone).parameters:
        pytest.skip("this ComfyUI trains on the MODEL itself, of which it says that there is nothing to train")
    node = known()["TrainLoraNode"]
    given = defaults_of(node) | {"training_dtype": "fp32", "lora_dtype": "fp32", "existing_lora": "[None]", "steps": 1}
    lists = {"model": wan(models), "latents": empty_latent(), "positive": prompts()[0]}
    with torch.inference_mode(False), pytest.raises(ValueError, match="Train LoRA") as error:
        node.execute(**{name: [value] for name, value in (given | lists).items()})
    said_of(error)


@pytest.mark.parametrize("family", ["wan", "framepack"])
def test_it_runs_on_its_own_device_alone(models: Path, model: Any, family: str) -> None:  # noqa: F811
    own = wan(models) if family == "wan" else model
    with pytest.raises(ValueError, match="on no other device: take Select Model Device") as error:
        own.deepclone_multigpu(new_load_device=torch.device("cuda", 1))
    said_of(error)
    moved = own.clone()
    moved.load_device = torch.device("meta")  # as Select Model Device does where it has no weights to copy
    with pytest.raises(ValueError, match="on no other device: take Select Model Device") as error:
        sample(moved, *prompts(), empty_latent()) if family == "wan" else run(moved, total_second_length=0.3)
    said_of(error)


def test_it_is_not_copied_with_its_weights(models: Path) -> None:
    with pytest.raises(ValueError, match="streams them from its file") as error:
        copy.deepcopy(wan(models))
    said_of(error)


@pytest.mark.parametrize("name", ["FreeU", "FreeU_V2"])
@pytest.mark.parametrize("family", ["wan", "framepack"])
def test_what_other_architectures_have(models: Path, model: Any, family: str, name: str) -> None:  # noqa: F811
    with pytest.raises(EntryValueError, match=r"asks this model for its 'model_channels'.*take that node out") as error:
        patched(known()[name], wan(models) if family == "wan" else model, {})
    said_of(error)


def test_a_prompt_that_framepacks_run_did_not_prepare(model: Any) -> None:  # noqa: F811
    perpendicular = patched(known()["PerpNeg"], model, {"empty_conditioning": said(30)})
    with pytest.raises(ValueError, match="a prompt of its own") as error:
        run(perpendicular, negative=said(20), **GUIDED)
    said_of(error)


def test_a_compute_dtype_of_a_node_is_the_loaders_or_refused(models: Path) -> None:
    node, own = known()["ModelComputeDtype"], wan(models)
    same = patched(node, own, {"dtype": "fp32"})
    assert torch.equal(*(sample(one, *prompts(), empty_latent(), steps=1) for one in (same, own)))
    with pytest.raises(ValueError, match=r"asks for float16.*the loader's compute_dtype") as error:
        sample(patched(node, own, {"dtype": "fp16"}), *prompts(), empty_latent())
    said_of(error)
