"""The commands that mend what does not work, for this torch, Python and system: one table.

Those for pip were tried: `pip download --no-deps --only-binary=:all: --platform win_amd64` for Python 3.10 to 3.14, and
for Linux. What is on no package index, or must be built, says where to look.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .installed import Installed

# torch's minor version -> Triton's, by torch's own wheels for Linux (2.13 by triton-windows' page).
TRITON: Mapping[str, str] = {
    "2.4": "3.0", "2.5": "3.1", "2.6": "3.2", "2.7": "3.3", "2.8": "3.4", "2.9": "3.5", "2.10": "3.6", "2.11": "3.6",
    "2.12": "3.7", "2.13": "3.7", "2.14": "3.8",
}  # fmt: skip
FIRST_FOR_WINDOWS = (3, 2)  # of triton-windows on PyPI

SAGE = "sageattention==1.0.6"
TRITON_WINDOWS_PAGE = "https://github.com/triton-lang/triton-windows"
PAGES: Mapping[str, str] = {
    "torch": "https://pytorch.org/get-started/locally",
    "driver": "https://www.nvidia.com/drivers",
    "sageattention for Windows": "https://github.com/woct0rdho/SageAttention/releases",
    "sageattention": "https://github.com/thu-ml/SageAttention",
    "flash_attn": "https://github.com/Dao-AILab/flash-attention",
    "flash_attn_interface": "https://github.com/Dao-AILab/flash-attention/tree/main/hopper",
}


def see(page: str) -> str:
    return f"see the project's page: {page}"


def triton_minor(here: Installed) -> str | None:
    """The minor version of Triton that this torch works with; None where that is not known."""
    for need in here.torch_needs:
        stated = re.match(r"triton\s*\(?[=~]=\s*(\d+\.\d+)", need)
        if stated:
            return stated[1]
    return TRITON.get(here.torch_minor)


def fix_triton(here: Installed) -> str:
    """Triton for this torch."""
    wanted = triton_minor(here)
    if here.platform == "win32":
        if wanted is None or _numbers(wanted) < FIRST_FOR_WINDOWS:
            return see(TRITON_WINDOWS_PAGE)
        major, minor = _numbers(wanted)
        return here.pip(f'-U "triton-windows<{major}.{minor + 1}"')
    if here.platform != "linux":
        return "Triton has no kernels for this system: nothing is to be done, as PyTorch runs in its place"
    exact = next((need.split(";")[0].strip() for need in here.torch_needs if re.match(r"triton\s*[=~(]", need)), None)
    if exact is not None:
        return here.pip(f'"{exact.replace(" ", "")}"')
    return see(PAGES["torch"]) if wanted is None else here.pip(f'"triton=={wanted}.*"')


def fix_sage(here: Installed) -> str:
    """SageAttention 1, which needs Triton alone; version 2 is faster, and of wheels for one torch and CUDA."""
    page = PAGES["sageattention for Windows" if here.platform == "win32" else "sageattention"]
    return f"{here.pip(SAGE)} (it needs Triton; for version 2, {see(page)})"


def fix_flash(here: Installed, package: str) -> str:
    """FlashAttention is built for one torch and CUDA; PyTorch's own attention is the same algorithm."""
    return f"{see(PAGES[package])}; sdpa does nearly the same without it"


def fix_kitchen(here: Installed) -> str:
    return here.pip("-U comfy-kitchen")


def fix_torch(here: Installed, why: str) -> str:
    """Another torch; which one depends on the driver, so its own page has the command."""
    return f"{why}, {see(PAGES['torch'])}"


def fix_headers(here: Installed) -> str:
    """What Triton compiles against: Python.h, and on Windows python3xx.lib."""
    version = ".".join(map(str, here.python[:2]))
    if here.platform == "win32":
        if here.is_portable:
            return (
                f"put the folders include and libs of a Python {version} from python.org beside "
                f"{here.executable}, or {see(TRITON_WINDOWS_PAGE)}"
            )
        return f"install Python {version} of python.org anew with its development files (Modify, in Windows' Settings)"
    return f"sudo apt install python{version}-dev gcc (Debian, Ubuntu; elsewhere the packages of the same things)"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
