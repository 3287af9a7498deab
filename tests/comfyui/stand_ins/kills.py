"""For tests only: this server kills itself at an exact point of what follows."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

CHANGES = ("os.rename", "os.remove", "os.mkdir")
WRITES = os.O_WRONLY | os.O_RDWR


class KillAt(io.ComfyNode):
    """Passes a MODEL on; `kill -9` strikes at the n-th change of a file in the output folder from here on. 0: never."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestKillAt",
            inputs=[io.Model.Input("model"), io.Int.Input("at", default=0)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, at: int) -> io.NodeOutput:
        if at:
            _arm(at, str(Path(folder_paths.get_output_directory()).resolve()))
        return io.NodeOutput(model)


def _arm(at: int, folder: str) -> None:
    seen = 0

    def audit(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = given
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            path = given[0]
        else:
            return
        if isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)).startswith(folder):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    sys.addaudithook(audit)
