"""The flags of sparse attention."""

from __future__ import annotations

import argparse

from ..attention.sparse.settings import MIN_TOKENS, MODES, PRESETS, SparseSettings, settings_of
from .flags import has

DETAILS = ("sparse_value", "sparse_bound", "sparse_dense_percent", "sparse_dense_layers", "sparse_min_tokens")


def add_sparse(parser: argparse.ArgumentParser) -> None:
    """The flags that `sparse_of` reads."""
    group = parser.add_argument_group("sparse attention: long videos faster, steered by the error that it measures")
    group.add_argument(
        "--sparse",
        choices=list(MODES),
        help="steered to an error of 5, 10, 20 %% (quality, balanced, fast; what they save was not measured on a real "
        "model), or by tau or top_k and --sparse-value; left out: off",
    )
    group.add_argument(
        "--sparse-value", type=float,
        help="of tau: such as 1.0 (higher is faster); of top_k: the share that is kept, such as 0.15",
    )  # fmt: skip
    group.add_argument(
        "--sparse-bound", type=float, metavar="ERROR",
        help="the error that each layer is steered to; one step may be beyond it, the next one of that layer is exact; "
        "0: everything is exact",
    )  # fmt: skip
    group.add_argument("--sparse-dense-percent", type=float, help="the first steps are exact (25)", metavar="PERCENT")
    group.add_argument("--sparse-dense-layers", type=int, help="the first layers are exact (1)", metavar="LAYERS")
    group.add_argument(
        "--sparse-min-tokens", type=int, help=f"shorter videos are exact ({MIN_TOKENS})", metavar="TOKENS"
    )  # fmt: skip


def sparse_of(options: argparse.Namespace) -> SparseSettings | None:
    """The flags as settings, None where it is off. ValueError for a flag that says nothing without another."""
    if not has(options, "sparse", DETAILS, "balanced"):
        return None
    value, bound, percent, layers, tokens = (getattr(options, name) for name in DETAILS)
    if options.sparse in PRESETS and value is not None:
        raise ValueError(
            f"--sparse-value says nothing with --sparse {options.sparse}, whose error bound decides (--sparse-bound): "
            "take it out, or give --sparse tau or --sparse top_k"
        )
    defaults = SparseSettings()
    return settings_of(
        options.sparse,
        value,
        bound,
        defaults.dense_percent if percent is None else percent,
        defaults.dense_layers if layers is None else layers,
        defaults.min_tokens if tokens is None else tokens,
    )
