"""What the caching allocator takes beside what is asked of it."""

from __future__ import annotations

from .footprint import MIB

# It rounds and fragments what is allocated during a run; weights and the ring are exact. cuBLAS has its workspace from
# it too: 32 MiB on Hopper, less elsewhere; half of this.
SLACK_FRACTION = 0.03
SLACK_BYTES = 64 * MIB


def slack_bytes(nbytes: int) -> int:
    """Bytes beside so many that come and go during a run."""
    return SLACK_BYTES + int(SLACK_FRACTION * nbytes)
