"""What to make of a video, and of which files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...weights.files.checkpoint import CheckpointError
from ...weights.files.kinds import file_kind
from ...weights.files.open import open_checkpoint
from ...weights.lora.file import LoraChoice
from ..network.windows import WindowSettings
from .colour import COLOUR_FIXES

SCALES = (2, 3, 4)
VERSIONS = ("1.1", "1")
FIT = 128  # sides of what the network makes are multiples of it: 8 tokens of 16 pixels
LOCAL_RANGES = (9, 11)
MOST_KEPT = 8


@dataclass(frozen=True)
class UpscaleRequest:
    """How a video is enlarged, `scale` times.

    `version` is FlashVSR's: the files of 1 and 1.1 look the same. `colour` is one of COLOUR_FIXES. See
    `WindowSettings` for `sparse_ratio` and `local_range`; `kept_windows` of two latent frames are remembered.
    """

    scale: int = 2
    seed: int = 0
    version: str = "1.1"
    colour: str = "adain"
    sparse_ratio: float = 2.0
    local_range: int = 11
    kept_windows: int = 3

    def check(self) -> None:
        """ValueError for what cannot be done."""
        for name, value, allowed in (
            ("scale", self.scale, SCALES),
            ("version", self.version, VERSIONS),
            ("colour", self.colour, tuple(COLOUR_FIXES)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(str, allowed))}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}: use a whole number from 0 to {2**64 - 1}")
        for name, number, least, most in (
            ("sparse_ratio", self.sparse_ratio, 0.0, 16.0),
            ("local_range", self.local_range, 1, 101),
            ("kept_windows", self.kept_windows, 1, MOST_KEPT),
        ):
            if not least <= number <= most:
                raise ValueError(f"{name} is {number}; expected {least:g} to {most:g}")

    @property
    def is_causal(self) -> bool:
        """Whether the projection sees frames before its clip."""
        return self.version != "1"

    @property
    def windows(self) -> WindowSettings:
        return WindowSettings(self.sparse_ratio, self.local_range)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what is made of a video of this size."""
        return self.scale * width, self.scale * height


def padded(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height as the network makes them."""
    width, height = (-(-side // FIT) * FIT for side in size)
    return width, height


@dataclass(frozen=True)
class UpscaleFiles:
    """FlashVSR's four files: its Wan transformer, its projection, its decoder, and its encoded prompt.

    `loras` are for the transformer.
    """

    model: Path
    projection: Path
    decoder: Path
    prompt: Path
    loras: tuple[LoraChoice, ...] = ()


PROJECTION, DECODER, PROMPT = "flashvsr projection", "flashvsr decoder", "encoded prompt"
NAMES = {
    PROJECTION: "LQ_proj_in.safetensors",
    DECODER: "TCDecoder.safetensors",
    PROMPT: "Prompt.safetensors",
}
SOURCE = "1038lab/FlashVSR at Hugging Face"


def files_of(
    model: Path, projection: Path | None = None, decoder: Path | None = None, prompt: Path | None = None
) -> UpscaleFiles:
    """The files that were given, and for the others those beside the model, which are told by their tensors.

    CheckpointError where one is missing, the model too, or where several are there.
    """
    open_checkpoint(model)  # a name that is none is told before what is missing beside it
    given = {PROJECTION: projection, DECODER: decoder, PROMPT: prompt}
    found = {} if all(given.values()) else _beside(model)
    chosen = {kind: path or _only(found.get(kind, []), kind, model) for kind, path in given.items()}
    return UpscaleFiles(model, chosen[PROJECTION], chosen[DECODER], chosen[PROMPT])


def _beside(model: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(model.parent.glob("*.safetensors")):
        try:
            tensors = open_checkpoint(path).tensors
        except CheckpointError:
            continue
        kind = PROMPT if len(tensors) == 1 else file_kind(tensors).kind
        found.setdefault(kind, []).append(path)
    return found


def _only(paths: list[Path], kind: str, model: Path) -> Path:
    what = kind.replace("flashvsr", "FlashVSR")
    if not paths:
        raise CheckpointError(
            f"{model}: there is no {what} beside it; expected {NAMES[kind]}; download it from {SOURCE}, or name it"
        )
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise CheckpointError(
            f"{model}: there are several files of the {what} beside it ({names}); name the one to use"
        )
    return paths[0]
