"""The FramePack video diffusion transformer: the next latents of a video, given a packed history of the others.

Source: lllyasviel/FramePack (`diffusers_helper/models/hunyuan_video_packed.py`), https://arxiv.org/abs/2504.12626;
parameter names are diffusers' `HunyuanVideoFramepackTransformer3DModel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ...attention.sparse.order import shown_order
from ...attention.sparse.run import AttentionPass
from ...fused.ops import Rope
from ...team.share import Part
from ...transformer.block_cache import BlockCache, run_cached, with_room
from ...transformer.nag import NagSettings
from ...transformer.together import CardsTogether
from ...transformer.transformer import Block, Transformer
from ...transformer.workspace import Rows, Workspace
from ...weights.kernels.late_rows import tensor_of
from ...weights.linear.linear import Linear
from .blocks import DoubleBlock, FramePackBlock, Modulation, Pass, SingleBlock
from .config import FramePackConfig
from .embeddings import HistoryEmbedding, ImageProjection, PatchEmbedding, Patches, TimeTextEmbedding, rotary_angles
from .refiner import TokenRefiner
from .rows import Negative, norm_by

# What `make` makes of every block, in order; a streamed model brings only the weights that this takes.
Visit = Callable[[Callable[[Block], Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Frames:
    """`latents [1, c, T, h, w]` and their places `indices [T]` on the time axis."""

    latents: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> Frames:
        """The same on a device."""
        return Frames(self.latents.to(device), self.indices.to(device))


@dataclass(frozen=True)
class History:
    """What is shown beside the noise, any of it or none: near latents in full, others at a half and at a quarter."""

    clean: Frames | None = None
    twice: Frames | None = None
    four: Frames | None = None

    def to(self, device: torch.device) -> History:
        """The same on a device."""
        clean, twice, four = (None if each is None else each.to(device) for each in (self.clean, self.twice, self.four))
        return History(clean, twice, four)


@dataclass(frozen=True)
class Prompt:
    """`text [1, n, text_dim]`, cropped to its mask, and `pooled [1, pooled_dim]`.

    `guidance` is the distilled one of this prompt alone, where it has its own.
    """

    text: Tensor
    pooled: Tensor
    guidance: float | None = None

    def to(self, device: torch.device) -> Prompt:
        return Prompt(self.text.to(device), self.pooled.to(device), self.guidance)


@dataclass(frozen=True)
class StepCondition:
    """What one step sees of prompt and timestep, in the dtype that computes.

    `text [n, dim]` is refined, `blocks` hold each block's modulation `[k, dim]` in order, `head [2, dim]` scale and
    shift of the output's norm. `nag` guides by a negative prompt.
    """

    text: Tensor
    blocks: tuple[Tensor, ...]
    head: Tensor
    nag: StepNag | None = None

    def to(self, device: torch.device) -> StepCondition:
        """The same on a device."""
        return StepCondition(
            self.text.to(device),
            tuple(block.to(device) for block in self.blocks),
            self.head.to(device),
            None if self.nag is None else replace(self.nag, negative=self.nag.negative.to(device)),
        )


@dataclass(frozen=True)
class StepNag:
    """What the step sees of a negative prompt that guides attention (see `transformer/nag.py`), and how it does."""

    negative: StepCondition
    settings: NagSettings


@dataclass(frozen=True)
class Shown:
    """Frames in the order of the rows; `factor` times as large a patch makes one token of them."""

    frames: Frames
    patches: Patches
    factor: int
    num_rows: int


class FramePackModel(Transformer):
    """Velocity of the flow at a timestep, `[1, in, T, h, w] -> [1, out, T, h, w]`."""

    def __init__(
        self, config: FramePackConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.config = config
        with torch.device(device if device is not None else "cpu"):
            self.x_embedder = PatchEmbedding(config)
            self.clean_x_embedder = HistoryEmbedding(config)
            self.context_embedder = TokenRefiner(config)
            self.image_projection = ImageProjection(config)
            self.time_text_embed = TimeTextEmbedding(config, config.pooled_dim, guided=True)
            self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
            self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
            self.norm_out = Modulation(config, 2)
            self.proj_out = Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.to(dtype=dtype)

    def forward(
        self,
        noisy: Frames,
        history: History,
        condition: StepCondition,
        image: Tensor | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """`condition` is that of the step (see `conditions`), `image [m, dim]` an `embed_image` result.

        ValueError for latents that do not suit the model or each other.
        """
        shown = self.shown(noisy, history)
        pictures = [] if image is None else [image]
        texts = [*pictures, condition.text]
        negative_texts = [] if condition.nag is None else [*pictures, condition.nag.negative.text]
        num_negative = sum(text.shape[0] for text in negative_texts)
        texts += negative_texts
        num_image = sum(part.num_rows for part in shown)
        all_images = num_image
        device, num_rows = noisy.latents.device, num_image + sum(text.shape[0] for text in texts)
        part = None if self.share is None else self.share.part(num_rows)
        ours = made = slice(num_image - shown[-1].num_rows, num_image)
        if part is not None:
            num_image, ours = part.within(slice(0, all_images)).num_mine, part.own(made)
        # of the noisy rows alone: what is made of the others is not looked at
        cached = with_room(cache, ours.stop - ours.start, self.config.dim, self.execution.dtype, device)
        work = self.workspace(num_rows if part is None else part.num_mine, device, part)
        x = torch.empty(num_rows, work.dim, device=device, dtype=work.dtype)
        rope = self.embed(shown, texts, x)
        if part is not None:
            x, rope = part.cut(x), Rope(part.cut(rope.cos), part.cut(rope.sin))
        if work.residual_scale != 1:
            x.mul_(work.residual_scale)

        state = Pass(x, num_image, rope, work, num_negative, all_images)
        work.watched = self.begin_attention(shown, work)
        blocks = self.run_blocks(state, condition)
        if cached is None and part is not None and work.watched is None:
            part.run(blocks, device)
        elif cached is None:
            for _ in blocks:
                pass
        else:
            reuse = partial(self.is_reused, state, cached.cache)
            run_cached(x[ours], blocks, cached, self.signal(state, condition), work.pool, reuse=reuse)
        patches = self.head(x, ours, condition.head, work)
        if part is not None:
            patches = part.within(made).gather(patches)
        return self.unpatchify(patches, noisy.latents.shape[2:]).to(noisy.latents.dtype)

    def ordered_blocks(self) -> dict[str, FramePackBlock]:
        """All blocks by name, in the order of a pass."""
        return {
            f"{name}.{index}": cast(FramePackBlock, block)
            for name in ("transformer_blocks", "single_transformer_blocks")
            for index, block in enumerate(cast(nn.ModuleList, getattr(self, name)))
        }

    def run_blocks(self, state: Pass, condition: StepCondition) -> Generator[None, None, None]:
        """Take a pass through the blocks, one after the other: it yields when one is done."""
        work, watched = state.work, state.work.watched
        blocks = tuple(self.ordered_blocks().values())
        steps = zip(blocks, condition.blocks, self.stream(blocks), strict=True)
        for index, (block, modulation, _) in enumerate(steps):
            if watched is not None:
                watched.begin_layer(index, [state.x, state.rope.cos, state.rope.sin], work.pool)
            block.advance(state, modulation, self.negative(state, condition, index))
            yield
        if watched is not None:
            watched.end(state.x, work.pool)

    def negative(self, state: Pass, condition: StepCondition, index: int) -> Negative | None:
        """What the block of this number is shown of a negative prompt."""
        nag = condition.nag
        if nag is None:
            return None
        modulation, part = nag.negative.blocks[index].float(), state.work.part
        if part is None:
            return Negative(state.x.shape[0] - state.num_negative, modulation, nag.settings)
        num_rows = part.spans[-1].stop
        all_first = num_rows - state.num_negative
        first = part.own(slice(all_first, num_rows)).start
        return Negative(first, modulation, nag.settings, state.all_images, all_first)

    def begin_attention(self, shown: Sequence[Shown], work: Workspace) -> AttentionPass | None:
        """Self-attention of this pass where it is sparse or watched; history and text are always attended."""
        watch, device = self.execution.watch, work.pool.device
        if watch is None or watch.dense is not self.execution.attention:
            return None
        num_rows = work.num_rows if work.part is None else work.part.spans[-1].stop
        together = CardsTogether.of(work.part, self.config.num_heads)
        begun = watch.begin_pass(num_rows, device, together, self.sample)
        if begun is not None and begun.sparse:
            *history, noisy = shown
            parts, grid = tuple(part.num_rows for part in history), noisy.patches.grid(noisy.frames.latents)
            num_text = num_rows - sum(part.num_rows for part in shown)
            key = (parts, grid, num_text)
            begun.order = watch.order_of(key, device, lambda: shown_order(parts, grid, num_text))
        return begun

    def is_reused(self, state: Pass, cache: BlockCache, signal: Tensor) -> bool:
        """What the cache says of this step: of several cards' one of them, for all."""
        part = state.work.part
        if part is None:
            return cache.reuse(signal)
        whole = part.within(slice(0, state.all_images)).gather(signal)
        return part.share.agree(lambda: cache.reuse(whole) and cache.residual is not None)

    def signal(self, state: Pass, condition: StepCondition) -> Tensor:
        """What tells a step cache how far this step is from the last, in q's bytes: the first block's image rows."""
        signal = state.work.queries[: state.num_image]
        shift, scale = condition.blocks[0][:2].float()
        normed = norm_by(state.x, shift, scale, self.config.eps, state.work)
        for rows in state.work.chunks(0, state.num_image):
            signal[rows] = tensor_of(normed(rows))
        return signal

    def conditions(
        self, prompt: Prompt, timesteps: Tensor, guidance: float, visit: Visit | None = None
    ) -> list[StepCondition]:
        """What each of the steps `timesteps [S]` (sigma * 1000) sees of a prompt; `guidance` is distilled, times 1000.

        They take little memory beside a pass, so that all of a run are made at once. ValueError for an empty text.
        """
        if prompt.text.shape[0] != 1 or prompt.text.shape[1] == 0:
            raise ValueError(
                f"the prompt's text is {tuple(prompt.text.shape)}; expected (1, tokens, {self.config.text_dim}) with "
                "at least one token: give one prompt at a time, cropped to its mask (an empty one has its end token)"
            )
        dtype = self.execution.dtype
        timesteps = timesteps.to(prompt.text.device)
        with self.bring((self.context_embedder,), None):
            text = self.context_embedder(prompt.text.to(dtype), timesteps, self.execution)  # [S, n, dim]
        with self.bring((self.time_text_embed, self.norm_out), None):
            time = self.time_text_embed(timesteps, prompt.pooled.to(dtype), guidance)  # [S, dim]
            heads = self.norm_out(time)

        def modulate(block: Block) -> Tensor:
            return cast(FramePackBlock, block).modulate(time)

        if visit is None:
            modulations = [modulate(block) for block in self.ordered_blocks().values()]
        else:
            modulations = visit(modulate)
        return [
            StepCondition(text[step], tuple(each[step] for each in modulations), heads[step])
            for step in range(timesteps.shape[0])
        ]

    def embed_image(self, tokens: Tensor) -> Tensor:
        """SigLIP's `[1, m, image_dim]` -> `[m, dim]`, once per picture."""
        with self.bring((self.image_projection,), None):
            return self.image_projection(tokens.to(self.execution.dtype)).squeeze(0)

    def embed(self, shown: Sequence[Shown], texts: Sequence[Tensor], x: Tensor) -> Rope:
        """Fill `x [rows, dim]` with all tokens; returns the angles of all rows, those of the text zero."""
        half = self.config.head_dim // 2
        cos, sin = torch.ones(x.shape[0], half, device=x.device), torch.zeros(x.shape[0], half, device=x.device)
        first = 0
        for part in shown:
            rows = slice(first, first + part.num_rows)
            latents = part.frames.latents.to(x.device)
            part.patches(latents, x[rows])
            size = (latents.shape[3] // self.config.patch_size[1], latents.shape[4] // self.config.patch_size[2])
            cos[rows], sin[rows] = rotary_angles(part.frames.indices, size, part.factor, self.config, x.device)
            first = rows.stop
        torch.cat([text.to(x.dtype) for text in texts], out=x[first:])
        return Rope(cos, sin)

    def shown(self, noisy: Frames, history: History) -> list[Shown]:
        """What there is of the history and the noise, in the order of the rows: [4x, 2x, clean, noisy]."""
        clean = self.clean_x_embedder
        parts = (
            ("the history at 1/4", history.four, clean.proj_4x, 4),
            ("the history at 1/2", history.twice, clean.proj_2x, 2),
            ("the clean history", history.clean, clean.proj, 1),
            ("the noise", noisy, self.x_embedder.proj, 1),
        )
        size = tuple(noisy.latents.shape[3:])
        self.check("the noise", noisy, size)
        shown = []
        for name, frames, patches, factor in parts:
            if frames is None:
                continue
            self.check(name, frames, size)
            shown.append(Shown(frames, patches, factor, math.prod(patches.grid(frames.latents))))
        return shown

    def check(self, name: str, frames: Frames, size: tuple[int, ...]) -> None:
        """ValueError where frames do not suit the model, their indices or the `size` (h, w) of the noise."""
        batch, channels, *shape = frames.latents.shape
        if batch != 1:
            raise ValueError(f"{name} is a batch of {batch} latents; FramePack makes one video at a time: give 1")
        if channels != self.config.in_channels:
            raise ValueError(
                f"{name} has {channels} channels but this FramePack model takes {self.config.in_channels}: "
                "use the HunyuanVideo VAE"
            )
        if any(length % patch for length, patch in zip(shape, self.config.patch_size, strict=True)):
            raise ValueError(
                f"the size {tuple(shape)} (frames, height, width) of {name} is not divisible by the patch "
                f"{self.config.patch_size}: choose a height and width that are multiples of 16 pixels"
            )
        if tuple(shape[1:]) != size:
            raise ValueError(
                f"{name} has latents of (height, width) {tuple(shape[1:])} but the noise of {size}: "
                "bring all pictures and latents to one size"
            )
        if frames.indices.shape != (shape[0],):
            raise ValueError(
                f"{name} has {shape[0]} frames but indices of shape {tuple(frames.indices.shape)}: give one per frame"
            )

    def head(self, x: Tensor, noisy: slice, modulation: Tensor, work: Workspace) -> Tensor:
        """Patches `[noisy rows, out * patch volume]`."""
        scale, shift = modulation.float()
        normed = norm_by(x, shift, scale, self.config.eps, work)
        out = x.new_empty(noisy.stop - noisy.start, self.proj_out.out_features)
        project = self.proj_out.prepare(work.dtype)
        for rows in work.chunks(noisy.start, noisy.stop):
            project(normed(rows), out=out[rows.start - noisy.start : rows.stop - noisy.start])
        return out

    def unpatchify(self, patches: Tensor, size: torch.Size) -> Tensor:
        pt, ph, pw = self.config.patch_size
        return rearrange(
            patches,
            "(t h w) (c pt ph pw) -> 1 c (t pt) (h ph) (w pw)",
            t=size[0] // pt, h=size[1] // ph, pt=pt, ph=ph, pw=pw,
        )  # fmt: skip

    def workspace(self, num_rows: int, device: torch.device, part: Part | None = None) -> Workspace:
        config = self.config
        rows = Rows(num_rows, config.dim, config.mlp_dim, config.num_heads, joined_dim=config.dim + config.mlp_dim)
        # a single block's MLP works in the bytes of k and v: no attention may be left to do by then
        return Workspace(self.execution, rows, device, self.scratch_elements(), True, self.arrive, part=part)
