"""What nodes put in the place of a network's parts (object patches on `diffusion_model`), done our way or refused.

Our blocks stream, work in buffers that all of them share and have no `forward` of core's form, so nothing is put into
them. Where the node's settings say what it wants, the network does that; what it does anyway is said to be needless.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .carried import INSIDE

logger = logging.getLogger(__name__)

DTYPE = "manual_cast_dtype"  # core's name for it

Rotate = Callable[[Tensor], Tensor]  # positions [1, tokens, axes] -> rotations [1, 1, tokens, dim / 2, 2, 2]


@dataclass(frozen=True)
class GivenNag:
    """Negative guidance as KJNodes' WanVideoNAG sets it: `context [1, tokens, dim]` is embedded already.

    `pairs`: the first half of a batch is guided, the other half is taken for the unconditional one.
    """

    context: Tensor
    scale: float
    tau: float
    alpha: float
    pairs: bool


@dataclass(frozen=True)
class Inside:
    """What is done in the place of object patches of the network."""

    nag: GivenNag | None = None
    rotate: Rotate | None = None


NEEDLESS = (
    (r"blocks\.\d+\.ffn\.forward", ("num_chunks",), "chunks of the feed-forward (the plan makes such by itself)"),
)
POINTERS = (
    (r"blocks\.\d+\.self_attn\.forward", "its self-attention: choose the loader's attention_mode instead"),
    (r"blocks\.\d+\.ffn\.forward", "its feed-forward, which works in chunks by itself: take that node out"),
    (r"blocks\.\d+\.cross_attn\.forward", "its cross-attention: use Negative Guidance (NAG, Low VRAM) for NAG"),
    (r".*(pe_embedder|rope_embedder).*", "its positions: take that node out"),
)
ELSE = "a part of the network: take that node out, or load the file with ComfyUI's own loader"


def read_inside(patches: Mapping[str, Any], rotates: bool, guides: bool) -> Inside:
    """What object patches on the network ask for; `rotates` and `guides`: it takes other positions, and NAG.

    ValueError, by the patch's name, for what cannot be done here.
    """
    nag: GivenNag | None = None
    rotate: Rotate | None = None
    said = set()
    for path, given in inside_patches(patches):
        found = _settings(given)
        if rotates and path == "rope_embedder" and callable(given):
            rotate = given
        elif guides and re.fullmatch(r"blocks\.\d+\.cross_attn\.forward", path) and "nag_context" in found:
            nag = _nag_of(found)
        elif (needless := _needless(path, found)) is not None:
            said.add(needless)
        else:
            raise ValueError(refusal(path))
    for needless in said:
        logger.info("a node asks the LowVRAM model for %s: it is needless, and changes nothing", needless)
    return Inside(nag, rotate)


def inside_patches(patches: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those of the network, by their path in it; the network itself is the empty one."""
    for path, given in patches.items():
        if path != DTYPE and is_inside(path):
            yield path[len(INSIDE) + 1 :], given


def is_inside(path: str) -> bool:
    """Whether an object patch is of the network, or replaces the dtype that it computes in."""
    return path in (DTYPE, INSIDE) or path.startswith(f"{INSIDE}.")


def check_dtype(patches: Mapping[str, Any], dtype: torch.dtype) -> None:
    """ValueError where a node (ModelComputeDtype) asks for another dtype than the network computes in."""
    asked = patches.get(DTYPE)
    if asked is not None and asked != dtype:
        name = str(asked).removeprefix("torch.")
        raise ValueError(
            f"a node (ModelComputeDtype) asks for {name}, and this model of the LowVRAM loader computes in "
            f"{str(dtype).removeprefix('torch.')}: set the loader's compute_dtype instead, and take that node out"
        )


def refusal(path: str) -> str:
    """What is said of a part that a node replaces."""
    pointer = next((text for pattern, text in POINTERS if re.fullmatch(pattern, path)), ELSE)
    where = f"{INSIDE}.{path}" if path else INSIDE
    return f"a node replaces {where}, which is not supported by the LowVRAM loader; that is {pointer}"


def _needless(path: str, found: Mapping[str, Any]) -> str | None:
    for pattern, settings, text in NEEDLESS:
        if re.fullmatch(pattern, path) and all(name in found for name in settings):
            return text
    return None


def _settings(given: Any) -> Mapping[str, Any]:
    """What the object that a bound function closes over holds: KJNodes' patches keep their settings so."""
    function = getattr(given, "__func__", given)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    found: dict[str, Any] = {}
    for value in cells:
        found |= getattr(value, "__dict__", {})
    return found


def _nag_of(found: Mapping[str, Any]) -> GivenNag:
    pairs = found.get("input_type", "default") == "default"
    scale, tau, alpha = (float(found[f"nag_{name}"]) for name in ("scale", "tau", "alpha"))
    return GivenNag(found["nag_context"], scale, tau, alpha, pairs)
