"""What a user may choose about torch.compile."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

BACKENDS = ("inductor", "cudagraphs", "tensorrt")
MODES = ("default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead")
DYNAMIC = {"auto": None, "true": True, "false": False}


@dataclass(frozen=True)
class CompileSettings:
    """Arguments of torch.compile and limits of dynamo.

    `dynamic` None lets dynamo decide after the second shape; True is code for any size from the start. Blocks are
    always compiled one by one, because weights arrive between them; `transformer_blocks_only` False compiles the head
    as well.
    `profile` is where the settings come from, `notes` say what of it was corrected and why (see `profiles.py`).
    """

    backend: str = "inductor"
    fullgraph: bool = False
    mode: str = "default"
    dynamic: bool | None = None
    transformer_blocks_only: bool = True
    cache_size_limit: int = 64
    recompile_limit: int = 128
    force_parameter_static_shapes: bool = False
    profile: str = "custom"
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """ValueError, with the fix, where this machine cannot compile so."""
        if self.backend == "tensorrt" and importlib.util.find_spec("torch_tensorrt") is None:
            raise ValueError(
                "backend tensorrt needs the package torch_tensorrt, which is not installed: "
                "choose inductor, or pip install torch-tensorrt"
            )
        if self.backend != "inductor" and self.mode != "default":
            raise ValueError(f"mode {self.mode!r} is one of inductor's: set mode to default for {self.backend}")

    def __str__(self) -> str:
        sizes = {None: "one size at a time", True: "any size", False: "each size by itself"}[self.dynamic]
        mode = f" {self.mode}" if self.backend == "inductor" else ""
        whole = ", one graph a block" if self.fullgraph else ""
        return f"profile {self.profile}: {self.backend}{mode}, code for {sizes}{whole}"
