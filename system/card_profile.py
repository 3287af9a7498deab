"""What was measured of a card: products, attention, copies and disk, kept in a file per card and read by plans.

A profile is of one GPU under one torch and driver; another's is never used. Files lie in the user's data folder
(`data_folder`), where `lowvram-video bench` puts them; the format is `benchmarks/cards/schema.json`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import platform
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch

from .atomic_files import write_file
from .bounded_json import JsonError, read_json
from .plain_text import short, shown

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 24  # of a file
FORMAT = 1  # of the file; another one is made anew
DATA_VARIABLE = "LOWVRAM_VIDEO_DATA"
REMEDY = "measure the card again: lowvram-video bench"

D = TypeVar("D")


class ProfileError(ValueError):
    """A file that holds no profile of a card."""


@dataclass(frozen=True)
class CardKey:
    """What a profile is of. `capability` and `driver` are empty on a CPU; `driver` is the CUDA version it brings."""

    gpu: str
    capability: str
    torch: str
    driver: str

    def __str__(self) -> str:
        parts = [f"compute capability {self.capability}" if self.capability else "", f"torch {self.torch}"]
        return ", ".join([self.gpu, *filter(None, parts), *([f"driver for CUDA {self.driver}"] if self.driver else [])])


@dataclass(frozen=True)
class ProductRow:
    """One linear layer `[rows, inputs] -> [rows, outputs]` in a form (`WeightFormat.name`).

    `prepare_milliseconds` is for unpacking the weight, once a pass; `milliseconds` for everything done with the rows,
    quantising them included. `relative_error` is to the product of the weight as it was before it was stored in this
    form, in fp32. A row with a `problem` has no figures.
    """

    form: str
    inputs: int
    outputs: int
    rows: int
    milliseconds: float | None = None
    prepare_milliseconds: float | None = None
    tflops: float | None = None
    relative_error: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class AttentionRow:
    """Attention of `queries` over `keys`, so many heads of 128; the error is to attention in fp32."""

    backend: str
    heads: int
    queries: int
    keys: int
    milliseconds: float | None = None
    tflops: float | None = None
    relative_error: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class LinkRow:
    """Copies one way (see `WAYS`), decimal GB/s; those within the device count what is read and what is written."""

    way: str
    gbps: float | None = None
    problem: str | None = None


H2D_PINNED, H2D_PAGEABLE = "host to device, pinned", "host to device, pageable"
D2H_PINNED, D2H_PAGEABLE = "device to host, pinned", "device to host, pageable"
WITHIN = "within the device"
WAYS = (H2D_PINNED, H2D_PAGEABLE, D2H_PINNED, D2H_PAGEABLE, WITHIN)


@dataclass(frozen=True)
class DiskRow:
    """Reading `read_bytes` of a model file, past the page cache where `direct`."""

    read_bytes: int
    direct: bool
    gbps: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class StepRow:
    """What one pass of a model takes by these measurements in a VRAM budget (None: all of it in RAM, on a CPU).

    A step without guidance is one pass, one with guidance two.
    """

    model: str
    form: str
    width: int
    height: int
    frames: int
    budget_gib: float | None
    num_blocks: int
    num_streamed: int | None = None
    seconds: float | None = None
    compute_seconds: float | None = None
    transfer_seconds: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class CardProfile:
    """Everything that was measured of a card; not `complete` where somebody stopped it."""

    format: int
    card: CardKey
    date: str  # ISO
    memory_bytes: int  # the card's, or RAM on a CPU
    quick: bool
    complete: bool
    products: tuple[ProductRow, ...] = ()
    attention: tuple[AttentionRow, ...] = ()
    link: tuple[LinkRow, ...] = ()
    disk: tuple[DiskRow, ...] = ()
    steps: tuple[StepRow, ...] = ()

    def __str__(self) -> str:
        return f"{self.card.gpu}, measured {self.date}"

    def gbps(self, way: str) -> float | None:
        """The rate of copies one way, None where it was not measured."""
        return next((row.gbps for row in self.link if row.way == way and row.gbps), None)

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode() + b"\n"


# --- files ---------------------------------------------------------------------------------------------------------


def data_folder() -> Path:
    """Where the user's own data of this program lies; LOWVRAM_VIDEO_DATA names another folder."""
    named = os.environ.get(DATA_VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "lowvram-video"


def profile_path(card: CardKey) -> Path:
    """The file of a card's profile: its name for people, and what tells torch and driver apart."""
    name = re.sub(r"[^a-z0-9]+", "-", card.gpu.lower()).strip("-") or "card"
    told = hashlib.sha256(json.dumps(asdict(card), sort_keys=True).encode()).hexdigest()[:8]
    return data_folder() / "cards" / f"{name}-{told}.json"


def save_profile(profile: CardProfile) -> Path:
    """Keep a profile for plans on this card; returns its file. OSError as the system's."""
    path = profile_path(profile.card)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, profile.to_json())
    return path


