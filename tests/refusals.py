"""A refusal of a file as it should be: soon, in one line, and of nothing that a terminal obeys."""

import time
from collections.abc import Callable

import pytest
from lowvram_video.weights.files.checkpoint import CheckpointError

MOST_SECONDS = 5.0


def refusal(open_it: Callable[[], object], kind: type[Exception] = CheckpointError) -> str:
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        open_it()
    message = str(caught.value)
    assert time.monotonic() - began < MOST_SECONDS
    assert "\n" not in message and "\x1b" not in message and len(message) < 4000
    return message
