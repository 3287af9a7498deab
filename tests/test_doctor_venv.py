"""Doctor in a real environment of its own, without packages that are tried, and with broken stand-ins of each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lowvram_video
import pytest
from lowvram_video.doctor.fixes import fix_flash, fix_kitchen, fix_sage, fix_triton
from lowvram_video.doctor.installed import Installed

pytestmark = pytest.mark.slow

TRIED = ("triton", "sageattention", "sageattn3", "flash_attn", "flash_attn_interface", "comfy_kitchen")
LINES = {
    "triton": "Triton",
    "sageattention": "attention: SageAttention",
    "flash_attn": "attention: FlashAttention 2",
    "comfy_kitchen": "comfy-kitchen",
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has what this one has, but for what doctor tries."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    packages = _packages(folder)
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name.lower().replace("-", "_").startswith(TRIED) or entry.name == "__pycache__":
            continue
        try:
            (packages / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
        except FileExistsError:
            continue
        except OSError:
            pytest.skip("no links can be made here, and copies would take gigabytes")
    (found,) = [path for path in folder.glob("*/python*") if path.stem == "python"]
    return found


def _packages(folder: Path) -> Path:
    (found,) = [*folder.glob("lib/python*/site-packages"), *folder.glob("Lib/site-packages")]
    return found


@pytest.fixture
def stand_ins(python: Path) -> Iterator[Path]:
    """Where packages are put that are gone again afterwards."""
    packages = _packages(python.parents[1])
    yield packages
    for name in TRIED:
        shutil.rmtree(packages / name, ignore_errors=True)


def examined(python: Path) -> tuple[int, dict[str, Any]]:
    """Doctor's exit status there, and its lines by name."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["PYTHONPATH"] = str(Path(lowvram_video.__file__).parents[1])
    command = [str(python), "-m", "lowvram_video.cli", "doctor", "--device", "cpu", "--json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ended.stdout.startswith("{"), ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.returncode, {line["name"]: line for line in json.loads(ended.stdout)["findings"]}


def commands(python: Path) -> Mapping[str, str]:
    """What mends each of them there."""
    here = replace(Installed(), executable=str(python))
    return {
        "triton": fix_triton(here),
        "sageattention": fix_sage(here),
        "flash_attn": fix_flash(here, "flash_attn"),
        "comfy_kitchen": fix_kitchen(here),
    }


def test_without_any(python: Path) -> None:
    status, lines = examined(python)
    assert status == 0, "PyTorch alone is enough"
    assert lines["PyTorch"]["state"] == lines["attention: sdpa"]["state"] == "good"
    for package, command in commands(python).items():
        line = lines[LINES[package]]
        assert "is not installed" in line["text"], line
        assert line["state"] == ("told" if package == "flash_attn" else "bad"), line
        if line["state"] == "bad":
            assert line["fix"] == command


STAND_INS = {
    "raises": "raise OSError('libcudart.so.11.0: cannot open shared object file')",
    "misses another": "import a_package_that_is_not_there",
    "aborts": "import os\nos.abort()",
    "is empty": "",
    "is cut off": "def f(:",
}
WORDS = {
    "raises": "cannot be imported (OSError: libcudart.so.11.0",
    "misses another": "misses a_package_that_is_not_there",
    "aborts": "takes the process with it",
    "is empty": "has no ",
    "is cut off": "SyntaxError",
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_with_broken_stand_ins_of_all(python: Path, stand_ins: Path, kind: str) -> None:
    for package in LINES:
        (stand_ins / package).mkdir()
        (stand_ins / package / "__init__.py").write_text(STAND_INS[kind])
    status, lines = examined(python)
    assert status == 0 and lines["attention: sdpa"]["state"] == "good"
    for package, command in commands(python).items():
        line = lines[LINES[package]]
        assert line["state"] == "bad" and WORDS[kind] in line["text"], line
        if kind == "misses another":
            assert line["fix"].endswith(" -m pip install a_package_that_is_not_there"), line
        else:
            assert line["fix"] == command.replace("pip install", "pip install --force-reinstall --no-deps"), line


def test_python_of_this_environment_is_another(python: Path) -> None:
    """Else the test shows nothing."""
    assert python.resolve() == Path(sys.executable).resolve() and str(python) != sys.executable
