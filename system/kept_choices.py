"""What was fastest when it was timed, kept by card, driver and versions, in a file of the user's data folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .atomic_files import write_file
from .bounded_json import JsonError, read_json_object
from .card_profile import card_key, data_folder

logger = logging.getLogger(__name__)

FORMAT = 1  # of the file
MOST_BYTES = 1 << 20  # of it


@dataclass(frozen=True)
class KeptChoices:
    """One file of choices, `what` by name; a damaged one is made anew. `versions` are those of the packages."""

    what: str
    versions: Mapping[str, str]

    def find(self, work: str, device: torch.device) -> str | None:
        """The name of what was fastest; None where the work was not timed with this card and these versions."""
        found = self._read().get(self._key(work, device))
        return found if isinstance(found, str) else None

    def keep(self, work: str, device: torch.device, name: str) -> None:
        """Remember it; where the file cannot be written it is timed again by the next process."""
        choices = self._read() | {self._key(work, device): name}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, json.dumps({"format": FORMAT, "choices": choices}, indent=1).encode())
        except OSError as error:
            logger.info("%s: what was fastest cannot be kept in %s (%s)", self.what, self._path, error)

    @property
    def _path(self) -> Path:
        return data_folder() / f"{self.what}.json"

    def _read(self) -> dict[str, Any]:
        try:
            data = read_json_object(self._path, MOST_BYTES)
        except (OSError, JsonError):
            return {}
        choices = data.get("choices") if data.get("format") == FORMAT else None
        return choices if isinstance(choices, dict) else {}

    def _key(self, work: str, device: torch.device) -> str:
        """The card, its driver and torch, packages, and the work; readable but for the versions."""
        card = card_key(device)
        told = {"card": asdict(card), "packages": dict(self.versions)}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        return f"{work}, {card.gpu}, {digest}"
