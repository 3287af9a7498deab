"""Packages of inexact attention as far as they are called: their signatures, around a function `[B, L, H, D]`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def int8(function: Function) -> dict[str, SimpleNamespace]:
    """comfy-kitchen's `int8_attention`: heads before tokens, a contiguous last dimension."""

    def int8_attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        assert scale is None and attn_mask is None
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        return function(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)

    return {"comfy_kitchen": SimpleNamespace(int8_attention=int8_attention)}


def sage_2pp(
    function: Function, sums: str = "fp32+fp16", granularity: str | None = "per_thread"
) -> dict[str, SimpleNamespace]:
    """sageattention 2.2's function for cards of 8.9 and 12.0; before 2.2 its sums were others by default."""

    def sageattn_qk_int8_pv_fp8_cuda(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        qk_quant_gran: str = "per_thread",
        sm_scale: float | None = None,
        pv_accum_dtype: str = sums,
        smooth_k: bool = True,
        smooth_v: bool = False,
        return_lse: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        assert not kwargs and not is_causal and not return_lse and smooth_k
        assert (tensor_layout, pv_accum_dtype) == ("NHD", "fp32+fp16")
        assert granularity in (None, qk_quant_gran)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        return function(q, k, v)

    return {"sageattention": SimpleNamespace(sageattn_qk_int8_pv_fp8_cuda=sageattn_qk_int8_pv_fp8_cuda)}


def sage_3(function: Function) -> dict[str, SimpleNamespace]:
    """sageattn3: heads before tokens; it takes the mean from k in place."""

    def sageattn3_blackwell(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        per_block_mean: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        assert attn_mask is None and not is_causal and not kwargs
        k -= k.mean(dim=-2, keepdim=True)
        return function(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)

    return {"sageattn3": SimpleNamespace(sageattn3_blackwell=sageattn3_blackwell)}
