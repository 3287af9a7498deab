"""A file to send with a bug report: what was found and which packages are there, and nothing of whose machine it is."""

from __future__ import annotations

import getpass
import os
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..system.version import installed_versions
from .finding import Findings

TOLD_PACKAGES = (
    "torch", "torchvision", "triton", "triton-windows", "sageattention", "flash-attn", "comfy-kitchen", "comfy-aimdo",
    "xformers", "safetensors", "gguf", "numpy", "pillow", "tokenizers", "sentencepiece", "imageio-ffmpeg", "av",
    "einops", "filelock", "psutil", "comfyui-frontend-package", "lowvram-video",
)  # fmt: skip
SHORTEST = 3  # letters of a name that is looked for by itself: shorter ones are parts of words


def bug_report(findings: Findings) -> str:
    """JSON without prompts and private paths: no file of the user's is read for it."""
    more: dict[str, Any] = {
        "packages": installed_versions(TOLD_PACKAGES),
        "python": sys.version,
        "platform": platform.platform(),
    }
    return without_names(findings.to_json(more), private_names())


def private_names() -> dict[str, str]:
    """What tells whose machine this is -> what stands for it, longest first."""
    found: dict[str, str] = {}
    places = {"~": str(Path.home()), "PYTHON": sys.prefix, "PACK": str(Path(__file__).parents[1])}
    with suppress(OSError):
        places["HERE"] = os.getcwd()
    for short, place in places.items():
        if len(place) > SHORTEST:
            found[place] = short
    with suppress(OSError, KeyError, ImportError):
        found[getpass.getuser()] = "USER"
    found[Path.home().name] = "USER"
    found[platform.node()] = "HOST"
    found[platform.node().partition(".")[0]] = "HOST"
    longest_first = sorted((name for name in found if len(name) >= SHORTEST), key=len, reverse=True)
    return {name: found[name] for name in longest_first}


def without_names(text: str, names: Mapping[str, str]) -> str:
    """A text (JSON, too) with paths of others' home folders, and these names in any case and either slash, replaced."""
    for name, short in names.items():
        parts = [re.escape(part) for part in re.split(r"[\\/]+", name)]
        whole = r"[\\/]+".join(parts)
        edges = (r"(?<![^\W_])", r"(?![^\W_])") if len(parts) == 1 else ("", "")
        text = re.sub(f"{edges[0]}{whole}{edges[1]}", short, text, flags=re.IGNORECASE)
    homes = r"((?:[A-Za-z]:)?[\\/]+(?:Users|home|Documents and Settings)[\\/]+)[^\\/\"'\s]+"
    return re.sub(homes, r"\1USER", text)
