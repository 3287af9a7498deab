"""PyTorch's switches of its attention kernels, which are the whole process's: of several threads one sets them."""

from __future__ import annotations

import threading

# Held from setting them until they are as before: what another thread sets meanwhile would choose this one's kernel,
# and stay. Cards that make a sample each have threads that attend at the same time.
SWITCHES = threading.RLock()