def saved_profile(card: CardKey) -> CardProfile | None:
    """The profile of exactly this card; None, with a warning where its file is damaged, without one."""
    path = profile_path(card)
    if not path.is_file():
        return None
    try:
        profile = load_profile(path)
    except (ProfileError, OSError) as error:
        logger.warning("what was measured of this card is not used: %s", error)
        return None
    if profile.card != card:
        logger.warning("%s is of another card (%s) and not used; %s", path, profile.card, REMEDY)
        return None
    return profile


def profile_of(device: torch.device) -> CardProfile | None:
    """What was measured of a device, None where nothing was or there is no such device."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    return saved_profile(card_key(device))


def load_profile(path: Path) -> CardProfile:
    """A profile from any file of the format. ProfileError says what is wrong with it, OSError as the system's."""
    try:
        data = read_json(path, MOST_BYTES, finite=False)
    except JsonError as error:
        raise ProfileError(
            f"{path} is no profile of a card, as there is no JSON to read in it: {error}; {REMEDY}"
        ) from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ProfileError(
            f"{path} is no profile of a card that this version reads (its format is {shown(found)}, expected "
            f"{FORMAT}); {REMEDY}"
        )
    try:
        return _parse(CardProfile, data, "")
    except ProfileError as error:
        raise ProfileError(f"{path} is no profile of a card: {error}; {REMEDY}") from error


def card_key(device: torch.device) -> CardKey:
    """The device, torch and driver as they are here."""
    if device.type != "cuda":
        name = platform.processor() or platform.machine() or "unknown"
        return CardKey(f"CPU ({name})", "", torch.__version__, "")
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return CardKey(torch.cuda.get_device_name(device), capability, torch.__version__, driver_version())


def driver_version() -> str:
    """The CUDA version that NVIDIA's driver brings, such as 13.0; "" where it does not say."""
    version = ctypes.c_int(0)
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else ""


# --- reading JSON into the classes above ---------------------------------------------------------------------------


def _parse(kind: type[D], data: object, where: str) -> D:
    """`data` as a dataclass of simple fields, others of its kind, and tuples of those."""
    if not isinstance(data, dict):
        raise ProfileError(f"{where or 'the file'} holds {_shown(data)}, expected an object")
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ProfileError(f"{where or 'the file'} holds {shown(unknown[0])}, which is not known")
    values = {name: _value(hints[name], data[name], f"{where}.{name}".lstrip(".")) for name in known & set(data)}
    try:
        return kind(**values)
    except TypeError as error:  # something without a default is missing
        raise ProfileError(f"{where or 'the file'} is not whole ({error})") from error


def _value(hint: Any, data: object, where: str) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(data, list):
            raise ProfileError(f"{where} is {_shown(data)}, expected a list")
        (kind, _) = get_args(hint)
        return tuple(_parse(kind, row, f"{where}[{index}]") for index, row in enumerate(data))
    if is_dataclass(hint):
        return _parse(hint, data, where)  # type: ignore[arg-type]
    allowed: Sequence[Any] = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if data is None and type(None) in allowed:
        return None
    if float in allowed and isinstance(data, int | float) and not isinstance(data, bool):
        if not 0 <= data < float("inf"):
            raise ProfileError(f"{where} is {data}, expected a number from 0 up")
        return float(data)
    if isinstance(data, bool) if bool in allowed else isinstance(data, tuple(allowed)) and not isinstance(data, bool):
        if isinstance(data, int) and data < 0:
            raise ProfileError(f"{where} is {data}, expected a number from 0 up")
        return data
    raise ProfileError(f"{where} is {_shown(data)}, expected {' or '.join(_named(kind) for kind in allowed)}")


def _named(kind: Any) -> str:
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "null")


def _shown(data: object) -> str:
    return short(json.dumps(data), 40)
