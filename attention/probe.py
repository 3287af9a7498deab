"""What this machine can run: its GPU, the packages on it, and whether a kernel agrees with plain attention."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..system.card_profile import CardProfile, profile_of
from ..system.kernel_choice import brief, reason_against, relative_error
from ..system.triton_errors import triton_errors
from .backend import BLOCK, QUANTISED_ERROR, AttentionSpec, Backend, BlockChoice, SparseBackend
from .switches import SWITCHES
from .timing import attention_versions

SPARSE_BLOCKS = 13  # of a probe
QUANTISED_COSINE = 0.99  # at least; less where a backend's own error is larger


class KernelMissing(ImportError):
    """A kernel package that is absent or cannot be imported; the message holds the fix."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


def nvidia_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, or None for every other device (ROCm poses as "cuda", too)."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Machine:
    """Everything the choice of a backend asks of its surroundings; tests hand in a fake one."""

    import_module: Callable[[str], Any] = importlib.import_module
    capability: Callable[[torch.device], tuple[int, int] | None] = nvidia_capability
    platform: str = sys.platform
    python: str = sys.executable or "python"
    card: Callable[[torch.device], CardProfile | None] = profile_of
    versions: Callable[[], Mapping[str, str]] = attention_versions

    def pip_install(self, packages: str) -> str:
        """The command that installs into the Python that runs this, e.g. ComfyUI's embedded one."""
        python = f'"{self.python}"' if " " in self.python else self.python
        return f"{python} -m pip install {packages}"

    def triton_package(self) -> str:
        return "triton-windows" if self.platform == "win32" else "triton"


THIS_MACHINE = Machine()


