"""How Triton, and kernels that are built on it, fail on a machine that cannot run them."""

from __future__ import annotations

import subprocess
import sys

# No compiler (`CalledProcessError` where Python.h is missing), a DLL of another version, another torch, CUDA or Python,
# an unsupported GPU, an assertion on unsupported inputs, a launch that fails.
PLAIN_ERRORS: tuple[type[Exception], ...] = (
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    LookupError,
    NameError,
    SyntaxError,
    subprocess.SubprocessError,
)


def triton_errors() -> tuple[type[Exception], ...]:
    """What to catch where a kernel is tried: `except triton_errors() as problem`."""
    # Triton's own derive from Exception alone; whoever raises them has imported triton already.
    own = getattr(sys.modules.get("triton.errors"), "TritonError", None)
    return PLAIN_ERRORS if own is None else (*PLAIN_ERRORS, own)
