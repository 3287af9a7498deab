"""Triton's own cache of kernels, of which another version's are never used again and never deleted by it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .folders import files_in, folders_in, tree_bytes
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
        return [folder for folder in folders_in(self.folder) if self._is_stale(folder)]

    def nbytes(self) -> int:
        return sum(map(tree_bytes, folders_in(self.folder)))

    def _is_stale(self, folder: Path) -> bool:
        versions = {version for path in files_in(folder, ".json") if (version := _version_in(path))}
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
