"""The system, Python, torch, driver and GPU: what they are, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..system.card_profile import driver_version
from ..system.kernel_choice import brief
from ..system.sizes import GIB
from ..system.version import version_of
from .finding import Finding
from .fixes import PAGES, fix_headers, fix_torch
from .installed import Installed

PART = "System"
LOWEST_TORCH, LOWEST_PYTHON = (2, 4), (3, 10)
NEEDED = (
    "safetensors", "einops", "gguf", "numpy", "pillow", "imageio-ffmpeg", "sentencepiece", "matplotlib", "tokenizers",
    "filelock", "tqdm", "psutil",
)  # fmt: skip


def check_system(here: Installed, device: torch.device) -> Iterator[Finding]:
    """From the operating system up to the GPU."""
    yield Finding(PART, "system", "told", here.system)
    yield _python(here)
    yield _torch(here)
    yield from _gpu(here, device)
    yield _headers(here)
    missing = [name for name in NEEDED if version_of(name) is None]
    if missing:
        text = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        yield Finding(PART, "packages", "bad", text, here.pip(" ".join(missing)), stops=True)


def _python(here: Installed) -> Finding:
    version = ".".join(map(str, here.python))
    kind = " (Windows' embeddable Python, as in portable ComfyUI)" if here.is_portable else ""
    if here.python[:2] < LOWEST_PYTHON:
        wanted = ".".join(map(str, LOWEST_PYTHON))
        fix = f"install Python {wanted} or later: https://www.python.org/downloads"
        return Finding(PART, "Python", "bad", f"{version}, needs {wanted}", fix, stops=True)
    return Finding(PART, "Python", "good", f"{version}{kind}")


def _torch(here: Installed) -> Finding:
    built = f"for CUDA {here.cuda}" if here.cuda else "without CUDA"
    numbers = tuple(int(part) for part in here.torch_minor.split(".")) if here.torch_minor else LOWEST_TORCH
    if numbers < LOWEST_TORCH:
        fix = fix_torch(here, "a newer one is needed")
        return Finding(PART, "torch", "bad", f"{here.torch}, {built}, needs 2.4 or later", fix, stops=True)
    return Finding(PART, "torch", "good", f"{here.torch}, {built}")


def _gpu(here: Installed, device: torch.device) -> Iterator[Finding]:
    driver = driver_version()
    if device.type == "cuda" and _counts_gpus():
        yield Finding(PART, "driver", "good", f"for CUDA {driver}" if driver else "there; its version is not known")
        yield _card(here, device)
        return
    if here.cuda is None and driver:
        text = f"there is a driver for CUDA {driver}, and this torch is built without CUDA"
        yield Finding(PART, "GPU", "bad", text, fix_torch(here, "install torch for CUDA"))
    elif driver:
        text = f"the driver is for CUDA {driver}, and this torch for CUDA {here.cuda} sees no GPU with it"
        yield Finding(PART, "driver", "bad", text, f"install a newer driver: {PAGES['driver']}")
    else:
        text = "no NVIDIA GPU is found: everything runs on the CPU, which takes hours for a few seconds of video"
        fix = f"where there is one, install its driver: {PAGES['driver']}"
        yield Finding(PART, "GPU", "bad", text, fix)


def _counts_gpus() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() > 0


def _card(here: Installed, device: torch.device) -> Finding:
    """Whether this torch has kernels for the card: those of an older one do not run on newer ones."""
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    text = f"{name}, {properties.total_memory / GIB:.1f} GiB"
    architectures = torch.cuda.get_arch_list()
    runs = (
        torch.version.hip is not None
        or not architectures
        or any(_runs_on(architecture, properties.major, properties.minor) for architecture in architectures)
    )
    if not runs:
        have = f"{text}; this torch has kernels for {', '.join(architectures)}"
        return Finding(PART, "GPU", "bad", have, fix_torch(here, "torch for this card"), stops=True)
    try:
        torch.ones(4, device=device).sum().item()
    except RuntimeError as error:
        have = f"{text}; nothing runs on it ({brief(error)})"
        return Finding(PART, "GPU", "bad", have, fix_torch(here, "reinstall torch"), stops=True)
    return Finding(PART, "GPU", "good", text)


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """`sm_86` runs on 8.6 and 8.9, `compute_80` on all that came later."""
    kind, _, number = architecture.partition("_")
    digits = "".join(character for character in number if character.isdigit())
    if not digits:
        return False
    built = int(digits[:-1]), int(digits[-1])
    return built <= (major, minor) if kind == "compute" else built[0] == major and built[1] <= minor


def _headers(here: Installed) -> Finding:
    """What Triton compiles its launchers with."""
    missing = []
    if not here.headers.is_file():
        missing.append("Python.h")
    library = f"python{here.python[0]}{here.python[1]}.lib"
    if here.platform == "win32" and not (here.libraries / library).is_file():
        missing.append(library)
    if missing:
        text = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, which Triton compiles against"
        return Finding(PART, "headers", "bad", text, fix_headers(here))
    return Finding(PART, "headers", "good", "Triton finds what it compiles against")
