"""What backends have in common that are a function of a package: what they need, and how it is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from .backend import AttentionSpec
from .probe import THIS_MACHINE, KernelMissing, KernelNeeds, Machine


class PackagedAttention(ABC):
    """A backend that may run once `refuse` found its `function`."""

    needs: KernelNeeds

    def __init__(self, device: torch.device, machine: Machine = THIS_MACHINE) -> None:
        self._machine = machine
        self._function: Callable[..., Any] | None = None

    def refuse(self, spec: AttentionSpec) -> str | None:
        """The reasons why this machine or package cannot run `spec`, or None."""
        if reasons := self.needs.refusals(spec, self._machine):
            return "; ".join(reasons)
        try:
            self._function = self._find()
        except KernelMissing as error:
            return str(error)
        return None

    @property
    def function(self) -> Callable[..., Any]:
        """The package's."""
        assert self._function is not None, "refuse() decides whether attend() may run"
        return self._function

    @abstractmethod
    def _find(self) -> Callable[..., Any]:
        """The function, its package imported only now; raises KernelMissing with what to do."""
