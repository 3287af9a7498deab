"""The block of a Wan transformer: self-attention, cross-attention to text and image, feed-forward.

Source: Wan-Video/Wan2.1 and Wan2.2 (`wan/modules/model.py`); parameter names are theirs. The residual stream `x` and
k, v are the only token-sized tensors, and q where it is not made for some rows at a time: norms are made chunk by chunk
inside the projections, the FFN's hidden activations live in the bytes of q, k and v, and residuals are added in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...fused.ops import Rope
from ...transformer.feed_forward import Add, Normed, feed_forward
from ...transformer.layers import Affine, Scale, parameter
from ...transformer.nag import NagSettings, guide_
from ...transformer.packed_heads import PackedHeads
from ...transformer.rows import within, writable
from ...transformer.transformer import Block
from ...transformer.workspace import Pair, Workspace
from ...weights.kernels.late_rows import GivenRows
from ...weights.linear.linear import Linear, may_write_over, project_together, share_rows, write_product
from ...weights.linear.projection import Projection
from .config import WanConfig


@dataclass(frozen=True)
class NagKeys:
    """A negative prompt's `(k, v) [1, L, H, D]` and how its attention guides `samples` of the batch (None: all)."""

    pair: tuple[Tensor, Tensor]
    settings: NagSettings
    samples: tuple[bool, ...] | None = None

    def guides(self, sample: int) -> bool:
        return self.samples is None or self.samples[sample]


@dataclass(frozen=True)
class NagText:
    """The same, whose keys and values are not made yet: `text [1, L, dim]`."""

    text: Tensor
    settings: NagSettings
    samples: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class KeysValues:
    """What one block's cross-attention reads: (k, v) pairs `[B, L, H, D]` of the text and, for I2V, the image."""

    pairs: list[tuple[Tensor, Tensor]]
    nag: NagKeys | None = None


@dataclass
class Context:
    """Embedded conditioning: `text [B, 512, dim]`, `image [B, 257 or 514, dim]` or None.

    `keys_values`, one per block, is made once per prompt where the plan has room for it.
    """

    text: Tensor
    image: Tensor | None = None
    keys_values: list[KeysValues] | None = None
    nag: NagText | None = None


@dataclass(frozen=True)
class ControlStream:
    """Tokens `[rows, dim]` of a control video, which run beside those of the video and are added with `strength`."""

    tokens: Tensor
    strength: float = 1.0


class BlockHooks:
    """What a host is shown inside blocks, to read or to write in place; this one sees nothing.

    Compiled code looks at the flags alone: a class that sets one makes its method no part of it
    (`torch.compiler.disable`).
    """

    sees_attention = False  # whether `attended` is called
    sees_text = False  # whether `after_text` is
    sees_stream = False  # whether anything is shown the residual stream, there or between blocks

    def attended(self, x: Tensor, q: Tensor, k: Tensor) -> None:
        """Self-attention's result `x` before its projection, and what it is of; `[B, L, H, D]` each."""

    def after_text(self, x: Tensor) -> None:
        """The residual stream `[rows, dim]` between cross-attention and feed-forward."""


@dataclass(frozen=True)
class Pass:
    """What the blocks of one forward pass share: `x [rows, dim]`, changed in place, and what steers them.

    `time [groups, dim]` is the embedding that `modulation [groups, 6, dim]` is made of. `frames_apart`: frames have
    timesteps of their own.
    """

    x: Tensor
    time: Tensor
    modulation: Tensor
    rows_per_group: int
    rope: Rope
    work: Workspace
    controls: tuple[ControlStream, ...] = ()
    hooks: BlockHooks = field(default_factory=BlockHooks)
    frames_apart: bool = False


