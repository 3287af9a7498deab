"""Triton without a GPU: kernels are compiled for a card and launched as there, but nothing runs."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

HOPPER = GPUTarget("cuda", 90, 32)
LIMITS = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


def use_idle_triton() -> None:
    """From here on this process launches Triton's kernels for nothing: what is left is what the host does for them."""
    triton.runtime.driver.set_active(_IdleDriver())


class _IdleLauncher:
    def __init__(self, src: object, metadata: object) -> None: ...

    def __call__(self, *arguments: object) -> None: ...


class _IdleUtils:
    def load_binary(self, *arguments: object) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: object) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return LIMITS


class _IdleDriver(DriverBase):
    launcher_cls, utils = _IdleLauncher, _IdleUtils()

    def __init__(self) -> None: ...

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError
