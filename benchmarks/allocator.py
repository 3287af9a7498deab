"""PyTorch's allocator as the command line has it, for a benchmark that imports this: before torch, which reads it."""

from __future__ import annotations

import os
import sys

if sys.platform == "linux":  # elsewhere PyTorch does not know it
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
