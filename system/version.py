"""Which version of the pack this is."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
UNKNOWN = "of unknown version"


def version(project: Path = PROJECT) -> str:
    """That of the folder this runs from; of the installed package where there is no such file, as in site-packages."""
    try:
        stated = re.search(r'^version = "([^"]+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        stated = None
    if stated is not None:
        return stated[1]
    try:
        return importlib.metadata.version("lowvram-video")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
