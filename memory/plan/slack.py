"""What the caching allocator takes beside what is asked of it."""

from __future__ import annotations

from .footprint import MIB

# It rounds and fragments what is allocated during a run; weights and the ring are exact.
SLACK_FRACTION = 0.03
# cuBLAS has its workspace from it too, for each thread that asks a card for work; on Hopper, less elsewhere
WORKSPACE_BYTES = 32 * MIB
SLACK_BYTES = 2 * WORKSPACE_BYTES  # half of it for one such thread


def slack_bytes(nbytes: int, cards: int = 1) -> int:
    """Bytes beside so many that come and go during a run.

    Of several cards one's own thread asks it for work, and that of the last card (see `team/lockstep.py`).
    """
    return SLACK_BYTES + (WORKSPACE_BYTES if cards > 1 else 0) + int(SLACK_FRACTION * nbytes)
