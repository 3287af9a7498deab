"""The real ComfyUIs of this machine: COMFYUI_DIR or $HOME/ComfyUI, and an older one beside it.

They have environments of their own (venv/ in their folder), so what needs one runs as its subprocess: test modules
under `inside/`, and servers (`server.py`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

collect_ignore = ["inside", "stand_ins"]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class ComfyUI:
    """One installation and the Python that runs it."""

    folder: Path
    python: Path

    @property
    def version(self) -> str:
        text = (self.folder / "comfyui_version.py").read_text(encoding="utf-8")
        return text.split('__version__ = "')[1].split('"')[0]


def venv_python(folder: Path) -> Path | None:
    names = ("Scripts/python.exe",) if sys.platform == "win32" else ("bin/python",)
    found = (folder / venv / name for venv in ("venv", ".venv") for name in names)
    return next((path for path in found if path.exists()), None)


def installations() -> list[ComfyUI]:
    """The newest first; an older one without an environment uses the newest's."""
    home = Path.home()
    newest = Path(os.environ.get("COMFYUI_DIR", home / "ComfyUI"))
    older = Path(os.environ.get("COMFYUI_OLD_DIR", home / "ComfyUI-0.8"))
    found: list[ComfyUI] = []
    for folder in (newest, older):
        python = venv_python(folder) or (found[0].python if found else None)
        if (folder / "main.py").is_file() and python is not None:
            found.append(ComfyUI(folder, python))
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.comfyui)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comfyui" in metafunc.fixturenames:
        found = installations()
        absent = pytest.param(None, marks=pytest.mark.skip(reason="no ComfyUI in COMFYUI_DIR or $HOME/ComfyUI"))
        metafunc.parametrize(
            "comfyui", found or [absent], ids=[one.version for one in found] or ["none"], scope="module"
        )
