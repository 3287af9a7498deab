"""What is installed here: the system, Python and torch, as commands depend on them."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Installed:
    """Versions and places; tests hand in others. `torch_needs` is what torch's wheel asks for.

    `anew`: commands are for packages that are installed but broken.
    """

    platform: str = sys.platform
    system: str = field(default_factory=lambda: f"{platform.system()} {platform.release()} ({platform.machine()})")
    python: tuple[int, ...] = tuple(sys.version_info[:3])
    executable: str = sys.executable or "python"
    torch: str = field(default_factory=lambda: str(torch.__version__))
    cuda: str | None = field(default_factory=lambda: torch.version.cuda)
    torch_needs: tuple[str, ...] = field(default_factory=lambda: _needs("torch"))
    headers: Path = field(default_factory=lambda: Path(sysconfig.get_path("include")) / "Python.h")
    libraries: Path = field(default_factory=lambda: Path(sys.base_prefix) / "libs")
    anew: bool = False

    @property
    def torch_minor(self) -> str:
        """Such as 2.11; "" for what is no release."""
        match = re.match(r"(\d+\.\d+)\.", self.torch)
        return match[1] if match else ""

    @property
    def is_portable(self) -> bool:
        """Whether this is Windows' embeddable Python, as in ComfyUI's portable build."""
        folder = Path(self.executable).parent
        return self.platform == "win32" and any(folder.glob("python3*._pth"))

    def pip(self, words: str) -> str:
        """The command that installs into this very Python."""
        python = f'"{self.executable}"' if " " in self.executable else self.executable
        anew = "--force-reinstall --no-deps " if self.anew else ""  # what it needs is there; torch stays as it is
        return f"{python} {'-s ' if self.is_portable else ''}-m pip install {anew}{words}"


def _needs(package: str) -> tuple[str, ...]:
    try:
        return tuple(importlib.metadata.requires(package) or ())
    except importlib.metadata.PackageNotFoundError:
        return ()
