"""Kernels and packages tried on the device, each by a small run beside a reference.

A package may take the process with it: `apart.py` runs these in another one.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from ..attention.backend import AttentionSpec
from ..attention.probe import THIS_MACHINE, Machine
from ..attention.select import judge_backends
from ..fused.select import select_fused_ops
from ..system.dtypes import half_dtype
from ..system.kernel_choice import brief, disagreement
from ..system.triton_errors import triton_errors
from ..weights.kernels.gemms import select_fp8_gemm, select_int8_gemm
from ..weights.kernels.rows import select_row_ops
from ..weights.linear.compute import layer_error
from ..weights.linear.int8 import Int8Matmul
from ..weights.linear.kitchen import PACKAGE, KitchenInt8, kitchen_int8_available

# What each package is used by.
PARTS: Mapping[str, str] = {
    "triton": "jit", "sageattention": "sageattn", "flash_attn": "flash_attn_func",
    "comfy_kitchen": "list_backends",
    "flash_attn_interface": "flash_attn_func",
}  # fmt: skip
Result = Literal["works", "missing", "broken", "unsuited", "untried"]


@dataclass(frozen=True)
class Outcome:
    """What a trial came to; `unsuited`: this device has no units for it, `untried`: there is no device to try it on.

    `misses` is the module that an installed package does not find.
    """

    result: Result
    text: str
    misses: str = ""


def try_device(device: torch.device) -> Outcome:
    """A product on the device against the CPU's."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, 64, generator=generator)
    got = (a.to(device) @ b.to(device)).cpu()
    if not torch.allclose(got, a @ b, rtol=1e-2, atol=1e-2):
        return Outcome("broken", f"a product on {device} is wrong")
    return Outcome("works", f"a product on {device} is right")


def try_triton(device: torch.device, run: bool | None = None) -> Outcome:
    """A kernel compiled and run (`run` left out: on a GPU)."""
    found = _imported("triton")
    if found is not None:
        return found
    if not (device.type == "cuda" if run is None else run):
        return Outcome("untried", "is installed; not run, as there is no NVIDIA GPU")
    try:
        from .triton_kernel import doubles

        right = doubles(device)
    except triton_errors() as error:
        return Outcome("broken", f"compiles no kernel ({brief(error)})")
    return Outcome("works", "compiles and runs kernels") if right else Outcome("broken", "its kernel's result is wrong")


def try_attention(name: str, package: str | None, device: torch.device, machine: Machine = THIS_MACHINE) -> Outcome:
    """One backend against plain attention, with the heads of Wan and FramePack."""
    if package is not None:
        found = _imported(package)
        if found is not None:
            return found
    dtype = torch.float32 if machine.capability(device) is None else half_dtype(device)
    judged = {each.name: each.reason for each in judge_backends(AttentionSpec(device, dtype, 128), machine)}
    reason = judged[name]
    if reason is None:
        return Outcome("works", "agrees with plain attention")
    if "needs an NVIDIA GPU" not in reason:
        return Outcome("broken", reason)
    if machine.capability(device) is None:
        return Outcome("untried", "is installed; not run, as there is no NVIDIA GPU")
    return Outcome("unsuited", reason)


def try_kitchen(device: torch.device) -> Outcome:
    """Its int8 layer against ours."""
    found = _imported(PACKAGE)
    if found is not None:
        return found
    if device.type != "cuda":
        return Outcome("untried", "is installed; not run, as there is no NVIDIA GPU")
    if not kitchen_int8_available():
        return Outcome("unsuited", "its CUDA kernels want a PyTorch for CUDA 13: its formats are unpacked without them")
    wrong = disagreement(layer_error(KitchenInt8(0), Int8Matmul(0), device))
    return Outcome("works", "its int8 layer is right") if wrong is None else Outcome("broken", wrong)


def try_products(dtype: str, device: torch.device) -> Outcome:
    """Products of 8-bit numbers, chosen as a model would have them."""
    select = select_fp8_gemm if dtype == "fp8" else select_int8_gemm
    try:
        return Outcome("works", f"multiplied by {select(device, select_row_ops(device)).name}")
    except ValueError as refusal:
        return Outcome("unsuited", str(refusal))


def try_fused(device: torch.device) -> Outcome:
    """The elementwise steps between products."""
    name = select_fused_ops(device).name
    if device.type != "cuda":
        return Outcome("untried", "run by PyTorch, as there is no NVIDIA GPU")
    return Outcome("works", f"run by {name}") if name != "eager" else Outcome("broken", "run by PyTorch (slower)")


def _imported(package: str) -> Outcome | None:
    """Why a package cannot be used, or None."""
    try:
        if importlib.util.find_spec(package) is None:
            return Outcome("missing", "is not installed")
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return Outcome("missing", "is not installed")
        return Outcome("broken", f"is installed, but misses {error.name}", error.name or "")
    except triton_errors() as error:
        return Outcome("broken", f"is installed, but cannot be imported ({brief(error)})")
    wanted = PARTS.get(package)
    if wanted is not None and not hasattr(module, wanted):
        return Outcome("broken", f"is installed, but has no {wanted}: a folder that another installation left?")
    return None


TRIALS: Mapping[str, Callable[[torch.device], Outcome]] = {
    "device": try_device,
    "triton": try_triton,
    "fused": try_fused,
    "sdpa": partial(try_attention, "sdpa", None),
    "sageattn": partial(try_attention, "sageattn", "sageattention"),
    "flash_attn_2": partial(try_attention, "flash_attn_2", "flash_attn"),
    "flash_attn_3": partial(try_attention, "flash_attn_3", "flash_attn_interface"),
    "fp8": partial(try_products, "fp8"),
    "int8": partial(try_products, "int8"),
    "comfy_kitchen": try_kitchen,
}


def attempt(name: str, device: torch.device) -> Outcome:
    """One trial by its name; what it raises is an outcome."""
    try:
        with torch.inference_mode():
            return TRIALS[name](device)
    except triton_errors() as error:
        return Outcome("broken", f"fails on {device} ({brief(error)}) with torch {torch.__version__}")


def answer(arguments: list[str]) -> None:
    """What another process is started for: a file for answers, a device, and names of trials; a line of JSON each."""
    file, device, *names = arguments
    with open(file, "x", encoding="ascii") as out:
        for name in names:
            found = attempt(name, torch.device(device))
            out.write(json.dumps([name, found.result, found.text, found.misses]) + "\n")
            out.flush()
