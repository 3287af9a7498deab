"""Doctor in a real ComfyUI: what it shows, its flags, and the file for a bug report."""

from __future__ import annotations

import json
from pathlib import Path

import comfyui_version
import folder_paths
import pytest
from lowvram_pack.nodes.doctor import Doctor


@pytest.mark.newest
def test_the_node_tries_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    out = Doctor.execute(read_disk=False, save_report=True)
    text = out.result[0]
    assert out.ui.as_dict()["text"] == (text,)
    assert comfyui_version.__version__ in text and "✓ attention: sdpa" in text and "--cpu" in text
    (report,) = tmp_path.glob("lowvram_doctor*.json")
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["can_generate"] and str(Path.home()) not in report.read_text(encoding="utf-8")
