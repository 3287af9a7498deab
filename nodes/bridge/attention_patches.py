"""Core's seam for other attention: `optimized_attention_override` in the transformer options.

Attention backends, sparse attention and Sage patches of other packs come in there. Such a function sees all queries of
a group of heads at once, in core's form: `[B, tokens, heads * head_dim]`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...attention.backend import QUANTISED_ERROR, AttentionSpec, AttentionWorkspace, Backend
from ...system.torch_compiler import outside_graphs

OVERRIDE = "optimized_attention_override"
FORM = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # of core's attention, after the heads


def attention_of(options: dict[str, Any], own: Backend, exact_lengths: Collection[int] = ()) -> Backend:
    """The attention that these transformer options ask for; `own` where they ask for none.

    Keys of `exact_lengths` tokens are those that core lets no override quantise.
    """
    override = options.get(OVERRIDE)
    return own if override is None else OverriddenAttention(override, options, own, exact_lengths)


class OverriddenAttention:
    """A `Backend` by a function of another pack, which may call ours."""

    name, exact, error = "override", False, QUANTISED_ERROR

    def __init__(
        self, override: Callable[..., Tensor], options: dict[str, Any], own: Backend, exact_lengths: Collection[int]
    ):
        self._override, self._options, self._own, self._exact = override, options, own, exact_lengths

    @property
    def workspace(self) -> AttentionWorkspace:
        return self._own.workspace

    def refuse(self, spec: AttentionSpec) -> str | None:
        return None

    @outside_graphs
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[2]
        arguments: dict[str, Any] = {"transformer_options": self._options, "_inside_attn_wrapper": True}
        if k.shape[1] in self._exact:
            arguments["low_precision_attention"] = False
        flat = (tensor.flatten(2) for tensor in (q, k, v))
        return self._override(self._by_ours, *flat, heads, **arguments).unflatten(2, (heads, -1))

    def _by_ours(self, q: Tensor, k: Tensor, v: Tensor, heads: int, *more: Any, **named: Any) -> Tensor:
        """What core hands an override as the original: `[B, L, heads * D]`, or `[B, heads, L, D]` by `skip_reshape`.

        With a mask or another scale it is core's own, for ours has none.
        """
        named |= zip(FORM, more, strict=False)
        if named.get("mask") is not None or named.get("scale") is not None or named.get("enable_gqa"):
            return optimized_attention(q, k, v, heads, **(named | {"_inside_attn_wrapper": True}))
        if named.get("skip_reshape", False):
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        else:
            q, k, v = (tensor.unflatten(2, (heads, -1)) for tensor in (q, k, v))
        out = self._own.attend(q, k, v)
        return out.transpose(1, 2) if named.get("skip_output_reshape", False) else out.flatten(2)
