"""Nodes of core's that want the weights of our MODEL: refused in one line, and nothing is broken by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_extras.nodes_model_merging as merging
import folder_paths
import pytest
import torch
from tiny_models import empty_latent, ours, prompts, sample, save


def save_model(model: Any) -> None:
    merging.ModelSave().save(model, "tiny")


def save_checkpoint(model: Any) -> None:
    merging.save_checkpoint(model, filename_prefix="tiny", output_dir=folder_paths.get_output_directory())


NODES: dict[str, Callable[[Any], Any]] = {
    "ModelSave": save_model,
    "CheckpointSave": save_checkpoint,
    "ModelMergeSimple": lambda model: merging.ModelMergeSimple().merge(model, model, 0.5),
    "ModelMergeSubtract": lambda model: merging.ModelSubtract().merge(model, model, 1.0),
    "ModelMergeAdd": lambda model: merging.ModelAdd().merge(model, model),
    "ModelMergeBlocks": lambda model: merging.ModelMergeBlocks().merge(model, model, input=0.5, middle=0.5, out=0.5),
}


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("loaded", [False, True])
def test_what_needs_the_weights_is_refused_in_one_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, loaded: bool
) -> None:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model = ours(save(models, "t2v"))
    before = sample(model, *prompts(), empty_latent(), steps=1) if loaded else None
    with pytest.raises(ValueError, match=r"cannot be saved or merged.*ComfyUI's own loader") as error:
        NODES[name](model)
    assert "\n" not in str(error.value)
    assert "t2v_float32_0.safetensors" in str(error.value)
    assert not list(tmp_path.rglob("*.safetensors"))
    after = sample(model, *prompts(), empty_latent(), steps=1)
    assert before is None or torch.equal(after, before)
