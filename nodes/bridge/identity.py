"""What tells one of ComfyUI's runs from another: its objects as values that a key is made of."""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_patcher
import numpy as np
import torch
from torch import Tensor, nn

MAX_VALUES = 100_000  # of one run: an object that leads to all of ComfyUI says nothing of a run
MAX_ELEMENTS = 2**28  # of a module beside the model
PASSING = ("uuid",)  # keys of conditionings that are others in every run


def identity(value: Any) -> Any:
    """JSON values and tensors that are others for every other value, and equal for equal ones after a restart.

    Objects count by class and attributes, functions by name, code and what they hold. ValueError names what cannot be
    told apart so: a model, or an object of none of these kinds.
    """
    return _Walk().value(value)


class _Walk:
    """One walk through values, each object once."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id comes twice
        self._count = 0

    def value(self, value: Any) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise ValueError("its settings lead to more than can be compared")
        if value is None or isinstance(value, (str, int, float, Tensor)):
            return value
        if isinstance(value, (torch.dtype, torch.device, enum.Enum, Path, bytes, complex, type)):
            return [type(value).__name__, str(value)]
        if isinstance(value, (np.ndarray, np.generic)):
            return ["numpy", torch.from_numpy(np.array(value))]
        if isinstance(value, (list, tuple)):
            return [self.value(part) for part in value]
        if isinstance(value, (set, frozenset)):
            return ["set", *sorted(repr(part) for part in value)]
        if id(value) in self._seen:
            return ["again", self._seen[id(value)]]
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, Mapping):
            return {
                key if isinstance(key, str) else repr(key): self.value(part)
                for key, part in value.items()
                if key not in PASSING
            }
        return self._object(value)

    def _object(self, value: Any) -> Any:
        if isinstance(value, comfy.model_patcher.ModelPatcher):
            raise ValueError("it has another model beside its own, such as a ControlNet's")
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, functools.partial):
            return ["partial", self.value(value.func), self.value(value.args), self.value(value.keywords)]
        if isinstance(value, types.MethodType):
            return ["method", value.__func__.__qualname__, self.value(value.__self__)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
            return ["built in", value.__name__]
        if hasattr(value, "__dict__"):
            return [_name(type(value)), self.value(vars(value))]
        raise ValueError(f"it has a {type(value).__name__}, of which nothing is known")

    def _module(self, module: nn.Module) -> Any:
        state = module.state_dict()
        if sum(tensor.numel() for tensor in state.values()) > MAX_ELEMENTS:
            raise ValueError("it has another model beside its own")
        plain = {name: part for name, part in vars(module).items() if not name.startswith("_")}
        bases = [_name(base) for base in type(module).__mro__]  # core makes such classes as it goes, all of one name
        return ["module", bases, self.value(plain), self.value(dict(state))]

    def _function(self, function: types.FunctionType) -> Any:
        code = hashlib.sha256(function.__code__.co_code).hexdigest()
        held = [self.value(cell.cell_contents) for cell in function.__closure__ or () if _filled(cell)]
        defaults = self.value([function.__defaults__, function.__kwdefaults__])
        return ["function", function.__module__, function.__qualname__, code, held, defaults]


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where it is empty
    except ValueError:
        return False
    return True
