"""The blocks of a FramePack transformer: double ones with weights of their own for image and text, and single ones.

Source: Tencent/HunyuanVideo (`hyvideo/modules/models.py`) and lllyasviel/FramePack; parameter names are diffusers'. The
residual stream `x` (image rows, then text rows) and q, k, v are the only token-sized tensors: norms are made chunk by
chunk inside the projections, attention writes over q or leaves it to the products after it, what the MLPs widen lives
in the bytes of q, k and v (in those of k and v where q's are in use), and residuals are added in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...fused.ops import Rope
from ...transformer.feed_forward import Add, Normed, feed_forward
from ...transformer.layers import Scale
from ...transformer.nag import guide_
from ...transformer.rows import writable
from ...transformer.transformer import Block
from ...transformer.workspace import Workspace
from ...weights.linear.linear import Linear, project_gelu
from ...weights.linear.projection import DenseProjection
from .config import FramePackConfig
from .rows import Negative, modulated, modulated_text, project_out, project_qkv, spare_rows, widen_into


@dataclass(frozen=True)
class Pass:
    """What the blocks of one forward pass share: `x [rows, dim]`, changed in place; the first `num_image` are image.

    `rope` covers all rows; it turns those of the text by nothing. The last `num_negative` are a negative prompt's text.
    `all_images` are the image rows of all cards that share the pass.
    """

    x: Tensor
    num_image: int
    rope: Rope
    work: Workspace
    num_negative: int = 0
    all_images: int = 0


class Modulation(nn.Module):
    """`[S, dim] -> [S, num_vectors, dim]`: the vectors that shift, scale or gate tokens, for S timesteps."""

    def __init__(self, config: FramePackConfig, num_vectors: int):
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = Linear(config.dim, num_vectors * config.dim)

    def forward(self, time: Tensor) -> Tensor:
        return self.linear(F.silu(time)).unflatten(1, (self.num_vectors, -1))


class FramePackBlock(Block):
    """A block whose modulation is made beforehand, of timestep and prompt alone."""

    def modulate(self, time: Tensor) -> Tensor:
        """`[S, dim] -> [S, k, dim]`: the modulation of S steps."""
        raise NotImplementedError

    def advance(self, state: Pass, modulation: Tensor, negative: Negative | None = None) -> None:
        """Take a pass through this block; `modulation [k, dim]` is that of its step."""
        self(state.x, modulation.float(), state.num_image, state.rope, state.work, negative)

    def together(self) -> list[list[Linear]]:
        """The layers of a pass, those in one list unpacked at the same time."""
        raise NotImplementedError

    def scratch_elements(self, dtype: torch.dtype) -> int:
        return max(sum(layer.scratch_elements(dtype) for layer in layers) for layers in self.together())

    def busy_modules(self) -> list[nn.Module]:
        """All but the modulation, which acts on one row per step."""
        return [layer for layers in self.together() for layer in layers]


class DoubleBlock(FramePackBlock):
    """Joint attention and feed-forward; image and text rows have weights of their own."""

    stages: tuple[tuple[str, ...], ...] = (("attn.",), ("ff.",), ("ff_context.",))

    def __init__(self, config: FramePackConfig):
        super().__init__()
        self.eps = config.eps
        self.norm1 = Modulation(config, 6)
        self.norm1_context = Modulation(config, 6)
        self.attn = JointAttention(config)
        self.ff = FeedForward(config.dim, config.mlp_dim)
        self.ff_context = FeedForward(config.dim, config.mlp_dim)

    def modulate(self, time: Tensor) -> Tensor:
        return torch.cat([self.norm1(time), self.norm1_context(time)], dim=1)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        num_image: int,
        rope: Rope,
        work: Workspace,
        negative: Negative | None = None,
    ) -> None:
        """`x [rows, dim]` in place; `modulation [12, dim]` fp32, six vectors for image and six for text."""
        x = writable(x)
        work.arrive(self, 0)
        attn, eps = self.attn, self.eps
        image, text = slice(0, num_image), slice(num_image, x.shape[0])
        norm_image, add_image = modulated(x, modulation[0:3], eps, work)
        norm_text, add_text = modulated_text(x, modulation, slice(6, 9), negative, eps, work)
        project_qkv((attn.to_q, attn.to_k, attn.to_v), attn.norms(), norm_image, image, rope, eps, work)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        project_qkv(added, attn.added_norms(), norm_text, text, rope, eps, work)
        attended = attn.attend(num_image, negative, work)
        spare = spare_rows(negative, work)
        project_out(cast(Linear, attn.to_out[0]), attended, spare, add_image, image, work)
        project_out(attn.to_add_out, attended, spare, add_text, text, work)
        del attended  # there is room for the rest without it

        work.arrive(self, 1)
        self.ff(*modulated(x, modulation[3:6], eps, work), image, work)
        work.arrive(self, 2)
        self.ff_context(*modulated_text(x, modulation, slice(9, 12), negative, eps, work), text, work)

    def together(self) -> list[list[Linear]]:
        attn = self.attn
        return [
            [attn.to_q, attn.to_k, attn.to_v],
            [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj],
            [cast(Linear, attn.to_out[0])],
            [attn.to_add_out],
            *([layer] for ff in (self.ff, self.ff_context) for layer in (ff.widen, ff.narrow)),
        ]


class SingleBlock(FramePackBlock):
    """Attention and MLP side by side over image and text rows alike, projected out together."""

    stages: tuple[tuple[str, ...], ...] = (("attn.",), ("proj_mlp.", "proj_out."))

    def __init__(self, config: FramePackConfig):
        super().__init__()
        self.eps = config.eps
        self.norm = Modulation(config, 3)
        self.attn = Attention(config)
        self.proj_mlp = Linear(config.dim, config.mlp_dim)
        self.proj_out = Linear(config.dim + config.mlp_dim, config.dim)

    def modulate(self, time: Tensor) -> Tensor:
        return self.norm(time)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        num_image: int,
        rope: Rope,
        work: Workspace,
        negative: Negative | None = None,
    ) -> None:
        """`x [rows, dim]` in place; `modulation [3, dim]` fp32."""
        x = writable(x)
        work.arrive(self, 0)
        attn, eps = self.attn, self.eps
        dense = self.proj_out.is_dense(work.dtype)
        # what is normed for attention is what the MLP reads, too
        kept = work.kept_rows if dense and negative is None else None
        normed, add = modulated_text(x, modulation, slice(0, 3), negative, eps, work, kept)
        everything = slice(0, x.shape[0])
        project_qkv((attn.to_q, attn.to_k, attn.to_v), attn.norms(), normed, everything, rope, eps, work)
        attended = attn.attend(num_image, negative, work)
        spare = spare_rows(negative, work)
        if kept is not None:
            normed = kept.__getitem__
        work.arrive(self, 1)
        step = work.hidden_after_q_rows if dense else work.joined_rows
        for start in range(0, work.num_rows, step):
            span = slice(start, min(start + step, work.num_rows))
            if dense:
                self.add_both(attended, spare, normed, add, span, work)
            else:
                self.join(attended, normed, add, span, work)

    def add_both(
        self, attended: Tensor, spare: Tensor | None, normed: Normed, add: Add, span: slice, work: Workspace
    ) -> None:
        """MLP and output of some rows; the two halves of the output's weight are multiplied one after the other."""
        work.scratch.reset()
        project = self.proj_mlp.prepare(work.dtype, work.scratch)
        for rows in work.chunks(span.start, span.stop):
            hidden = work.hidden_after_q[rows.start - span.start : rows.stop - span.start]
            project_gelu(project, normed(rows), hidden, work.ops.gelu_)
        work.scratch.reset()
        of_attention, of_mlp = cast(DenseProjection, self.proj_out.prepare(work.dtype, work.scratch)).split(work.dim)
        for rows in work.chunks(span.start, span.stop):
            hidden = work.hidden_after_q[rows.start - span.start : rows.stop - span.start]
            out = of_mlp(hidden, out=None if spare is None else spare[rows])
            add(rows, out.addmm_(attended[rows], of_attention.weight.t()))
            del out  # before there are the next rows

    def join(self, attended: Tensor, normed: Normed, add: Add, span: slice, work: Workspace) -> None:
        """The same, joined in one row for a product that quantises whole rows."""
        dim = work.dim
        work.scratch.reset()
        project = self.proj_mlp.prepare(work.dtype, work.scratch)
        for rows in work.chunks(span.start, span.stop):
            joined = work.joined[rows.start - span.start : rows.stop - span.start]
            joined[:, :dim].copy_(attended[rows])
            widen_into(project, normed(rows), joined[:, dim:], work)
        work.scratch.reset()
        project = self.proj_out.prepare(work.dtype, work.scratch)
        for rows in work.chunks(span.start, span.stop):
            add(rows, project(work.joined[rows.start - span.start : rows.stop - span.start]))

    def together(self) -> list[list[Linear]]:
        return [[self.attn.to_q, self.attn.to_k, self.attn.to_v], [self.proj_mlp], [self.proj_out]]


