"""Modules compiled one by one, with one cache of code for all of the same kind.

Weights are bound once per load and only their bytes change, so neither streaming nor LoRA merging makes code anew.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..system.kernel_choice import brief
from ..system.torch_compiler import torch_compiler
from ..system.triton_errors import triton_errors
from .settings import CompileSettings


def compile_modules(modules: Sequence[nn.Module], settings: CompileSettings, any_size: bool = False) -> None:
    """Let each module run as compiled code from its next call on. ValueError where that cannot be.

    With `any_size` the modules say by themselves which dimensions vary (see `Execution.any_size`).
    """
    settings.check()
    load_backend(settings.backend)
    options: dict[str, Any] = {"options": inductor_options(settings.mode)} if settings.backend == "inductor" else {}
    dynamic = None if any_size else settings.dynamic
    for module in modules:
        module.compile(
            backend=settings.backend, fullgraph=settings.fullgraph, dynamic=dynamic, **options
        )  # fmt: skip


def load_backend(backend: str) -> None:
    """Have the compiler know a backend. ValueError, with the fix, where it cannot be imported."""
    torch_compiler()
    if backend != "tensorrt":
        return
    try:
        importlib.import_module("torch_tensorrt")  # makes its backend known
    except triton_errors() as problem:
        raise ValueError(
            f"backend tensorrt cannot be used: torch_tensorrt cannot be imported ({brief(problem)}), as it is "
            f"likely not for torch {torch.__version__}: choose inductor, or pip install torch-tensorrt anew"
        ) from problem


def inductor_options(mode: str) -> dict[str, Any]:
    """What inductor's `mode` stands for, with the steps of a block left in their order.

    A block's steps write to the same bytes one after the other. Inductor sees functions of tensors instead, and moved
    to where they are used first these would need copies of those bytes.
    """
    return {**torch_compiler("_inductor").list_mode_options(mode), "reorder_for_locality": False}


def uncompile_modules(modules: Sequence[nn.Module]) -> None:
    """Let the modules run as plain PyTorch again."""
    for module in modules:
        module._compiled_call_impl = None  # what `nn.Module.compile` sets; PyTorch has no public way back


@contextmanager
def dynamo_limits(settings: CompileSettings | None) -> Iterator[None]:
    """Dynamo's limits as the settings say, for as long as the block runs; other models keep theirs.

    Newer versions of PyTorch have them for each thread: each one that runs compiled code needs them.
    """
    if settings is None:
        yield
        return
    config = torch_compiler().config
    wanted: dict[str, Any] = {
        "cache_size_limit": settings.cache_size_limit,
        "accumulated_cache_size_limit": settings.recompile_limit,
        "force_parameter_static_shapes": settings.force_parameter_static_shapes,
    }
    # What is so is let be: older versions have it for all threads, where two would undo each other's.
    changed = {name: value for name, value in wanted.items() if getattr(config, name, value) != value}
    with config.patch(changed) if changed else nullcontext():
        yield


def at_limit(settings: CompileSettings) -> str:
    """Words on a function that has as many versions of its code as the settings allow, of which none fits."""
    then, more = ("", "set fullgraph to false, ") if settings.fullgraph else (", so it runs as plain PyTorch there", "")
    return (
        "none of the versions of a block's code fits, and there are as many as are allowed "
        f"({settings.cache_size_limit} of a function, {settings.recompile_limit} in all){then}: {more}set dynamic to "
        "true, or raise dynamo_cache_size_limit and dynamo_recompile_limit (with profile custom)"
    )


@contextmanager
def whole_graphs(settings: CompileSettings) -> Iterator[None]:
    """ValueError, with the fix, where a block can run only in another way than the one graph that was asked for."""
    if not settings.fullgraph:
        yield
        return
    errors = torch_compiler("_dynamo.exc")
    names = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")  # the other before PyTorch 2.6
    limits = tuple(getattr(errors, name) for name in names if hasattr(errors, name))
    try:
        yield
    except limits as error:
        raise ValueError(f"fullgraph is on, and {at_limit(settings)}") from error
    except errors.Unsupported as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"fullgraph is on, and a block is not one graph ({reason}): set fullgraph to false") from error
