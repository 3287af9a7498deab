"""The node that says what of this machine works, and how to mend the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..doctor.bug_report import bug_report
from ..doctor.examine import Examination
from ..system.atomic_files import write_file
from .bridge import host
from .inputs import ADVANCED


class Doctor(io.ComfyNode):
    """Tries what this machine has."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMDoctor",
            display_name="Doctor (Low VRAM)",
            description="Tries what this machine has: PyTorch, the driver, Triton, attention packages, memory and the "
            "link, and says how to mend what does not work. Takes about a minute.",
            search_aliases=[
                "doctor", "diagnose", "triton", "sageattention", "sage attention", "flash attention", "install",
                "bug report", "out of memory", "low vram",
            ],
            is_output_node=True,
            inputs=[
                io.Boolean.Input(
                    "read_disk", default=False,
                    tooltip="Read a gigabyte of the largest model file too: how fast models stream from the disk.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "save_report", default=False,
                    tooltip="Write the file for a bug report into the output folder: without prompts, user names and "
                    "home folders.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.String.Output("report")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # never equal: what is free and installed changes

    @classmethod
    def execute(cls, read_disk: bool = False, save_report: bool = False) -> io.NodeOutput:
        models = host.models_folder() if read_disk else None
        findings = Examination(host.compute_device(), models, host.about_comfyui()).run()
        text = findings.text()
        if save_report:
            path = host.output_path("lowvram_doctor", ".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, bug_report(findings).encode() + b"\n")
            text += f"\n\nFor a bug report: {_shown(path)}"
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _shown(path: Path) -> str:
    """A file of the output folder, as people find it there."""
    return (Path("output") / path.name).as_posix()
