"""How sparse attention may be, and where it may be so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

MIN_TOKENS = 12000  # below, dense attention is about as fast


@dataclass(frozen=True)
class SparseSettings:
    """What is left out: see `BlockChoice`. With `top_k` above 0 that share of blocks is kept, else by `tau`.

    `bound` is the relative error that attention of each layer is steered to (0: every layer is dense, None: it is not
    watched): see `Bound`. The first `dense_percent` of the steps, the
    first `dense_layers` of each pass, and passes of fewer than `min_tokens` are dense.
    """

    tau: float = 1.0
    top_k: float = 0.0
    bound: float | None = 0.1
    dense_percent: float = 25.0
    dense_layers: int = 1
    min_tokens: int = MIN_TOKENS

    def __post_init__(self) -> None:
        limits = (
            ("tau", self.tau, -1.0, 4.0, "higher keeps fewer blocks"),
            ("top_k", self.top_k, 0.0, 0.95, "the share of blocks that is kept, such as 0.15; 0 chooses by tau"),
            ("error_bound", 0.0 if self.bound is None else self.bound, 0.0, 1.0, "a relative error such as 0.1"),
            ("dense_percent", self.dense_percent, 0.0, 100.0, "of the steps"),
            ("dense_layers", self.dense_layers, 0, 1000, "layers of each pass"),
            ("min_tokens", self.min_tokens, 0, 1 << 40, "tokens of a pass"),
        )
        for name, value, least, most, what in limits:
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; expected {least:g} to {most:g} ({what})")

    def __str__(self) -> str:
        kept = f"top-k {self.top_k:g}" if self.top_k else f"tau {self.tau:g}"
        bound = "unbounded" if self.bound is None else f"error up to {self.bound:g}"
        where = f"from {self.dense_percent:g} % of the steps, layer {self.dense_layers} and {self.min_tokens} tokens on"
        return f"{kept}, {bound}, {where}"


PRESETS: Mapping[str, SparseSettings] = {
    "quality": SparseSettings(tau=1.0, bound=0.05),
    "balanced": SparseSettings(tau=1.25, bound=0.1),
    "fast": SparseSettings(tau=1.5, bound=0.2),
}
TAU, TOP_K = "tau", "top_k"  # by hand
MODES = (*PRESETS, TAU, TOP_K)


def settings_of(
    mode: str, value: float | None, bound: float | None, dense_percent: float, dense_layers: int, min_tokens: int
) -> SparseSettings:
    """Of one of MODES and what else the user said; `value` counts where the mode is by hand.

    `bound` None is that of the preset, and none by hand. ValueError for what is out of range or missing.
    """
    if mode in PRESETS:
        chosen = PRESETS[mode]
        chosen = chosen if bound is None else replace(chosen, bound=bound)
    elif mode not in MODES:
        raise ValueError(f"sparse mode {mode!r} does not exist: use one of {', '.join(MODES)}")
    elif value is None or (mode == TOP_K and not 0 < value < 1):
        example = "a share between 0 and 1 such as 0.15" if mode == TOP_K else "a tau such as 1.0"
        raise ValueError(f"sparse attention by {mode} needs {example}, and its value is {value}")
    else:
        chosen = SparseSettings(top_k=value, bound=bound) if mode == TOP_K else SparseSettings(tau=value, bound=bound)
    return replace(chosen, dense_percent=dense_percent, dense_layers=dense_layers, min_tokens=min_tokens)
