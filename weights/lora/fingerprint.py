"""Whether a LoRA is the one that it was: its file, and the configuration beside it that may say its scale."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ...system.regular_files import read_regular
from ..files.checkpoint import CheckpointError, unreadable
from ..files.fingerprint import fingerprint
from .scaling import MOST_BYTES, configuration_of


def lora_fingerprint(path: Path) -> str:
    """SHA-256, in hex: that of the file (`fingerprint`), or of both where its scale may stand beside it.

    CheckpointError where one of them cannot be read.
    """
    own, beside = fingerprint(path), configuration_of(path)
    if beside is None:
        return own
    try:
        content = read_regular(beside, MOST_BYTES)
    except OSError as error:
        raise CheckpointError(unreadable(beside, error)) from error
    return hashlib.sha256(own.encode("ascii") + content).hexdigest()
