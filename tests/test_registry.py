"""What ComfyUI's registry and forks read: metadata of pyproject.toml, its pictures, the workflow of the tests."""

import re
from pathlib import Path

import pytest
from PIL import Image

from .test_packaging import ROOT, tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = "https://github.com/lowvram-video/ComfyUI-LowVRAM-Video"
RAW = "https://raw.githubusercontent.com/lowvram-video/ComfyUI-LowVRAM-Video/main/"
LARGEST_ICON = 400  # pixels, as the registry takes it
BANNER = 21 / 9
WORKFLOW = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")


def picture(name: str) -> Path:
    """The file in this repository that a picture of the registry's page is."""
    url = PROJECT["tool"]["comfy"][name]
    assert url.startswith(RAW)
    return ROOT / url.removeprefix(RAW)


def test_the_registry_knows_where_things_are() -> None:
    urls, comfy = PROJECT["project"]["urls"], PROJECT["tool"]["comfy"]
    assert urls["Repository"] == REPOSITORY and urls["Bug Tracker"] == f"{REPOSITORY}/issues"
    assert urls["Documentation"].startswith(REPOSITORY)
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"]


def test_the_icon_and_the_banner_are_as_the_registry_shows_them() -> None:
    with Image.open(picture("Icon")) as icon:
        assert icon.width == icon.height <= LARGEST_ICON
    with Image.open(picture("Banner")) as banner:
        assert banner.width / banner.height == pytest.approx(BANNER, rel=0.01)


def test_forks_test_on_linux_and_windows_what_make_test_does() -> None:
    assert re.search(r"system: \[ubuntu-latest, windows-latest\]", WORKFLOW)
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f'"{oldest}"' in WORKFLOW
    torch = re.search(r"^torch==(\S+)", (ROOT / "requirements-dev.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch is not None and f"torch=={torch[1]} " in WORKFLOW
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    types = "mypy --config-file ../../pyproject.toml -p lowvram_video"
    for line in ("ruff check .", "ruff format --check .", types, "not slow and not comfyui"):
        assert line in WORKFLOW and line in makefile


def test_scripts_of_the_page_are_in_the_packs_own_namespace() -> None:
    """As comfy-test's level "javascript" asks: another pack's extension of the same name would drop ours."""
    namespace = re.sub(r"\W", "", PROJECT["tool"]["comfy"]["DisplayName"]).lower()
    scripts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.js"))]
    names = [name for script in scripts for name in re.findall(r"registerExtension\(\{\s*name: \"(.+?)\"", script)]
    assert len(names) == sum(script.count("registerExtension") for script in scripts) == len(set(names)) > 2
    assert [name for name in names if not name.startswith(f"{namespace}.")] == []


# of every node that was ever in a workflow
NODE_IDS = [
    "BlockSwap",
    "DecodeVideo",
    "Doctor",
    "EncodeVideo",
    "FramePackEndImage",
    "FramePackNearestBucket",
    "FramePackSampler",
    "FramePackTimedPrompt",
    "LoadClipGGUF",
    "LoadDemo",
    "LoadFlashVSRModel",
    "LoadFramePackModel",
    "LoadLora",
    "LoadWanModel",
    "MemoryReport",
    "Nag",
    "Plan",
    "ResumableSampling",
    "SaveVideo",
    "SeveralGPUs",
    "ShowVideo",
    "SparseAttention",
    "StepCache",
    "TorchCompile",
    "UpscaleVideo",
]


def test_no_node_id_is_lost() -> None:
    nodes = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    ids = set(re.findall(r'node_id="LowVRAM(\w+)"', nodes))
    lost = sorted(set(NODE_IDS) - ids)
    assert not lost, f"saved workflows name {lost}: register an io.NodeReplace for each in LowVRAMExtension.on_load"
    assert ids == set(NODE_IDS), "add the new id to NODE_IDS: from now on workflows name it"