class WanBlock(Block):
    """Self-attention, cross-attention to text and image, feed-forward; all added to `x` in place."""

    stages: tuple[tuple[str, ...], ...] = (("self_attn.", "modulation"), ("cross_attn.", "norm3."), ("ffn.",))

    def __init__(self, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eps = config.eps
        self.self_attn = SelfAttention(config, **factory)
        self.norm3 = Affine(config.dim, **factory)
        self.cross_attn = CrossAttention(config, **factory)
        self.ffn = FeedForward(config, **factory)
        self.modulation = parameter(1, 6, config.dim, **factory)

    def advance(self, state: Pass, shown: Context | KeysValues) -> None:
        """Take a pass through this block; `shown` is what cross-attention reads, or what it is made of."""
        self.run(state.x, state, shown)

    def run(self, x: Tensor, state: Pass, shown: Context | KeysValues) -> None:
        """Take tokens `[rows, dim]` of a pass through this block."""
        keys_values = shown
        if isinstance(shown, Context) and state.work.all_there:  # compiled code is given no other
            keys_values = self.cross_attn.keys_values(shown)
        work = state.work
        self(x, state.modulation, work.as_given(state.rows_per_group), state.rope, keys_values, work, state.hooks)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        group_rows: int | None,
        rope: Rope,
        keys_values: Context | KeysValues,
        work: Workspace,
        hooks: BlockHooks,
    ) -> None:
        """`x [rows, dim]` in place; `modulation [groups, 6, dim]` fp32."""
        x = writable(x)
        rows_per_group = work.rows_per_group(group_rows, modulation)
        work.arrive(self, 0)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + modulation).unbind(1)
        ops, eps = work.ops, work.eps(self.eps)
        gate1, gate2 = work.gate(gate1), work.gate(gate2)
        ungated = None if work.residual_scale == 1 else work.gate(torch.ones_like(gate1[:1]))

        def norm1(rows: slice) -> GivenRows:
            return ops.modulated_rows(x[rows], shift1, scale1, rows.start, rows_per_group, eps)

        def norm2(rows: slice) -> GivenRows:
            return ops.modulated_rows(x[rows], shift2, scale2, rows.start, rows_per_group, eps)

        def norm3(rows: slice) -> GivenRows:
            return ops.affine_rows(x[rows], self.norm3.weight, self.norm3.bias, eps)

        def add1(rows: slice, y: Tensor) -> None:
            ops.gated_add_(x[rows], y, gate1, rows.start, rows_per_group)

        def add2(rows: slice, y: Tensor) -> None:
            ops.gated_add_(x[rows], y, gate2, rows.start, rows_per_group)

        def add3(rows: slice, y: Tensor) -> None:
            if ungated is None:
                x[rows].add_(y)
            else:
                ops.gated_add_(x[rows], y, ungated, 0, x.shape[0])

        self.self_attn(norm1, add1, rope, work, hooks)
        work.arrive(self, 1)
        if isinstance(keys_values, Context):
            keys_values = self.cross_attn.keys_values(keys_values)
        self.cross_attn(norm3, add3, keys_values, work)
        if hooks.sees_text:
            hooks.after_text(x)
        work.arrive(self, 2)
        self.ffn(norm2, add2, work)

    def scratch_elements(self, dtype: torch.dtype) -> int:
        """The most elements that this block has unpacked at a time when it computes in `dtype`."""
        attn = self.self_attn
        together = [
            [attn.q, attn.k, attn.v],
            [attn.q, attn.o],
            [self.cross_attn.q, self.cross_attn.o],
            [self.ffn.widen],
            [self.ffn.narrow],
        ]
        return max(sum(layer.scratch_elements(dtype) for layer in layers) for layers in together)