class Attention(nn.Module):
    """The layers of self-attention, without an output projection; norms are head by head."""

    def __init__(self, config: FramePackConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.to_q, self.to_k, self.to_v = (Linear(config.dim, config.dim) for _ in range(3))
        self.norm_q, self.norm_k = (Scale(config.head_dim) for _ in range(2))

    def norms(self) -> tuple[Scale, Scale]:
        return self.norm_q, self.norm_k

    def attend(self, num_image: int, negative: Negative | None, work: Workspace) -> Tensor:
        """The attention `[rows, dim]` of q to k and v.

        Over q where heads go in groups, cards share the pass or a negative prompt guides, else a tensor of its own.
        """
        if negative is None:
            keys_values = self.in_heads(work.keys), self.in_heads(work.values)
            return work.attend_tokens(work.queries, slice(0, work.num_rows), keys_values)
        if work.part is None:
            self.attend_guided(num_image, negative, work)
        else:
            self.attend_shared(num_image, negative, work)
        return work.queries

    def attend_shared(self, num_image: int, negative: Negative, work: Workspace) -> None:
        """`attend_guided` where several cards share the pass: all heads of a row are needed to guide it."""
        part, q, opposed = work.part, work.queries, torch.empty_like(work.queries)
        assert part is not None
        qkv = self.in_heads(q), self.in_heads(work.keys), self.in_heads(work.values)
        attend = partial(negative.attend_all, work.self_attend)
        part.attend_many(qkv, (self.in_heads(opposed),), attend, work.execution.head_groups)
        guide_(q[:num_image], opposed[:num_image], negative.settings, work.chunks(0, num_image))

    def attend_guided(self, num_image: int, negative: Negative, work: Workspace) -> None:
        """Replace q by attention of either prompt beside the image rows; one guides the other's.

        The image rows' attention with the prompt is guided by that with the negative one. Its rows
        of q, k and v take the place of the prompt's once those are read.
        """
        q, k, v = work.queries, work.keys, work.values
        first = negative.first
        end = num_image + q.shape[0] - first
        again = q if work.queries_are_free else q.clone()  # in groups of heads attention replaces q
        attended = self.attended(q[:first], k[:first], v[:first], work)
        for rows in (again, k, v):
            rows[num_image:end] = rows[first:].clone()
        opposed = self.attended(again[:end], k[:end], v[:end], work)
        guide_(attended[:num_image], opposed[:num_image], negative.settings, work.chunks(0, num_image))
        if work.queries_are_free:
            q[:first].copy_(attended)
        q[first:].copy_(opposed[num_image:])

    def attended(self, q: Tensor, k: Tensor, v: Tensor, work: Workspace) -> Tensor:
        """`[rows, dim]`: q's bytes where heads go in groups, else a tensor of its own."""
        attended = work.attend(self.in_heads(q), [(self.in_heads(k), self.in_heads(v))], work.self_attend)
        return attended.reshape(attended.shape[1], -1)

    def in_heads(self, rows: Tensor) -> Tensor:
        return rows.view(1, rows.shape[0], self.num_heads, -1)


class JointAttention(Attention):
    """The same with layers of their own for text rows, and output projections."""

    def __init__(self, config: FramePackConfig):
        super().__init__(config)
        dim = config.dim
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(dim, dim) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (Scale(config.head_dim) for _ in range(2))
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.to_add_out = Linear(dim, dim)

    def added_norms(self) -> tuple[Scale, Scale]:
        return self.norm_added_q, self.norm_added_k


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear, for as many rows at a time as the workspace has room for hidden activations."""

    def __init__(self, dim: int, mlp_dim: int):
        super().__init__()
        widen = nn.ModuleDict({"proj": Linear(dim, mlp_dim)})
        self.net = nn.ModuleDict({"0": widen, "2": Linear(mlp_dim, dim)})

    def forward(self, normed: Normed, add: Add, span: slice, work: Workspace) -> None:
        feed_forward(self.widen, self.narrow, normed, add, span, work)

    @property
    def widen(self) -> Linear:
        return cast(Linear, cast(nn.ModuleDict, self.net["0"])["proj"])

    @property
    def narrow(self) -> Linear:
        return cast(Linear, self.net["2"])
