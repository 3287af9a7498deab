"""Inductor's own cache of graphs and kernels, which it leaves in the user's temporary folder."""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .folders import folders_in, tree_bytes

# What inductor makes in its folder: by the digests of its files, and by these names.
DIGESTS = re.compile(r"[a-z2-7]{2}")
NAMES = frozenset(
    ("aoti_eager", "aotautograd", "cache", "cutedsl", "dynamo", "fxgraph", "locks", "precompiled_headers", "triton")
)


@dataclass(frozen=True)
class InductorCache:
    """The folder: what code of any program of this user's was made of, found again by the next one that wants it."""

    folder: Path

    @classmethod
    def here(cls) -> InductorCache:
        """This user's, as PyTorch finds it, whose own function would import the compiler."""
        named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        if named:
            return cls(Path(named).absolute())
        return cls(Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", _user())))

    def parts(self) -> list[Path]:
        """The folders in it that are inductor's; whatever else lies there is somebody's own."""
        return [path for path in folders_in(self.folder) if path.name in NAMES or DIGESTS.fullmatch(path.name)]

    def nbytes(self) -> int:
        return sum(map(tree_bytes, self.parts()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        getuid = getattr(os, "getuid", None)
        return f"uid_{getuid()}" if callable(getuid) else "unknown_user"