class SelfAttention(nn.Module):
    def __init__(self, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim, **factory) for _ in range(4))
        self.norm_q, self.norm_k = (Scale(config.dim, **factory) for _ in range(2))

    def forward(self, normed: Normed, add: Add, rope: Rope, work: Workspace, hooks: BlockHooks) -> None:
        work.scratch.reset()
        to_q = self.q.prepare(work.dtype, work.scratch)
        unpacked = work.scratch.used
        fill = self.fill_packed if work.packs_keys else self.fill
        keys_values = fill(to_q, normed, rope, work)
        work.scratch.reset(unpacked)
        to_out = self.o.prepare(work.dtype, work.scratch)
        for number, span in enumerate(work.spans()):
            q = work.rows_at(0, within(span, span.start))
            if number > 0:  # the first ones were made with keys and values
                make_queries(to_q, self.norm_q.weight, self.eps, normed, rope, span, work)
            seen = q.clone() if hooks.sees_attention else None  # attention may write over it
            attended = work.attend_tokens(q, span, keys_values)
            if seen is not None:
                hooks.attended(*(work.in_heads(t) for t in (attended, seen, work.keys)))
                seen = None
            project_out(to_out, attended, add, span, work, over_queries=work.queries_are_free)
            del attended  # before there is that of the next span

    def fill(self, to_q: Projection, normed: Normed, rope: Rope, work: Workspace) -> Pair:
        """Make k and v of all rows, and q of the first span, of the same normed rows."""
        to_k, to_v = (layer.prepare(work.dtype, work.scratch) for layer in (self.k, self.v))
        for rows, has_q in work.chunks_with_queries():
            k, v = work.rows_at_each([work.first_key, work.first_value], rows)
            if has_q:
                q = work.rows_at(0, rows)
                project_together([to_q, to_k, to_v], normed(rows), [q, k, v])
                work.ops.rms_norm_(q, self.norm_q.weight, self.eps, rope, rows.start)
            else:
                project_together([to_k, to_v], normed(rows), [k, v])
            work.ops.rms_norm_(k, self.norm_k.weight, self.eps, rope, rows.start)
        return work.in_heads(work.keys), work.in_heads(work.values)

    def fill_packed(self, to_q: Projection, normed: Normed, rope: Rope, work: Workspace) -> Pair:
        """The same with k and v in 8 bits."""
        k, v = work.packed_keys_values()
        to_k, to_v = (layer.prepare(work.dtype, work.scratch) for layer in (self.k, self.v))
        for rows, has_q in work.chunks_with_queries():
            projections = [to_k, to_v, to_q] if has_q else [to_k, to_v]
            self._fill_packed_rows(rows, projections, normed(rows), (k, v), rope, work)
        return k, v

    def _fill_packed_rows(
        self,
        rows: slice,
        projections: Sequence[Projection],
        x: GivenRows,
        packed: tuple[PackedHeads, PackedHeads],
        rope: Rope,
        work: Workspace,
    ) -> None:
        """Those rows of k and v, and of q where there are its projections; one after the other, in one tensor."""
        # first, as the larger piece: an allocator then has room for the other beside it
        made, (k, v) = torch.empty(x.shape, dtype=x.dtype, device=x.device), packed
        of_k, of_v, *of_q = share_rows(projections, x)
        write_product(projections[0], of_k, made)
        k.fill_normed(rows, made, self.norm_k.weight, self.eps, rope)
        write_product(projections[1], of_v, made)
        v.fill(rows, made)
        if of_q:
            q = work.queries[rows]
            write_product(projections[2], of_q[0], q)
            work.ops.rms_norm_(q, self.norm_q.weight, self.eps, rope, rows.start)


class CrossAttention(nn.Module):
    def __init__(self, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim, **factory) for _ in range(4))
        self.norm_q, self.norm_k = (Scale(config.dim, **factory) for _ in range(2))
        if config.image_dim:
            self.k_img, self.v_img = (Linear(config.dim, config.dim, **factory) for _ in range(2))
            self.norm_k_img = Scale(config.dim, **factory)

    def forward(self, normed: Normed, add: Add, keys_values: KeysValues, work: Workspace) -> None:
        work.scratch.reset()
        to_q, to_out = (layer.prepare(work.dtype, work.scratch) for layer in (self.q, self.o))
        # pictures' attention is a second result of that size, guided attention another one
        in_chunks = work.attends_in_chunks and keys_values.nag is None and len(keys_values.pairs) == 1
        for span in work.chunks_of_samples() if in_chunks else work.spans():
            make_queries(to_q, self.norm_q.weight, self.eps, normed, None, span, work)
            q = work.rows_at(0, within(span, span.start))
            if keys_values.nag is None:
                attended = work.attend_rows(q, span, keys_values.pairs, all_heads=in_chunks)
            else:
                attended = attend_guided(q, span, keys_values.pairs, keys_values.nag, work)
            project_out(to_out, attended, add, span, work, over_queries=in_chunks or work.queries_are_free)
            del attended

    def keys_values(self, context: Context) -> KeysValues:
        """Keys and values of the conditioning; they depend on the prompt alone, not on the step."""
        pairs = [self._pair(context.text, self.k, self.v, self.norm_k)]
        if context.image is not None:
            pairs.append(self._pair(context.image, self.k_img, self.v_img, self.norm_k_img))
        nag = context.nag
        if nag is None:
            return KeysValues(pairs)
        guide = NagKeys(self._pair(nag.text, self.k, self.v, self.norm_k), nag.settings, nag.samples)
        return KeysValues(pairs, guide)

    def _pair(self, tokens: Tensor, to_k: Linear, to_v: Linear, norm_k: Scale) -> tuple[Tensor, Tensor]:
        k = to_k(tokens)
        k = F.rms_norm(k.float(), k.shape[-1:], norm_k.weight.float(), self.eps).to(k.dtype)
        heads = "b n (h d) -> b n h d"
        return rearrange(k, heads, h=self.num_heads), rearrange(to_v(tokens), heads, h=self.num_heads)


