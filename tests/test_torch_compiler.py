"""What compiled blocks do not look into."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from lowvram_video.system.torch_compiler import outside_graphs


def test_an_object_that_keeps_its_method_so_goes_without_a_search_for_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass's attention over several cards, or with blocks left out, holds what lies on the card."""
    # as it does where it can: a function that keeps the one that was given
    monkeypatch.setattr(torch.compiler, "disable", lambda function: lambda *given: function(*given))

    class Pass:
        def __init__(self) -> None:
            self.attend = outside_graphs(self.doubled)

        def doubled(self, number: int) -> int:
            return 2 * number

    gc.disable()
    try:
        one = Pass()
        assert one.attend(21) == 42
        gone = weakref.ref(one)
        del one
        assert gone() is None
    finally:
        gc.enable()
