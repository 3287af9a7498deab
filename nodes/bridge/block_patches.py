"""Core's patches of a Wan model's blocks: around them, after their attention, and those that have no place here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...attention.backend import Backend
from ...system.torch_compiler import outside_graphs
from ...wanvideo.network.blocks import Pass
from ...wanvideo.network.config import WanConfig
from ...wanvideo.network.model import Visitor
from .attention_patches import OVERRIDE, attention_of

AFTER_BLOCK, AFTER_SELF, AFTER_CROSS = "double_block", "attn1_patch", "attn2_patch"
SUPPORTED = (AFTER_BLOCK, AFTER_SELF, AFTER_CROSS)
REPLACED = "dit"  # whole blocks
IMAGE_LENGTHS = (257, 514)  # tokens of CLIP's pictures, whose attention core never quantises
PER_CHUNK = ("cond_or_uncond", "uuids")  # lists with an entry for each of the conditions that make up a batch


def check_patches(transformer_options: dict[str, Any], supported: Sequence[str] = ()) -> None:
    """ValueError for a patch that a pass would leave out without a word; whole blocks only where any is `supported`."""
    kinds = [kind for kind, patches in transformer_options.get("patches", {}).items() if patches]
    replaced = [kind for kind, patches in transformer_options.get("patches_replace", {}).items() if patches]
    whole = {REPLACED} if supported else set()
    unknown = sorted({*kinds} - {*supported}) + sorted({*replaced} - whole)
    if not unknown:
        return
    known = f" (what is: {', '.join(supported)} and whole blocks)" if supported else ""
    raise ValueError(
        f"a node patches this model with {unknown[0]}, which is not supported by "
        f"{'the LowVRAM loader' if supported else 'FramePack (Low VRAM)'}{known}: take that node out"
        f"{', or load the file with ComfyUI' + chr(39) + 's own loader' if supported else ''}"
    )


class BlockPatches(Visitor):
    """Calls core's patches as core's model does; see `comfy/ldm/wan/model.py`.

    `latent [B, in, T, H, W]` is the model's input. `reference` tells whether a frame of tokens stands before its own.
    """

    def __init__(self, transformer_options: dict[str, Any], latent: Tensor, config: WanConfig, reference: bool):
        self.options = transformer_options
        self.latent = latent
        self.flat_time = bool(config.vace_layers)  # core's VACE model knows one timestep per sample only
        patches = transformer_options.get("patches", {})
        self.replacements = transformer_options.get("patches_replace", {}).get(REPLACED, {})
        self.block, self.self_attn, self.cross_attn = (patches.get(kind, []) for kind in SUPPORTED)
        self.sees_attention, self.sees_text = bool(self.self_attn), bool(self.cross_attn)
        self.sees_stream = bool(self.block or self.cross_attn or self.replacements)
        grid = [size // patch for size, patch in zip(latent.shape[2:], config.patch_size, strict=True)]
        self.image_start = math.prod(grid[1:]) if reference else 0
        self.options["grid_sizes"] = torch.Size(grid)
        self.options["total_blocks"], self.options["block_type"] = config.num_layers, "double"

    def attention(self, own: Backend) -> Backend:
        return attention_of(self.options, own, IMAGE_LENGTHS)

    def cut(self, part: slice) -> BlockPatches:
        """The same for some samples of the batch, which are of some of its conditions."""
        batch = self.latent.shape[0]
        one = copy.copy(self)
        one.latent, one.options = self.latent[part], dict(self.options)
        for name in PER_CHUNK:
            chunks = self.options.get(name)
            if chunks and batch % len(chunks) == 0:
                size = batch // len(chunks)
                one.options[name] = [chunks[index] for index in dict.fromkeys(i // size for i in range(batch)[part])]
        return one

    def visit(self, name: str, state: Pass, run: Callable[[], None]) -> None:
        kind, _, number = name.partition(".")
        if kind != "blocks":  # core's patches are of the others; inside, those of VACE have them too
            run()
            return
        index = int(number)
        self.options["block_index"] = index
        replacement = self.replacements.get(("double_block", index))
        if replacement is None:
            run()
        else:
            self._replace(replacement, state, run)
        for patch in self.block:
            tokens = self._tokens(state.x)
            arguments = {"img": tokens, "x": self.latent, "block_index": index, "img_offset": self.image_start}
            arguments |= {"vec": self._per_sample(state.time, state.x), "transformer_options": self.options}
            _write(patch(arguments)["img"], tokens)

    @outside_graphs
    def attended(self, x: Tensor, q: Tensor, k: Tensor) -> None:
        attended = x.flatten(2)
        for patch in self.self_attn:
            _write(patch({"x": attended, "q": q, "k": k, "transformer_options": self.options}), attended)

    @outside_graphs
    def after_text(self, x: Tensor) -> None:
        tokens = self._tokens(x)
        for patch in self.cross_attn:
            _write(patch({"x": tokens, "transformer_options": self.options}), tokens)

    def _replace(self, replacement: Callable[..., dict[str, Tensor]], state: Pass, run: Callable[[], None]) -> None:
        tokens = self._tokens(state.x)
        vector = self._per_sample(state.modulation, state.x)
        given = {"img": tokens, "txt": None, "vec": vector, "pe": state.rope, "transformer_options": self.options}

        def original(arguments: dict[str, Any]) -> dict[str, Tensor]:
            check_unchanged(arguments, given)
            _write(arguments["img"], tokens)
            run()
            return {"img": tokens}

        try:
            made = replacement(dict(given), {"original_block": original})["img"]
        except (AttributeError, TypeError) as error:
            missing = next((name for name, kind in (("txt", "NoneType"), ("pe", "Rope")) if kind in str(error)), None)
            if missing is None:
                raise
            raise ValueError(unshown(missing)) from error
        _write(made, tokens)

    def _tokens(self, x: Tensor) -> Tensor:
        """Rows of all samples as `[B, tokens, dim]`, the same bytes."""
        return x.view(self.latent.shape[0], -1, x.shape[1])

    def _per_sample(self, vector: Tensor, x: Tensor) -> Tensor:
        """What there is one of per timestep, as `[B, timesteps, ...]` of core's precision."""
        vector = vector.to(x.dtype)
        return vector if self.flat_time else vector.unflatten(0, (self.latent.shape[0], -1))


def check_unchanged(arguments: dict[str, Any], given: dict[str, Any]) -> None:
    """ValueError for what a node shows the original block otherwise than it was `given`, but for `img`."""
    for name in ("txt", "vec", "pe"):
        shown, own = arguments.get(name, given[name]), given[name]
        same = shown is own or (isinstance(shown, Tensor) and isinstance(own, Tensor) and torch.equal(shown, own))
        if not same:
            raise ValueError(unshown(name))
    shown, own = arguments.get("transformer_options") or {}, given["transformer_options"]
    for name in (OVERRIDE, "patches", "patches_replace"):
        if shown.get(name, own.get(name)) is not own.get(name):
            raise ValueError(unshown(f"transformer_options[{name!r}]"))


def unshown(name: str) -> str:
    """What is said of an input of a block that is the same for all of them here."""
    return (
        f"a node replaces a block of this model and reads or changes its {name!r}, which is not supported by the "
        "LowVRAM loader (what is: 'img', and leaving the block out): take that node out, or load the file with "
        "ComfyUI's own loader"
    )


def _write(value: Tensor, tokens: Tensor) -> None:
    if value is not tokens:
        tokens.copy_(value)
