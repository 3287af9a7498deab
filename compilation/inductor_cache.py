"""Inductor's own cache of graphs and kernels, which it leaves in the user's temporary folder."""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .folders import files_in, folders_in, tree_bytes

OWN = "torchinductor_"  # begins the name of the folder that nobody chose
# What inductor makes in its folder: by these names, and by digests, two letters of which name a folder of files.
NAMES = frozenset(("aoti_eager", "aotautograd", "cutedsl", "fxgraph", "precompiled_headers"))
COMMON_NAMES = frozenset(("cache", "dynamo", "locks", "triton"))  # in a folder that the user named, maybe the user's
DIGESTS = re.compile(r"[a-z2-7]{2}")


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
        return cls(Path(tempfile.gettempdir()) / (OWN + re.sub(r'[\\/:*?"<>|]', "_", _user())))

    def parts(self) -> list[Path]:
        """The folders in it that are inductor's; whatever else lies there is somebody's own."""
        names = NAMES | COMMON_NAMES if self.folder.name.startswith(OWN) else NAMES
        return [path for path in folders_in(self.folder) if path.name in names or _is_of_digests(path)]

    def nbytes(self) -> int:
        return sum(map(tree_bytes, self.parts()))


def _is_of_digests(folder: Path) -> bool:
    """Whether there are files in it, all named by digests that name the folder, as `c2xabc….py` is in `2x`."""
    if not DIGESTS.fullmatch(folder.name):
        return False
    files = files_in(folder, "")
    return bool(files) and all(path.name[1:3] == folder.name for path in files)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        getuid = getattr(os, "getuid", None)
        return f"uid_{getuid()}" if callable(getuid) else "unknown_user"
