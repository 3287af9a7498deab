"""Runs inside a real ComfyUI's own environment (see ../test_inside.py): COMFYUI_DIR on the path, on the CPU."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACK = Path(__file__).parents[3]
PACK_NAME = "lowvram_pack"  # ComfyUI, too, imports a pack under a name of its own
MANY_OBJECTS = 100_000  # an import of much, such as PyTorch's compiler, makes more, a test's models fewer

sys.path.insert(0, os.environ["COMFYUI_DIR"])
sys.path.insert(1, str(Path(__file__).parent))
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import torch  # noqa: E402

if not hasattr(comfy.sd.comfy.model_patcher, "CoreModelPatcher"):  # 0.33 sets it in main.py, older ones have none
    comfy.sd.comfy.model_patcher.CoreModelPatcher = comfy.sd.comfy.model_patcher.ModelPatcher


def import_pack() -> ModuleType:
    if PACK_NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK_NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK_NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK_NAME]


import_pack()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("COMFYUI_IS_OLDER"):  # beside a newer one, see ../test_inside.py
        for item in items:
            if item.get_closest_marker("newest"):
                item.add_marker(pytest.mark.skip("runs in the newest of two ComfyUIs: what it tests is the pack's own"))


@pytest.fixture(autouse=True)
def inference_mode():
    """ComfyUI runs every node so."""
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def quick_collections() -> None:
    """ComfyUI collects garbage wherever a MODEL was dropped: not through all that this process has imported."""
    if len(gc.get_objects()) > MANY_OBJECTS:
        gc.unfreeze()  # what tests before have left
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def no_card_of_this_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans find no profile that somebody measured here."""
    monkeypatch.setenv("LOWVRAM_VIDEO_DATA", str(tmp_path_factory.getbasetemp() / "no-data"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ComfyUI's for tiny video models."""
    import folder_paths

    folder = tmp_path_factory.mktemp("diffusion_models")
    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    return folder
