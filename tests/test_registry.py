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
    for line in ("ruff check .", "ruff format --check .", "not slow and not comfyui"):
        assert line in WORKFLOW and line in makefile
