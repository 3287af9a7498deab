"""A few random graphs beside core's model; `python -m tests.comfyui.random_graphs` runs as many as one likes."""

from __future__ import annotations

from typing import Any

import pytest

from .random_graphs import make_files, results
from .server import Server

COUNT = 8


def test_random_graphs_are_right(comfyui: Any, server: Server) -> None:
    if not comfyui.is_newest:
        pytest.skip("the newest only: `inside/test_other_nodes.py` has the same nodes in an older one")
    make_files(server.base / "models")
    wrong = [case for case in results(server, 1000, COUNT) if not case["right"]]
    assert not wrong, wrong
