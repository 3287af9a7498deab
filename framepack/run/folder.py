"""A run's folder: every finished section in a file of its own, so that a long video goes on where it stopped."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ...system.atomic_files import write_file
from ...system.bounded_json import JsonError, read_json_object
from ...system.content_key import plain, readable, run_key
from ...system.plain_text import printable
from ...system.run_lock import RunLock, now
from ...system.sizes import GIB, in_gib
from ...weights.files.records import read_record

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files: another number is another run
SAFE_PATH = "safe_path"
MOST_BYTES = 1 << 22  # of settings.json


class RunError(OSError):
    """A run's file could not be written or read."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


@dataclass(frozen=True)
class StoredSection:
    """What a section left: its latents, and the state of the noise generator after it.

    `safe_path`: the run had taken the safe path by then, as what came before it was no use.
    """

    latents: Tensor
    generator_state: Tensor
    safe_path: bool = False


class RunStore:
    """The sections of one run, in `root/<first 16 letters of the key>`; a context manager that holds the folder's lock.

    Each section is one file that is there whole or not at all, with the run's key and the checksum of the section
    before it: the first `completed` sections are exactly what one run with these settings made. A file that is
    damaged, cut off or of another run ends them there. Nothing of it is ever deleted.
    """

    def __init__(self, folder: Path, key: str, total_sections: int, lock: RunLock) -> None:
        """Use `open`."""
        self.folder, self.key, self.total_sections = folder, key, total_sections
        self._lock = lock
        self._checksums: list[str] = []

    @classmethod
    def open(cls, root: Path, settings: Mapping[str, Any], total_sections: int) -> RunStore:
        """The run with these settings: its folder is made, or what is there is checked.

        `settings` is all that the result depends on, JSON values and tensors. Raises ValueError where the folder
        cannot be written, where a setting has no stable form, and where another process works on the run; RunError
        where the disk is full.
        """
        key = run_key({"format": FORMAT, "total_sections": total_sections, "settings": run_key(settings)})
        folder = root / key[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = cls(folder, key, total_sections, RunLock(folder / "lock"))
        except OSError as error:
            raise ValueError(
                f"the run's folder {folder} cannot be written ({error.strerror or error}): "
                "check the free space and the rights, or choose another output folder"
            ) from error
        try:
            run._describe(settings)
        except RunError:
            run.close()
            raise
        run._find_sections()
        return run

    @property
    def completed(self) -> int:
        """How many sections, counted from the first, are there and sound."""
        return len(self._checksums)

    def save_section(self, index: int, latents: Tensor, generator_state: Tensor, safe_path: bool = False) -> None:
        """Store section `index`, exactly as its tensors are; later ones are no longer counted.

        Returns when the file is on the disk. Raises ValueError for a section out of order and RunError, with the
        sections before untouched, where the file cannot be written.
        """
        if not 0 <= index <= min(self.completed, self.total_sections - 1):
            raise ValueError(
                f"section {index} cannot be stored in {self.folder}: of {self.total_sections} sections the next "
                f"is number {self.completed}"
            )
        # clones, because the format refuses tensors that share memory
        tensors = {"latents": plain(latents).clone(), "generator_state": plain(generator_state).clone()}
        checksum = self._checksum(index, tensors, safe_path)
        metadata = {"key": self.key, "index": str(index), "checksum": checksum}
        metadata |= {SAFE_PATH: "1"} if safe_path else {}
        path = self._path(index)
        try:
            write_file(path, save(tensors, metadata))
        except OSError as error:
            raise RunError(
                f"{path}: section {index} cannot be stored ({error.strerror or error}): check the free space and the "
                f"rights of that folder and start again; the {index} sections before it are kept"
            ) from error
        self._checksums[index:] = [checksum]

    def load(self, index: int) -> StoredSection:
        """StoredSection `index` with its tensors as they were stored. Raises ValueError for one that is not there, and
        RunError where its file was damaged since the run was opened."""
        if not 0 <= index < self.completed:
            raise ValueError(f"{self.folder} has no section {index}: {self.completed} are there, counted from 0")
        try:
            return self._read(index)[0]
        except RunError as error:
            raise RunError(f"{error}: start again, and the run goes on from section {index}") from error

    def check_free_space(self, section_bytes: int, other_bytes: int = 0) -> None:
        """ValueError where the disk has no room for the missing sections, and `other_bytes` (the film); a warning
        where it is left nearly full."""
        free = shutil.disk_usage(self.folder).free
        needed = (self.total_sections - self.completed) * section_bytes + other_bytes
        if free < needed:
            raise ValueError(
                f"{self.folder} has room for {in_gib(free)}, and this run needs about {in_gib(needed)}: "
                "free some space, choose another output folder or make a shorter video"
            )
        if free < needed + GIB:
            logger.warning("%s: this run leaves about %s free", self.folder, in_gib(free - needed))

    def finish(self) -> None:
        """Mark the run complete; its files stay. ValueError where sections are missing."""
        if self.completed < self.total_sections:
            raise ValueError(
                f"{self.folder} is not finished: it has {self.completed} of {self.total_sections} sections"
            )
        description = self._read_description()
        self._write_description(description | {"finished": description.get("finished") or now()})

    def close(self) -> None:
        """Let other processes open the run; calling it again does nothing."""
        self._lock.release()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, index: int) -> Path:
        return self.folder / f"section_{index:03d}.safetensors"

    def _find_sections(self) -> None:
        for leftover in self.folder.glob("*.partial"):
            with suppress(OSError):  # it will be written over
                leftover.unlink()
        while self.completed < self.total_sections and self._path(self.completed).exists():
            try:
                self._checksums.append(self._read(self.completed)[1])
            except RunError as error:
                logger.warning("%s: the run goes on from section %d", error, self.completed)
                break
        if self.completed:
            logger.info("%s: %d of %d sections are there", self.folder, self.completed, self.total_sections)

    def _read(self, index: int) -> tuple[StoredSection, str]:
        """The section and its checksum; RunError says what is wrong with its file."""
        path = self._path(index)
        try:
            tensors, metadata = read_record(path)
            latents, generator_state = tensors["latents"], tensors["generator_state"]
        except (OSError, ValueError, KeyError) as error:
            raise RunError(printable(f"{path} cannot be read ({error})")) from error
        if metadata.get("key") != self.key:
            raise RunError(f"{path} is of a run with other settings")
        safe_path = SAFE_PATH in metadata
        checksum = self._checksum(index, tensors, safe_path)
        if metadata.get("checksum") != checksum:
            raise RunError(f"{path} is damaged, or does not follow the section before it")
        return StoredSection(latents, generator_state, safe_path), checksum

    def _checksum(self, index: int, tensors: Mapping[str, Tensor], safe_path: bool) -> str:
        before = self._checksums[index - 1] if index else ""
        path = {SAFE_PATH: True} if safe_path else {}
        return run_key({"run": self.key, "index": index, "before": before, "tensors": tensors, **path})

    def _describe(self, settings: Mapping[str, Any]) -> None:
        """Write settings.json, for people, without prompts: nothing is read from it but what `finish` wrote."""
        there = self._read_description()
        if there.get("key") != self.key:
            there = {}
        description = {
            "key": self.key,
            "started": there.get("started", now()),
            "finished": there.get("finished"),
            "total_sections": self.total_sections,
            "settings": readable(settings, self.key),
        }
        self._write_description(description)

    def _read_description(self) -> dict[str, Any]:
        try:
            return read_json_object(self.folder / "settings.json", MOST_BYTES, finite=False)
        except (OSError, JsonError):
            return {}

    def _write_description(self, description: Mapping[str, Any]) -> None:
        path = self.folder / "settings.json"
        try:
            # escapes, because a prompt may hold half a character, which no file can
            write_file(path, json.dumps(description, indent=1).encode("ascii"))
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error.strerror or error}): check the free space") from error
