"""Negative guidance in a MODEL: what our node and KJNodes' put there, as the network takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...transformer.nag import NagSettings
from ...wanvideo.network.model import Nag
from .inside import GivenNag

NAG_KEY = "lowvram_nag"  # in the transformer options
# What nodes say of how and when a prompt is heard, which attention to it is not asked.
UNHEARD = ("start_percent", "end_percent", "area", "mask", "hooks", "control", "gligen")


@dataclass(frozen=True)
class NagOptions:
    """The negative prompt, an entry of a CONDITIONING, and how it guides."""

    text: Tensor
    options: Mapping[str, Any]
    settings: NagSettings


def check_negative(options: Mapping[str, Any], title: str) -> None:
    """ValueError where a node gave the negative prompt what `title`, the node that is given it, would leave out."""
    key = next((key for key in UNHEARD if options.get(key) is not None), None)
    if key is None and options.get("strength", 1.0) != 1.0:
        key = "strength"
    if key is not None:
        raise ValueError(
            f"a node gives the negative prompt of {title} {key!r}, which attention to it does not hear: connect CLIP "
            "Text Encode directly"
        )


def wan_nag(options: Mapping[str, Any], given: GivenNag | None, batch: int) -> Nag | None:
    """Negative guidance of a pass over `batch` samples; our node's, of the prompts that are not unconditional.

    KJNodes' guides all of a single sample, and the first half of a batch.
    """
    own: NagOptions | None = options.get(NAG_KEY)
    if own is not None:
        kinds = options.get("cond_or_uncond") or [0]
        each = max(1, batch // len(kinds))
        guided = tuple(kinds[min(index // each, len(kinds) - 1)] == 0 for index in range(batch))
        return Nag(own.text, own.settings, guided) if any(guided) else None
    if given is None:
        return None
    samples = tuple(index < batch / 2 for index in range(batch)) if given.pairs and batch > 1 else None
    return Nag(given.context, NagSettings(given.scale, given.tau, given.alpha), samples, embedded=True)