@dataclass(frozen=True)
class KernelNeeds:
    """What a CUDA kernel needs; capabilities are inclusive bounds, less those in `but_not`."""

    lowest: tuple[int, int]
    head_dims: Collection[int]
    gpus: str
    highest: tuple[int, int] | None = None
    but_not: tuple[tuple[int, int], ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def includes(self, capability: tuple[int, int]) -> bool:
        """Whether the kernel is made for cards of this compute capability."""
        within = self.lowest <= capability and (self.highest is None or capability <= self.highest)
        return within and capability not in self.but_not

    def refusals(self, spec: AttentionSpec, machine: Machine) -> list[str]:
        """Every reason why `spec` cannot run on `machine`, each with its fix; empty when it can."""
        reasons = []
        capability = machine.capability(spec.device)
        if capability is None:
            reasons.append(f"needs an NVIDIA GPU ({self.gpus}), and the device is {spec.device}")
        elif not self.includes(capability):
            have = ".".join(map(str, capability))
            reasons.append(f"needs an NVIDIA GPU of {self.gpus}, and {spec.device} has {have}")
        if spec.dtype not in self.dtypes:
            allowed = " or ".join(_name(dtype) for dtype in self.dtypes)
            reasons.append(f"computes in {allowed}, and the model runs in {_name(spec.dtype)}: load it in bfloat16")
        if spec.head_dim not in self.head_dims:
            reasons.append(f"takes head dim {_listed(self.head_dims)}, and the model's is {spec.head_dim}")
        return reasons


def find_function(machine: Machine, module: str, name: str, install: str) -> Callable[..., Any]:
    """`module.name`, imported only now.

    Raises KernelMissing with `install` (what to do) when it is absent, and with the cause when it is broken.
    """
    try:
        found = machine.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise KernelMissing(f"{module} is not installed: {install}") from error
        wanted = machine.triton_package() if error.name == "triton" else error.name
        fix = machine.pip_install(wanted) if wanted else install
        raise KernelMissing(f"{module} is installed but misses {error.name}: {fix}") from error
    except triton_errors() as error:
        raise KernelMissing(
            f"{module} is installed but cannot be imported ({brief(error)}): it must match torch {torch.__version__}; "
            f"reinstall it: {install}"
        ) from error
    function = getattr(found, name, None)
    if not callable(function):
        raise KernelMissing(f"{module} has no function {name} (another version?): {install}")
    return function


def with_last_dim_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, copied where the numbers of a head do not lie side by side."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


def find_disagreement(backend: Backend, spec: AttentionSpec) -> str | None:
    """Runs `backend` on small random tensors on the device and returns why it cannot be trusted, or None.

    The tensors are groups of heads out of wider buffers, as the models pass them, with k as long as q, shorter, and
    of a length that fills no block of a kernel.
    An out-of-memory is no answer: it is raised.
    """
    return reason_against(lambda: _disagreement(backend, spec), spec.device)


def find_sparse_disagreement(backend: SparseBackend, spec: AttentionSpec) -> str | None:
    """Why a sparse backend cannot be trusted, or None: it is compared with its own reference for the same blocks.

    Never with dense attention, from which it is to differ. The tensors are of a length that fills no block, and have
    a structure to select by; sinks are at the end, and queries that attend everything.
    """
    return reason_against(lambda: _sparse_disagreement(backend, spec), spec.device)


def disagreement_with_plain(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, num_queries: int
) -> tuple[str | None, float]:
    """Why a result on these tensors `[B, L, H, D]` cannot be trusted, or None, and its relative error.

    The first `num_queries` queries are compared with attention in fp32.
    """
    out = backend.attend(q, k, v)[:, :num_queries]
    expected = _reference(q[:, :num_queries], k, v)
    return _find_difference(out, expected, q.dtype, backend.error), relative_error(out, expected)


def _disagreement(backend: Backend, spec: AttentionSpec) -> str | None:
    with torch.inference_mode():
        q, *keys_values = _random_heads(spec, (256, 256, 256))
        for k_length in (256, 128, 77):
            k, v = (tensor[:, :k_length] for tensor in keys_values)
            expected = _reference(q, k, v)
            before = [tensor.clone() for tensor in (q, k, v)]
            reason = _find_difference(backend.attend(q, k, v), expected, spec.dtype, backend.error)
            if not all(map(torch.equal, (q, k, v), before)):
                return f"overwrites its inputs on {spec.device}"
            if reason is not None:
                return f"{reason} on {spec.device} (q length {q.shape[1]}, k length {k_length})"
    return None


def _sparse_disagreement(backend: SparseBackend, spec: AttentionSpec) -> str | None:
    last = (SPARSE_BLOCKS - 3, SPARSE_BLOCKS)
    choices = (
        BlockChoice(tau=0.67, sinks=last),
        BlockChoice(tau=1.2),
        BlockChoice(top_k=0.25, sinks=last),
        BlockChoice(top_k=0.1, exact_queries=last),
    )
    with torch.inference_mode():
        q, k, v = _block_structured_heads(spec)
        before = [tensor.clone() for tensor in (q, k, v)]
        for blocks in choices:
            out, expected = backend.attend(q, k, v, blocks), backend.reference(q, k, v, blocks).float()
            reason = _find_difference(out, expected, spec.dtype, QUANTISED_ERROR)
            if not all(map(torch.equal, (q, k, v), before)):
                return f"overwrites its inputs on {spec.device}"
            if reason is not None:
                return reason.replace("plain attention", f"its own reference for {blocks}") + f" on {spec.device}"
    return None


def _block_structured_heads(spec: AttentionSpec) -> list[Tensor]:
    """q, k, v whose blocks' scores lie evenly apart: rounding moves none over a threshold halfway between two."""
    length = (SPARSE_BLOCKS - 1) * BLOCK + 23
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(spec.head_dim, generator=generator)
    levels = torch.linspace(-1, 1, SPARSE_BLOCKS)[torch.randperm(SPARSE_BLOCKS, generator=generator)]
    signs = torch.where(torch.arange(SPARSE_BLOCKS) % 2 == 0, 1.0, -1.0)
    block = torch.arange(length) // BLOCK
    q, k, v = _random_heads(replace(spec, device=torch.device("cpu"), dtype=torch.float32), (length, length, length))
    q = 1.5 * q + 0.5 * signs[block][:, None, None] * direction
    k = k + 0.5 * levels[block][:, None, None] * direction
    wide = torch.stack([q, k, v], 3).to(spec.device, spec.dtype)  # strided, as models pass them
    return list(wide.unbind(3))


def _find_difference(out: Tensor, expected: Tensor, dtype: torch.dtype, bound: float) -> str | None:
    if out.shape != expected.shape or out.dtype != dtype:
        return f"returns {_name(out.dtype)} {list(out.shape)} instead of {_name(dtype)} {list(expected.shape)}"
    out = out.float()
    if not bool(torch.isfinite(out).all()):
        return "returns NaN or infinity"
    error = relative_error(out, expected)
    cosine = float(F.cosine_similarity(out.flatten(), expected.flatten(), dim=0))
    if error > bound or cosine < min(QUANTISED_COSINE, (1 - bound**2) ** 0.5):
        return f"differs from plain attention by {error:.1e} (allowed {bound:.0e}, cosine {cosine:.3f})"
    return None


def _random_heads(spec: AttentionSpec, lengths: tuple[int, ...]) -> list[Tensor]:
    # A generator of its own: the choice of a backend must not shift the user's seed.
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(1, length, 4, spec.head_dim, generator=generator) for length in lengths]
    return [tensor.to(spec.device, spec.dtype)[:, :, 1:3] for tensor in wide]  # [1, L, 2, D]


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.float().transpose(1, 2) for tensor in (q, k, v))
    with SWITCHES, sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(numbers: Collection[int]) -> str:
    if isinstance(numbers, range):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
