"""Packages with kernels: whether they are there, for this torch, and right on this device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from ..system.version import version_of
from .finding import Finding, State
from .fixes import TRITON, fix_flash, fix_kitchen, fix_sage, fix_torch, fix_triton, triton_minor
from .installed import Installed
from .trials import Outcome

PART = "Kernels"

# What is tried -> what it is called, and what mends it.
NAMES: Mapping[str, str] = {
    "device": "PyTorch", "triton": "Triton", "fused": "elementwise steps", "sdpa": "attention: sdpa",
    "sageattn": "attention: SageAttention", "flash_attn_2": "attention: FlashAttention 2",
    "flash_attn_3": "attention: FlashAttention 3", "fp8": "products in fp8", "int8": "products in int8",
    "comfy_kitchen": "comfy-kitchen",
}  # fmt: skip
FIXES: Mapping[str, Callable[[Installed], str]] = {
    "device": lambda here: fix_torch(here, "reinstall torch"),
    "sdpa": lambda here: fix_torch(here, "reinstall torch"),
    "triton": fix_triton,
    "fused": fix_triton,
    "fp8": fix_triton,
    "int8": fix_triton,
    "sageattn": fix_sage,
    "flash_attn_2": lambda here: fix_flash(here, "flash_attn"),
    "flash_attn_3": lambda here: fix_flash(here, "flash_attn_interface"),
    "comfy_kitchen": fix_kitchen,
}
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "triton": ("triton-windows", "triton"),
    "sageattn": ("sageattention",),
    "comfy_kitchen": ("comfy-kitchen",),
    "flash_attn_2": ("flash-attn",),
    "flash_attn_3": ("flash-attn-3",),
}
STATES: Mapping[str, State] = {
    "works": "good", "missing": "bad", "broken": "bad", "unsuited": "told", "untried": "told"
}  # fmt: skip
STOPS = ("device", "sdpa")
OPTIONAL = ("flash_attn_2", "flash_attn_3")  # nobody misses them: sdpa is as good


def check_kernels(here: Installed, device: torch.device, outcomes: Mapping[str, Outcome]) -> Iterator[Finding]:
    """A line for each trial that was made."""
    for name, outcome in outcomes.items():
        version = next(filter(None, map(version_of, DISTRIBUTIONS.get(name, ()))), None)
        found = _finding(here, name, outcome, version)
        if name == "triton" and found.state != "bad":
            found = _for_torch(here, found, version)
        if not (name == "flash_attn_3" and outcome.result in ("missing", "unsuited") and not _is_hopper(device)):
            yield found


def _finding(here: Installed, name: str, outcome: Outcome, version: str | None) -> Finding:
    state: State = STATES[outcome.result]
    if outcome.result == "missing" and name in OPTIONAL:
        state = "told"
    text = f"{version}, {outcome.text}" if version and outcome.result != "missing" else outcome.text
    fix = _fix(here, name, outcome) if outcome.result in ("missing", "broken") else ""
    return Finding(PART, NAMES[name], state, text, fix, stops=name in STOPS)


def _fix(here: Installed, name: str, outcome: Outcome) -> str:
    """What is there and broken is installed once more, even where it has the version that is wanted."""
    if outcome.misses:
        package = outcome.misses.partition(".")[0]
        return fix_triton(here) if package == "triton" else here.pip(package)
    return FIXES[name](replace(here, anew=outcome.result == "broken"))


def _for_torch(here: Installed, found: Finding, version: str | None) -> Finding:
    """Triton is made for one minor version of torch: another may run by itself and break torch.compile."""
    wanted = triton_minor(here)
    if version is None or wanted is None or version.split("+")[0].split(".")[:2] == wanted.split("."):
        return found
    others = ", ".join(torch_minor for torch_minor, minor in TRITON.items() if version.startswith(f"{minor}."))
    text = f"{version} is for torch {others or 'of another version'}, and torch {here.torch} wants {wanted}"
    return Finding(PART, found.name, "bad", text, fix_triton(here))


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)
