"""Which version of the pack this is, and which ones of other packages are here."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
UNKNOWN = "of unknown version"


def version(project: Path = PROJECT) -> str:
    """That of the folder this runs from; of the installed package where there is no such file, as in site-packages."""
    try:
        stated = re.search(r'^version = "([^"]+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        stated = None
    return stated[1] if stated is not None else version_of("lowvram-video") or UNKNOWN


def version_of(package: str) -> str | None:
    """Of an installed package, None where it is not installed (or lies about without a version)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of these packages; one that is not there is left out."""
    found = {package: version_of(package) for package in packages}
    return {package: version for package, version in found.items() if version is not None}
