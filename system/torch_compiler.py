"""PyTorch's compiler, imported when something is compiled and not before: it takes 150 MB of RAM, and brings Triton.

A Triton that is broken in another way than being absent makes that import fail with whatever it raises. Nothing can be
compiled then; everything else runs.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

import torch

from .kernel_choice import brief
from .triton_errors import triton_errors

F = TypeVar("F", bound=Callable[..., object])


def torch_compiler(part: str = "_dynamo") -> ModuleType:
    """The module `torch.<part>`. ValueError, with the fix, where it cannot be imported here."""
    try:
        return importlib.import_module(f"torch.{part}")
    except triton_errors() as problem:
        raise ValueError(
            f"torch {torch.__version__} cannot compile here: its compiler cannot be imported ({brief(problem)}), as "
            "Triton is likely not for it: run without torch.compile, or see what `lowvram-video doctor` says of Triton"
        ) from problem


def mark_any_length(*tensors: torch.Tensor) -> None:
    """Have code that is compiled for these tensors fit others that are longer or shorter in their first dimension."""
    for tensor in tensors:
        torch_compiler().maybe_mark_dynamic(tensor, 0)


def outside_graphs(function: F) -> F:
    """The function as compiled blocks call it without looking into it; itself where nothing can be compiled.

    A bound method's object may keep the result: that does not hold the object, whose memory would stay until Python
    looks for cycles.
    """
    function = _not_holding(function)
    is_first = "torch._dynamo" not in sys.modules
    try:
        disabled: F = torch.compiler.disable(function)
    except triton_errors():
        return function
    finally:
        if is_first:  # its import leaves cycles that hold all callers' frames, and so what a pass has on the card
            gc.collect()
    return disabled


def _not_holding(function: F) -> F:
    """The same, of a bound method one that does not hold its object."""
    if not inspect.ismethod(function):
        return function
    held = weakref.WeakMethod(function)

    def call(*args: Any) -> Any:
        method = held()
        assert method is not None, "whoever calls this has the object"
        return method(*args)

    return cast(F, call)
