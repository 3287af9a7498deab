"""The Wan 2.1 / 2.2 video diffusion transformer.

Source: Wan-Video/Wan2.1 and Wan2.2 (`wan/modules/model.py`); parameter names are theirs. What a variant adds (VACE,
a reference picture, camera movement) is there where its configuration says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...attention.backend import Backend, PassAttention
from ...attention.sparse.order import video_order
from ...fused.ops import Rope
from ...team.share import Part
from ...transformer.block_cache import BlockCache, WithRoom, probed_rows, probed_step, run_cached, with_room
from ...transformer.layers import parameter, sinusoidal_embedding
from ...transformer.nag import NagSettings
from ...transformer.together import CardsTogether
from ...transformer.transformer import BroughtLayers, Transformer
from ...transformer.workspace import Rows, Workspace
from ...weights.linear.linear import Linear
from .blocks import BlockHooks, Context, ControlStream, KeysValues, NagKeys, NagText, Pass, WanBlock
from .camera import CameraAdapter
from .config import WanConfig
from .embeddings import (
    AxisPositions,
    ImageEmbedding,
    PatchEmbedding,
    ReferenceEmbedding,
    Rotate,
    given_angles,
    rotary_angles,
)
from .vace import VaceBlock, vace_places


class Visitor(BlockHooks):
    """What a host does around the blocks of a pass, and inside them; this one does nothing."""

    def visit(self, name: str, state: Pass, run: Callable[[], None]) -> None:
        """Told of every block in turn by its name ("blocks.3"), with the pass as it stands and what runs the block."""
        run()

    def attention(self, own: Backend) -> Backend:
        """The attention of the pass, where a host has another than the model's `own`."""
        return own

    def cut(self, part: slice) -> Visitor:
        """The same for some samples of the batch."""
        return self


@dataclass(frozen=True)
class Nag:
    """A negative prompt that guides cross-attention (see `transformer/nag.py`), in `samples` of a batch (None: all).

    `text [1, L, text_dim]` is the encoder's, `[1, L, dim]` with `embedded`; `context` is what is made of it once.
    """

    text: Tensor
    settings: NagSettings
    samples: tuple[bool, ...] | None = None
    embedded: bool = False
    context: Context | None = None

    def cut(self, part: slice) -> Nag:
        """The same for some samples of the batch."""
        return self if self.samples is None else replace(self, samples=self.samples[part])

    def beside(self, shown: KeysValues | Context, index: int) -> KeysValues | Context:
        """What the block of this number is shown, with the negative prompt beside it."""
        own = self.context
        assert own is not None
        if isinstance(shown, Context):
            return replace(shown, nag=NagText(own.text, self.settings, self.samples))
        assert own.keys_values is not None
        return replace(shown, nag=NagKeys(own.keys_values[index].pairs[0], self.settings, self.samples))


@dataclass(frozen=True)
class Extras:
    """What a variant or a host adds to a pass.

    `vace_frames` are control videos with masks, each `[B, vace_channels, T, H, W]`, `vace_strengths` one for each;
    `reference [B, z, H, W]` is shown as a frame before the first; `camera [B, camera_channels, T, 8H, 8W]` are rays;
    `rotate` makes a host's own rotations of positions, `nag` guides by a negative prompt. `cache` says whether blocks
    may be skipped; it is found by `prompts`, one for each sample: (0 for a prompt, 1 for a negative one; which).
    """

    vace_frames: tuple[Tensor, ...] = ()
    vace_strengths: tuple[float, ...] = ()
    reference: Tensor | None = None
    camera: Tensor | None = None
    positions: AxisPositions = field(default_factory=AxisPositions)
    rotate: Rotate | None = None
    nag: Nag | None = None
    visitor: Visitor = field(default_factory=Visitor)
    prompts: tuple[tuple[int, Hashable], ...] = ()
    cache: BlockCache | None = None

    def to(self, device: torch.device) -> Extras:
        """The same on a device; a negative prompt is brought when it is embedded."""
        return replace(
            self,
            vace_frames=tuple(frames.to(device) for frames in self.vace_frames),
            reference=None if self.reference is None else self.reference.to(device),
            camera=None if self.camera is None else self.camera.to(device),
        )

    def cut(self, part: slice) -> Extras:
        """The same for some samples of the batch."""
        return replace(
            self,
            vace_frames=tuple(frames[part] for frames in self.vace_frames),
            reference=None if self.reference is None else self.reference[part],
            camera=None if self.camera is None else self.camera[part],
            visitor=self.visitor.cut(part),
            nag=None if self.nag is None else self.nag.cut(part),
            prompts=self.prompts[part],
        )


