"""The whole examination, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..runtime.progress import Progress
from ..system.card_links import numbered
from ..system.kernel_choice import brief
from ..system.triton_errors import triton_errors
from .apart import tried_apart
from .comfyui_checks import check_comfyui
from .finding import Finding, Findings
from .installed import Installed
from .kernel_checks import check_kernels
from .memory_checks import check_memory
from .system_checks import check_system
from .trials import TRIALS


@dataclass(frozen=True)
class Examination:
    """What is examined: a device, the disk of a folder of models (None: no disk), and ComfyUI where it asks.

    `comfyui` is its version and its command line's values by name.
    """

    device: torch.device
    models: Path | None = None
    comfyui: tuple[str, Mapping[str, Any]] | None = None
    here: Installed = field(default_factory=Installed)
    trials: Sequence[str] = tuple(TRIALS)

    def run(self, progress: Progress = Progress()) -> Findings:  # noqa: B008 - immutable
        """Try everything. What a part raises is a finding of that part."""
        lines: list[Finding] = []
        device = numbered(self.device)
        progress.begin("system")
        lines += check_system(self.here, device)
        progress.begin("memory")
        try:
            lines += check_memory(self.here, device, self.models)
        except triton_errors() as error:
            text = f"cannot be measured ({brief(error)})"
            lines.append(Finding("Memory", "memory", "bad", text, "restart the machine"))
        progress.begin("kernels")
        lines += check_kernels(self.here, device, tried_apart(self.trials, str(device)))
        if self.comfyui is not None:
            lines += check_comfyui(*self.comfyui)
        progress.end()
        return Findings(tuple(lines))