class FeedForward(nn.Sequential):
    """Linear, tanh-GELU, linear, for as many rows at a time as the workspace has room for hidden activations."""

    def __init__(self, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__(
            Linear(config.dim, config.ffn_dim, device=device, dtype=dtype),
            nn.GELU("tanh"),
            Linear(config.ffn_dim, config.dim, device=device, dtype=dtype),
        )

    def forward(self, normed: Normed, add: Add, work: Workspace) -> None:  # type: ignore[override]
        feed_forward(self.widen, self.narrow, normed, add, slice(0, work.num_rows), work)

    @property
    def widen(self) -> Linear:
        return cast(Linear, self[0])

    @property
    def narrow(self) -> Linear:
        return cast(Linear, self[2])


def attend_guided(
    q: Tensor, span: slice, pairs: Sequence[tuple[Tensor, Tensor]], nag: NagKeys, work: Workspace
) -> Tensor:
    """Attention of the queries `q [rows, dim]` of a span to text and pictures, that to the text guided.

    Where attention replaces the queries, those for the negative prompt wait in the bytes of self-attention's keys, if
    these are wide enough.
    """
    text, *pictures = pairs
    for_negative = for_pictures = q
    if not work.queries_are_free:
        for_negative = q.clone() if work.packs_keys else work.keys[: q.shape[0]].copy_(q)
        for_pictures = q.clone() if pictures else q
    attended = work.attend_rows(q, span, [text])
    batch, tokens = work.rows.batch, work.num_rows // work.rows.batch
    k, v = (tensor.expand(batch, -1, -1, -1) for tensor in nag.pair)
    negative = work.attend_rows(for_negative, span, [(k, v)])
    for sample in range(span.start // tokens, -(-span.stop // tokens)):
        if nag.guides(sample):
            first, end = max(span.start, sample * tokens), min(span.stop, (sample + 1) * tokens)
            chunks = (within(rows, span.start) for rows in work.chunks(first, end))
            guide_(attended, negative, nag.settings, chunks)
    del negative
    return attended.add_(work.attend_rows(for_pictures, span, pictures)) if pictures else attended


def make_queries(
    to_q: Projection, weight: Tensor, eps: float, normed: Normed, rope: Rope | None, span: slice, work: Workspace
) -> None:
    """The workspace's queries of the rows `span`, normed by `weight`, turned by `rope`."""
    for rows in work.chunks(span.start, span.stop):
        q = work.rows_at(0, within(rows, span.start))
        to_q(normed(rows), out=q)
        work.ops.rms_norm_(q, weight, eps, rope, rows.start)


def project_out(
    to_out: Projection, attended: Tensor, add: Add, span: slice, work: Workspace, over_queries: bool
) -> None:
    """Add the projection of `attended`, which is of the rows `span`; it may be written over their queries."""
    for rows in work.chunks(span.start, span.stop):
        part = within(rows, span.start)
        given, out = attended[part], work.rows_at(0, part) if over_queries else None
        if out is None and may_write_over(to_out):
            out = given
        add(rows, to_out(given, out=out))
