"""What attention backends take of comfy-kitchen, which comes with ComfyUI; nobody's version is pinned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .probe import Machine, find_function

PACKAGE = "comfy_kitchen"


def kitchen_function(machine: Machine, name: str, module: str = PACKAGE) -> Callable[..., Any]:
    """A function of the package, imported only now; KernelMissing says what is missing and how to get it."""
    update = machine.pip_install("--upgrade comfy-kitchen")
    return find_function(machine, module, name, f"it comes with newer versions of ComfyUI, or: {update}")
