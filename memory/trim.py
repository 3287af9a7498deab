"""Freed host memory handed back to the system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def return_free_memory() -> None:
    """Have the C library give back what was freed: glibc keeps some per thread, and our reading threads come and go."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
