"""Compiled code that outlives the process: what torch.compile made, in a file of the user's data folder.

A file is of one torch, Triton, GPU, version of this package, settings and model; another's is never read. It begins
with a line that says what it is, and the digest of the rest: what is damaged is made anew. The rest are parts, one for
each pass that made code that was not there. PyTorch reads them by pickle, so it is trusted as the user's own files are.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..system.atomic_files import write_file
from ..system.bounded_json import read_json_object
from ..system.card_profile import data_folder
from ..system.sizes import in_gib
from ..system.version import version, version_of
from .folders import files_in
from .settings import CompileSettings

logger = logging.getLogger(__name__)

START = b"lowvram-video compiled code 2 "  # and the SHA-256 of what follows the line
MOST_BYTES = 2 << 30  # of all files together
ENDING, LAST_ENDING = ".code", ".last.json"
MOST_LAST_BYTES = 1 << 16
LENGTH_BYTES = 8  # before each part
# What is compiled, how often and what to do without: profiles differ in it, and share the code.
NO_CODE = ("profile", "notes", "fullgraph", "transformer_blocks_only", "cache_size_limit", "recompile_limit")
TRITON_NAMES = ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm")


@dataclass(frozen=True)
class CodeKey:
    """What compiled code is of. `model` tells networks apart whose code differs."""

    torch: str
    triton: str
    gpu: str
    package: str
    settings: str
    model: str

    @property
    def stem(self) -> str:
        """The name of its files: the card's for people, and what tells the rest apart."""
        name = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-") or "card"
        return f"{name}-{hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]}"


def key_of(settings: CompileSettings, device: torch.device, model: str) -> CodeKey:
    """The key of this machine's code for a model."""
    gpu = "cpu"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        gpu = f"{torch.cuda.get_device_name(device)} {major}.{minor}"
    told = {name: value for name, value in asdict(settings).items() if name not in NO_CODE}
    return CodeKey(str(torch.__version__), triton_version(), gpu, version(), json.dumps(told, sort_keys=True), model)


def triton_version() -> str:
    """Of the package that is installed, which need not work; "none" without one."""
    return next(filter(None, map(version_of, TRITON_NAMES)), "none")


def code_folder() -> Path:
    """Where files of compiled code lie."""
    return data_folder() / "compiled"


@contextmanager
def recorded_apart() -> Iterator[None]:
    """What PyTorch compiles, or finds, meanwhile is all that `SavedCode.save` keeps.

    Else it would be all of the process, other models' too, and of what was saved before PyTorch would not read back
    more than the last time's.
    """
    manager: Any = None
    with suppress(ImportError):  # not there before PyTorch 2.7
        manager = importlib.import_module("torch.compiler._cache").CacheArtifactManager
    with getattr(manager, "with_fresh_cache", nullcontext)():
        yield


@dataclass
class SavedCode:
    """The file of one key's code, and what its last run was like."""

    key: CodeKey
    folder: Path
    _known: set[tuple[str, str]] = field(default_factory=set)  # kinds and names of what the file holds

    @property
    def path(self) -> Path:
        return self.folder / f"{self.key.stem}{ENDING}"

    def load(self) -> int:
        """Have PyTorch's caches know what the file holds: its bytes, 0 where there is none or it is no use."""
        load = getattr(torch.compiler, "load_cache_artifacts", None)
        if load is None:
            return 0
        total = 0
        for part in self._parts():
            try:
                info = load(part)
            except OSError as error:
                logger.warning("kept code cannot be used (%s): it is made anew", error)
                return total
            if info is None:
                logger.warning("%s is of another PyTorch: it is ignored, and code is made anew", self.path)
                return total
            self._known |= _names(info)
            total += len(part)
        if total:
            with suppress(OSError):
                os.utime(self.path)  # what was used last is kept longest
        return total

    def save(self) -> int:
        """Keep what was compiled within `recorded_apart`, beside what the file holds: the file's bytes.

        0 where nothing is new, or it could not be kept, which is logged.
        """
        save = getattr(torch.compiler, "save_cache_artifacts", None)
        made = None if save is None else save()
        if made is None:
            return 0
        names = _names(made[1])
        if names <= self._known and self.path.is_file():
            return 0
        parts = [*self._parts(), made[0]]
        while sum(map(len, parts)) > MOST_BYTES and len(parts) > 1:
            del parts[0]
        content = b"".join(len(part).to_bytes(LENGTH_BYTES, "big") + part for part in parts)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.path, START + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        except OSError as error:
            logger.warning("compiled code cannot be kept in %s (%s): the next start makes it anew", self.folder, error)
            return 0
        self._known |= names
        prune(self.folder, self.path)
        return len(content)

    def _parts(self) -> list[bytes]:
        """What the file holds, none where there is none or it is no use, which is logged."""
        if not self.path.is_file():
            return []
        try:
            content = self.path.read_bytes()
        except OSError as error:
            logger.warning("%s cannot be read (%s): code is made anew", self.path, error)
            return []
        head, _, code = content.partition(b"\n")
        if head != START + hashlib.sha256(code).hexdigest().encode():
            logger.warning("%s is damaged, or no compiled code: it is ignored, and code is made anew", self.path)
            return []
        parts, at = [], 0
        while at < len(code):
            begin = at + LENGTH_BYTES
            at = begin + int.from_bytes(code[at:begin], "big")
            parts.append(code[begin:at])
        return parts

    def last(self) -> dict[str, Any]:
        """Numbers that `keep_last` was given; nothing where there is no such file, or it is damaged."""
        try:
            found = read_json_object(self.folder / f"{self.key.stem}{LAST_ENDING}", MOST_LAST_BYTES)
        except (OSError, ValueError):  # the other where it is no file at all
            return {}
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    def keep_last(self, figures: dict[str, Any]) -> None:
        """Remember a run's figures for the next one."""
        with suppress(OSError):  # they are a convenience
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / f"{self.key.stem}{LAST_ENDING}", json.dumps(figures).encode())


def _names(info: Any) -> set[tuple[str, str]]:
    """Of what PyTorch saved or loaded (`CacheInfo`)."""
    found = vars(info).get("artifacts", vars(info))  # the other in PyTorch 2.6
    return {(kind, name) for kind, names in found.items() for name in names}


def prune(folder: Path, kept: Path, most_bytes: int = MOST_BYTES) -> None:
    """Delete the files that were used longest ago until all together have at most so many bytes; never `kept`."""
    found = []
    for path in files_in(folder, ENDING):
        with suppress(OSError):  # another process deletes too
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            return
        if path != kept:
            with suppress(OSError):
                path.unlink()
                total -= size
                logger.info("%s deleted: compiled code has at most %s", path, in_gib(most_bytes))
