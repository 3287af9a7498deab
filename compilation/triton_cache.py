"""Triton's own cache of kernels, of which another version's are never used again and never deleted by it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .saved_code import triton_version

MOST_BYTES = 1 << 20  # of what Triton writes about a kernel


@dataclass(frozen=True)
class TritonCache:
    """The folder: one below it for each kernel, with a JSON that names the version that made it."""

    folder: Path
    version: str

    @classmethod
    def here(cls) -> TritonCache:
        """This user's, as Triton finds it."""
        named = os.environ.get("TRITON_CACHE_DIR")
        home = Path(os.environ.get("TRITON_HOME") or Path.home())
        return cls(Path(named) if named else home / ".triton" / "cache", triton_version())

    def stale(self) -> list[Path]:
        """Folders of kernels that another version made; none where Triton is not installed: it may come back."""
        if self.version == "none":
            return []
        return [folder for folder in self._folders() if self._is_stale(folder)]

    def nbytes(self) -> int:
        return sum(tree_bytes(folder) for folder in self._folders())

    def _folders(self) -> Iterator[Path]:
        with suppress(OSError):
            yield from sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink())

    def _is_stale(self, folder: Path) -> bool:
        versions = {version for path in folder.glob("*.json") if (version := _version_in(path))}
        return bool(versions) and _release(self.version) not in {_release(each) for each in versions}


def _release(version: str) -> str:
    """Without what packages add to it: triton-windows 3.5.0.post21 writes 3.5.0."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found[0] if found else version


def _version_in(path: Path) -> str:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return ""
    version = found.get("triton_version") if isinstance(found, dict) else None
    return version if isinstance(version, str) else ""


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what goes meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size if path.is_file() else 0
    return total


def delete(folder: Path) -> int:
    """Delete a folder; the bytes that are gone."""
    before = tree_bytes(folder)
    shutil.rmtree(folder, ignore_errors=True)  # another process may use it, or delete it too
    return before - (tree_bytes(folder) if folder.exists() else 0)
