"""The test modules of `inside/`, in a process of ComfyUI's own Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

INSIDE = Path(__file__).parent / "inside"


@pytest.mark.timeout(1200)
def test_inside(comfyui: Any, tmp_path: Path) -> None:
    environment = os.environ | {"COMFYUI_DIR": str(comfyui.folder), "OMP_NUM_THREADS": "1"}
    if not comfyui.is_newest:
        environment["COMFYUI_IS_OLDER"] = "1"
    command = [str(comfyui.python), "-m", "pytest", "-c", str(INSIDE / "pytest.ini"), "--rootdir", str(INSIDE), "-s"]
    done = subprocess.run(
        [*command, "--durations=10", "--basetemp", str(tmp_path / "pytest"), str(INSIDE)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    print("\n".join(line for line in done.stdout.splitlines() if "it/s]" not in line))
    if "No module named pytest" in done.stderr:
        pytest.skip(f"pytest is not installed in {comfyui.python}: pip install pytest there")
    assert done.returncode == 0, f"under ComfyUI {comfyui.version}:\n{done.stdout[-12000:]}{done.stderr[-3000:]}"
