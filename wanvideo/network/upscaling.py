"""Wan's transformer as FlashVSR uses it: windows of a video one after the other, each in one pass."""

from __future__ import annotations

from dataclasses import dataclass

from ...attention.backend import PassAttention
from ...transformer.workspace import Workspace
from .model import Extras, WanModel
from .windows import WindowAttention, WindowPass


@dataclass(frozen=True)
class WindowExtras(Extras):
    """`window` is the pass among those of its video."""

    window: WindowPass | None = None


class UpscalingModel(WanModel):
    """Wan's network whose self-attention remembers earlier windows."""

    def begin_attention(
        self, grid: tuple[int, int, int], rows_per_group: int, extras: Extras, work: Workspace
    ) -> PassAttention | None:
        assert isinstance(extras, WindowExtras) and extras.window is not None
        return WindowAttention(extras.window, grid, work)
