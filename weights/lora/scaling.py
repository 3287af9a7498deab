"""How strong the pairs of a LoRA are, where the file's keys do not say it: PEFT's configuration.

diffusers writes it into the header as `lora_adapter_metadata`, finetrainers as `lora_config`; PEFT writes it into an
adapter_config.json beside the file. What trainers note for people (`ss_network_alpha`, `training_info`) is no
configuration: converters that scale the pairs themselves (musubi-tuner's convert_lora.py) keep it. Source:
huggingface/peft (`peft/tuners/lora/config.py`, `get_pattern_key` of `peft/utils/other.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...system.bounded_json import JsonError, parse_json, read_json_object
from ...system.plain_text import short
from ..files.checkpoint import Checkpoint, CheckpointError

HEADER_KEYS = ("lora_adapter_metadata", "lora_config")
FILE_NAME, ADAPTER_NAME = "adapter_config.json", "adapter_model"
# Of diffusers' several models, ours; text encoders have their own.
COMPONENTS = ("transformer.", "transformer_2.", "unet.")
# Initial weights that PEFT takes out of the model, which the file alone does not tell.
CHANGES_MODEL = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
MOST_BYTES = 1 << 24
MOST_PATTERN = 256  # characters of a pattern, and of a name that one is tried on
REPEATS = re.compile(r"(?:\.|\\[dw]|\[[\w-]+\])[*+]")
PLAIN_PATTERN = re.compile(
    r"\^?(?:(?:\.|\\[dw]|\[[\w-]+\])[*+]|[\w-]|\.|\\[.dw-]|\[[\w-]+\]|\((?:\?:)?(?:[\w.|-]|\\[.dw-])+\))+\$?"
)
CONVERTING = "save_pretrained(…, path_initial_model_for_weight_conversion=…)"


@dataclass(frozen=True)
class Scaling:
    """A PEFT configuration's strengths; `source` says where it stands. None: it does not say."""

    path: Path  # of the LoRA
    source: str
    alpha: float | None = None
    rank: int | None = None
    alphas: Sequence[tuple[re.Pattern[str], float]] = ()  # by pattern of module names
    ranks: Sequence[tuple[re.Pattern[str], float]] = ()
    by_root: bool = False  # rsLoRA: alpha / sqrt(rank), arXiv 2312.03732

    def scale(self, module: str, rank: int) -> float:
        """Of a module by the name that it was trained under. CheckpointError where the file has another rank."""
        stated = _by_pattern(self.ranks, module, self.rank)
        alpha = _by_pattern(self.alphas, module, self.alpha)
        if stated is not None and rank and stated != rank:
            raise CheckpointError(
                f"{self.path}: {self.source} says rank {stated:g} of {module}, its tensors have rank {rank}; expected "
                f"the configuration of this file; {self._way_out}"
            )
        if alpha is None:
            return 1.0
        rank = rank or max(1, int(stated or 1))
        return alpha / (rank**0.5 if self.by_root else rank)

    @property
    def note(self) -> str:
        """For a report."""
        rank = "" if self.rank is None else f", rank {self.rank}{' (rsLoRA)' if self.by_root else ''}"
        return f"scaled as {self.source} says: alpha {self.alpha:g}{rank}" if self.alpha is not None else ""

    @property
    def _way_out(self) -> str:
        if self.source == FILE_NAME:
            return f"remove {FILE_NAME} from its folder if it is of another LoRA"
        return "write the file anew without that entry of its header, or download it again"


def read_scaling(checkpoint: Checkpoint) -> Scaling | None:
    """What a LoRA's header or the file beside it says. CheckpointError where that cannot be used."""
    path = checkpoint.path
    for key in HEADER_KEYS:
        if key in checkpoint.metadata:
            return _scaling(path, f"its header's {key}", _parsed(path, key, checkpoint.metadata[key]))
    if "lora_alpha" in checkpoint.metadata:
        return _scaling(path, "its header", checkpoint.metadata)
    beside = configuration_of(path)
    if beside is None:
        return None
    try:
        return _scaling(path, FILE_NAME, read_json_object(beside, MOST_BYTES, finite=False))
    except (OSError, JsonError) as error:
        raise _unreadable(path, FILE_NAME, error) from error


def configuration_of(path: Path) -> Path | None:
    """PEFT's configuration beside a LoRA, if it is its own: where PEFT's own file is there too, it is that one's."""
    beside = path.with_name(FILE_NAME)
    own = path.name.startswith(ADAPTER_NAME) or not any(path.parent.glob(f"{ADAPTER_NAME}*.safetensors"))
    return beside if own and beside.is_file() else None


def _parsed(path: Path, key: str, text: str) -> Mapping[str, Any]:
    try:
        stated = parse_json(text, MOST_BYTES, finite=False)
        if not isinstance(stated, dict):
            raise JsonError("no JSON object")
    except JsonError as error:
        raise _unreadable(path, f"its header's {key}", error) from error
    return stated


def _scaling(path: Path, source: str, config: Mapping[str, Any]) -> Scaling:
    try:
        stated = _of_component(config)
        init = str(stated.get("init_lora_weights", ""))
        alpha, rank = _first(stated, "lora_alpha", "alpha"), _first(stated, "r", "rank")
        scaling = Scaling(
            path,
            source,
            None if alpha is None else _finite(alpha),
            None if rank is None else int(rank),
            _patterns(stated.get("alpha_pattern")),
            _patterns(stated.get("rank_pattern")),
            str(stated.get("use_rslora")).lower() == "true",
        )
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise _unreadable(path, source, error) from error
    if CHANGES_MODEL.search(init):
        raise CheckpointError(
            f"{path}: a LoRA that began as {init}, which takes its first weights out of the model; expected one for "
            f"the model as it is published; convert it with PEFT: {CONVERTING}"
        )
    return scaling


def _unreadable(path: Path, source: str, error: Exception) -> CheckpointError:
    why = getattr(error, "strerror", None) or error
    return CheckpointError(
        f"{path}: {source} cannot be read ({why}); expected PEFT's configuration as JSON, by which it is scaled; "
        "download it again, or remove it if the file's own keys have alphas"
    )


def _of_component(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a header that is the transformer's; all of it where it has no parts."""
    for component in COMPONENTS:
        part = {key.removeprefix(component): value for key, value in config.items() if key.startswith(component)}
        if part:
            return part
    return config


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _patterns(config: Mapping[str, Any] | None) -> list[tuple[re.Pattern[str], float]]:
    """PEFT's rule: a key is a regular expression of the last parts of a name."""
    return [(re.compile(rf"(.*\.)?({plain_pattern(key)})"), _finite(value)) for key, value in (config or {}).items()]


def plain_pattern(key: str) -> str:
    """A key that is a plain regular expression: names, groups of names, and two repeats of any characters at most.

    Others may take longer than anybody waits, however short the name they are tried on; ValueError for them.
    """
    repeats, groups = len(REPEATS.findall(key)), key.count("(")
    if len(key) > MOST_PATTERN or not PLAIN_PATTERN.fullmatch(key) or repeats > 2 or groups > 2:
        raise ValueError(
            f"{short(key, 80)} is no pattern of layers that is read here: names with dots, and at most two of .* and "
            "of (a|b)"
        )
    return key


def _finite(value: Any) -> float:
    """A number that something can be scaled by; ValueError for infinity and what is no number."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is no finite number")
    return number


def _by_pattern(patterns: Sequence[tuple[re.Pattern[str], float]], module: str, default: float | None) -> float | None:
    if len(module) > MOST_PATTERN:
        return default
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)
