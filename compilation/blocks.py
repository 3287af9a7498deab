"""Modules compiled one by one, with one cache of code for all of the same kind.

Weights are bound once per load and only their bytes change, so neither streaming nor LoRA merging makes code anew.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..system.torch_compiler import torch_compiler
from .settings import CompileSettings


def compile_modules(modules: Sequence[nn.Module], settings: CompileSettings, any_size: bool = False) -> None:
    """Let each module run as compiled code from its next call on. ValueError where that cannot be.

    With `any_size` the modules say by themselves which dimensions vary (see `Execution.any_size`).
    """
    settings.check()
    torch_compiler()
    if settings.backend == "tensorrt":
        importlib.import_module("torch_tensorrt")  # makes its backend known
    options: dict[str, Any] = {"options": inductor_options(settings.mode)} if settings.backend == "inductor" else {}
    dynamic = None if any_size else settings.dynamic
    for module in modules:
        module.compile(
            backend=settings.backend, fullgraph=settings.fullgraph, dynamic=dynamic, **options
        )  # fmt: skip


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
    """Dynamo's limits as the settings say, for as long as the block runs; other models keep theirs."""
    if settings is None:
        yield
        return
    config = torch_compiler().config
    wanted: dict[str, Any] = {
        "cache_size_limit": settings.cache_size_limit,
        "accumulated_cache_size_limit": settings.recompile_limit,
        "force_parameter_static_shapes": settings.force_parameter_static_shapes,
    }
    with config.patch({name: value for name, value in wanted.items() if hasattr(config, name)}):
        yield
