"""The real ComfyUIs of this machine: COMFYUI_DIR or $HOME/ComfyUI, and an older one beside it.

They have environments of their own (venv/ in their folder), so what needs one runs as its subprocess: the test modules
under `inside/` in one, and one server (`server.py`) that all other modules share. Each is for one worker of
pytest-xdist (`--dist loadscope`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from .server import Server
from .tiny_files import make_inputs, make_models

collect_ignore = ["inside", "stand_ins"]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class ComfyUI:
    """One installation and the Python that runs it."""

    folder: Path
    python: Path
    is_newest: bool

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
            found.append(ComfyUI(folder, python, is_newest=folder == newest))
    return found


@pytest.fixture(scope="session")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server of one version with all tiny files; COMFYUI_FRONTEND, if set, is the page that it serves."""
    base = tmp_path_factory.mktemp("base")
    make_models(base / "models", full_size=comfyui.is_newest)
    make_inputs(base / "input")
    another = os.environ.get("COMFYUI_FRONTEND")
    flags = ("--cpu", "--front-end-root", another) if another else ("--cpu",)
    with Server(comfyui.folder, comfyui.python, base, flags) as running:
        yield running
    shutil.rmtree(base / "models")  # up to 1.9 GB, which pytest would keep


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict[str, Any]:
    """What the server says of its nodes."""
    return dict(server.get("/object_info"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.comfyui)


class OneServerEach(LoadScopeScheduling):
    """All tests of one server in one worker; xdist's own groups (`xdist_group`) are none in pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        name, _, values = nodeid.partition("[")
        version = next((one.version for one in installations() if one.version in values), "none")
        return f"{version} {'inside' if 'test_inside.py' in name else 'server'}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    return OneServerEach(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comfyui" in metafunc.fixturenames:
        found = installations()
        absent = pytest.param(None, marks=pytest.mark.skip(reason="no ComfyUI in COMFYUI_DIR or $HOME/ComfyUI"))
        metafunc.parametrize(
            "comfyui", found or [absent], ids=[one.version for one in found] or ["none"], scope="session"
        )