class WanModel(Transformer):
    """Velocity of the flow at a timestep, `[B, in, T, H, W] -> [B, out, T, H, W]`."""

    fits_any_size = True

    def __init__(self, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config, **factory)
        self.text_embedding = BroughtLayers(
            Linear(config.text_dim, dim, **factory), nn.GELU("tanh"), Linear(dim, dim, **factory)
        )
        self.time_embedding = BroughtLayers(
            Linear(config.freq_dim, dim, **factory), nn.SiLU(), Linear(dim, dim, **factory)
        )
        self.time_projection = BroughtLayers(nn.SiLU(), Linear(dim, 6 * dim, **factory))
        self.blocks = nn.ModuleList(WanBlock(config, **factory) for _ in range(config.num_layers))
        self.head = Head(config, **factory)
        self.img_emb = ImageEmbedding(config, **factory) if config.image_dim else None
        if config.vace_layers:
            self.vace_blocks = nn.ModuleList(VaceBlock(config, i == 0, **factory) for i in range(config.vace_layers))
            self.vace_patch_embedding = PatchEmbedding(config, **factory, in_channels=config.vace_channels)
        self.ref_conv = ReferenceEmbedding(config, **factory) if config.reference_channels else None
        self.control_adapter = CameraAdapter(config, **factory) if config.camera_channels else None
        self._angles: tuple[tuple[Any, ...], Rope] | None = None  # what they are of, and they

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        context: Tensor | Context,
        image_tokens: Tensor | None = None,
        extras: Extras = Extras(),  # noqa: B008 - immutable
    ) -> Tensor:
        """
        `latent [B, in, T, H, W]`; `timestep` is sigma * 1000, `[B]` or one per latent frame `[B, T]`;
        `context` is the encoder's text `[B, 512, text_dim]` or an `embed_context` result;
        `image_tokens [B, 257, image_dim]` are CLIP's penultimate features (two images: 514 or [2B, 257, …]).
        """
        if not isinstance(context, Context):
            context = self.embed_context(context, image_tokens)
        grid = self.patch_embedding.grid(latent)  # (t, h, w) in tokens
        if extras.reference is not None:
            grid = (grid[0] + 1, *grid[1:])
        # first of all: a later one would lie in bytes that something larger was in, and will be in the next pass
        velocity = latent.new_empty(latent.shape[0], self.config.out_channels, *latent.shape[2:])
        batch, tokens = latent.shape[0], math.prod(grid)
        times = timestep.numel() // batch  # of a sample
        part = None if self.share is None else self.share.part(tokens, self.share.run_of(tokens, times))
        num_rows = batch * (tokens if part is None else part.num_mine)
        cached = with_room(extras.cache, num_rows, self.config.dim, self.execution.dtype, latent.device)
        work = self.workspace(num_rows, latent.device, batch, extras.visitor, part)
        time, modulation = self.embed_time(timestep, work.pool)  # [groups, dim], [groups, 6, dim]
        rows_per_group, signal = num_rows // time.shape[0], time
        if part is not None and times > 1:
            rows_per_group = part.share.run_of(tokens, times)
            time, modulation = (part.of_runs(each, times, batch, rows_per_group) for each in (time, modulation))
        rope = self.angles(grid, extras, latent.device, part)
        work.fit_any_size(rope.cos, rope.sin)
        x = self.embed_latent(latent, extras, work)  # [B * tokens, dim]
        if work.residual_scale != 1:
            x.mul_(work.residual_scale)  # in place: no plan has room for a second one
        work.fit_any_size(x)
        nag = None if extras.nag is None else self.embed_nag(extras.nag)
        state = Pass(x, time, modulation, rows_per_group, rope, work, hooks=extras.visitor, frames_apart=times > 1)
        blocks = self.run_blocks(state, context, replace(extras, nag=nag), grid)
        if cached is not None:
            self.run_cached(x, blocks, cached, signal, work)
        elif part is not None and self.execution.watch is None and len(extras.vace_frames) < 2:
            part.run(blocks, x.device)  # each block attends once, and nothing else of it is the cards' together
        else:
            for _ in blocks:
                pass
        patches = self.head(x, time, work.as_given(rows_per_group), work)
        if part is not None:
            patches = part.gather(patches, batch)
        if extras.reference is not None:
            patches = patches.view(latent.shape[0], grid[0], -1)[:, 1:].reshape(-1, patches.shape[-1])
        return self.patch_embedding.unpatchify_into(velocity, patches)

    def run_blocks(
        self, state: Pass, context: Context, extras: Extras, grid: tuple[int, int, int]
    ) -> Generator[None, None, None]:
        """Take a pass through the blocks, one after the other: it yields when one is done."""
        x, work, nag, visitor = state.x, state.work, extras.nag, extras.visitor
        state = replace(state, controls=self.embed_controls(x, extras, work))
        work.watched = watched = self.begin_attention(grid, state.frames_apart, extras, work)
        if watched is not None and watched.reorders:
            self.forget_angles()  # in place: they are this pass's alone
        per_token = [x, state.rope.cos, state.rope.sin, *(control.tokens for control in state.controls)]
        self.make_room(work)
        blocks = self.ordered_blocks()
        arriving = self.stream(tuple(blocks.values()))
        for index, ((name, block), _) in enumerate(zip(blocks.items(), arriving, strict=True)):
            shown = context.keys_values[index] if context.keys_values else context
            if nag is not None and name.startswith("blocks."):
                shown = nag.beside(shown, index)
            if watched is not None:
                watched.begin_layer(index, per_token, work.pool)
            visitor.visit(name, state, partial(block.advance, state, shown))
            yield
        if watched is not None:
            watched.end(x, work.pool)

    def run_cached(
        self, x: Tensor, blocks: Generator[None, None, None], cached: WithRoom, signal: Tensor, work: Workspace
    ) -> None:
        """Take tokens through the blocks, or skip them: of several cards one decides for all, by all cards' tokens."""
        part, batch = work.part, work.rows.batch
        if part is None:
            run_cached(x, blocks, cached, signal, work.pool, batch)
            return
        cache, step = cached.cache, probed_step(part.spans[-1].stop)
        probed = part.every(step)

        def reuse(seen: Tensor) -> bool:
            whole = probed.gather(seen, batch) if cache.probes else seen
            return part.share.agree(lambda: cache.reuse(whole) and cache.residual is not None)

        probe = partial(probed_rows, batch=batch, first=-part.mine.start % step, step=step)
        run_cached(x, blocks, cached, signal, work.pool, batch, reuse, probe)

    def begin_attention(
        self, grid: tuple[int, int, int], apart: bool, extras: Extras, work: Workspace
    ) -> PassAttention | None:
        """Self-attention of this pass where it is sparse or watched; a reference picture's tokens are always attended.

        Tokens stay in their places where a host or a step cache is shown them, and those of a frame together where
        timesteps differ (`apart`).
        """
        watch, tokens = self.execution.watch, math.prod(grid)
        if watch is None or watch.dense is not self.execution.attention:
            return None
        together = CardsTogether.of(work.part, self.config.num_heads)
        begun = watch.begin_pass(tokens, work.pool.device, together, self.sample)
        if begun is not None and begun.sparse:
            num_sinks = int(extras.reference is not None)
            begun.orders = not (extras.visitor.sees_stream or extras.visitor.sees_attention)
            if extras.cache is not None and extras.cache.probes and begun.decision.chosen(0) is not None:
                begun.orders = False  # who looks at the first block finds the tokens as they were
            key = (grid, num_sinks, apart, begun.orders)
            begun.order = watch.order_of(key, work.pool.device, lambda: video_order(grid, num_sinks, apart))
        return begun

    def angles(
        self, grid: tuple[int, int, int], extras: Extras, device: torch.device, part: Part | None = None
    ) -> Rope:
        """Those of all tokens, or of a card's `part` of them.

        They are kept for the next pass: in an allocator of segments they would else lie in what is free between two
        passes, and later leave no room there for what is larger.
        """
        if extras.rotate is not None:
            rope = given_angles(grid, extras.rotate, device, extras.positions)
            return rope if part is None else Rope(part.cut(rope.cos), part.cut(rope.sin))
        key = (grid, extras.positions, device, None if part is None else part.mine)
        if self._angles is None or self._angles[0] != key:
            self._angles = None
            rope = rotary_angles(grid, self.config.head_dim, device, extras.positions)
            self._angles = key, rope if part is None else Rope(part.cut(rope.cos), part.cut(rope.sin))
        return self._angles[1]

    def forget_angles(self) -> None:
        """Free what is kept between passes."""
        self._angles = None

    def ordered_blocks(self) -> dict[str, WanBlock]:
        """All blocks by name, in the order of a pass; those of VACE stand after the block that they add to."""
        places = vace_places(self.config.num_layers, self.config.vace_layers)
        ordered: dict[str, WanBlock] = {}
        for index, block in enumerate(self.blocks):
            ordered[f"blocks.{index}"] = cast(WanBlock, block)
            if index in places:
                ordered[f"vace_blocks.{places[index]}"] = cast(WanBlock, self.vace_blocks[places[index]])
        return ordered

    def outer_modules(self) -> list[nn.Module]:
        return [self.head]

    def embed_latent(self, latent: Tensor, extras: Extras, work: Workspace) -> Tensor:
        """The pass's first tokens `[B * tokens, dim]`: of the reference where there is one, and of the latent."""
        part = work.part if extras.camera is None and extras.reference is None else None  # else cut when all are there
        x = self.patch_embedding(latent, work, part)
        if extras.camera is not None and self.control_adapter is not None:
            frames = x.view(latent.shape[0], latent.shape[2] // self.config.patch_size[0], -1, x.shape[1])
            for index, rays in enumerate(extras.camera.unbind(2)):  # one at a time: its features are as wide as tokens
                frames[:, index] += self.control_adapter(rays, work.dtype)
        if extras.reference is not None:
            if self.ref_conv is None:
                raise ValueError("this Wan model takes no reference picture: use a Fun Control model, or leave it out")
            reference = self.ref_conv(extras.reference, work.dtype)  # [B, tokens of a frame, dim]
            x = torch.cat([reference, x.view(latent.shape[0], -1, x.shape[1])], dim=1).flatten(0, 1)
        return x if work.part is None or part is not None else work.part.cut(x, latent.shape[0])

    def embed_controls(self, x: Tensor, extras: Extras, work: Workspace) -> tuple[ControlStream, ...]:
        """Tokens of the control videos as they enter the first VACE block."""
        streams = []
        for frames, strength in zip(extras.vace_frames, extras.vace_strengths, strict=True):
            first = cast(VaceBlock, self.vace_blocks[0])
            tokens = self.vace_patch_embedding(frames, work, work.part)
            first.join_(tokens, x, work)
            work.fit_any_size(tokens)
            streams.append(ControlStream(tokens, strength))
        return tuple(streams)

    def embed_context(self, text: Tensor, image_tokens: Tensor | None = None) -> Context:
        """Embed a prompt (and CLIP image tokens, where the model takes them) once, for any number of steps.

        Without a picture's tokens a model that takes them reads the text in their place, as ComfyUI's does.
        """
        dtype = self.execution.dtype
        image = None
        if self.img_emb is not None and image_tokens is not None:
            with self.bring((self.img_emb,), None):
                image = self.img_emb(image_tokens.to(dtype).reshape(text.shape[0], -1, image_tokens.shape[-1]))
        embedded = self.text_embedding(text, self.bring, None, dtype)
        return Context(embedded, embedded if self.img_emb is not None and image is None else image)

    def embed_nag(self, nag: Nag) -> Nag:
        """The same with its context, where that is not made yet."""
        if nag.context is not None:
            return nag
        return replace(nag, context=Context(nag.text) if nag.embedded else self.embed_context(nag.text))

    def embed_time(self, timestep: Tensor, spare: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embedding `[groups, dim]` and block modulation `[groups, 6, dim]`; one group per timestep.

        They are made in the compute dtype, as ComfyUI makes them, and given in fp32, in which blocks add to them.
        """
        angles = sinusoidal_embedding(self.config.freq_dim, timestep.flatten())
        time = self.time_embedding(angles.to(self.execution.dtype), self.bring, spare)
        modulation = self.time_projection(time, self.bring, spare)
        return time.float(), modulation.float().unflatten(1, (6, -1))

    def workspace(
        self,
        num_rows: int,
        device: torch.device,
        batch: int = 1,
        visitor: BlockHooks = BlockHooks(),  # noqa: B008
        part: Part | None = None,
    ) -> Workspace:
        """Who sees attention sees all of it at once, and who sees the residual stream sees tokens as they are."""
        rows = Rows(num_rows, self.config.dim, self.config.ffn_dim, self.config.num_heads, batch=batch)
        scale = 1.0 if visitor.sees_stream else None
        scratch = self.scratch_elements()
        return Workspace(self.execution, rows, device, scratch, visitor.sees_attention, self.arrive, scale, part)


class Head(nn.Module):
    """Modulated norm and the projection to patches, `[rows, dim] -> [rows, out * patch volume]`."""

    def __init__(self, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = config.eps
        patch = math.prod(config.patch_size)
        self.head = Linear(config.dim, config.out_channels * patch, device=device, dtype=dtype)
        self.modulation = parameter(1, 2, config.dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, time: Tensor, group_rows: int | None, work: Workspace) -> Tensor:
        shift, scale = (self.modulation.float() + time[:, None]).unbind(1)
        rows_per_group = work.rows_per_group(group_rows, time)
        out = x.new_empty(x.shape[0], self.head.out_features)
        work.scratch.reset()
        project = self.head.prepare(work.dtype)
        eps = work.eps(self.eps)
        for rows in work.chunks():  # what is normed has no name, so that it is gone before the next rows are
            project(work.ops.modulated_norm(x[rows], shift, scale, rows.start, rows_per_group, eps), out=out[rows])
        return out
