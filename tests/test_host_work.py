"""What a block asks PyTorch for, on the host: on a fast card short clips, and several cards, wait for that alone.

An operator costs the host a microsecond or more even where it is a view and computes nothing, and nobody sees in review
that a block has some more of them; so their number is held here. One that is needed may raise it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from lowvram_video.fused.eager import EagerOps
from lowvram_video.fused.ops import Rope
from lowvram_video.transformer.execution import Execution
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import Extras, WanModel
from lowvram_video.weights.kernels.row_reference import TorchRowOps
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.weight_format import Plain
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAN = WanConfig("t2v", 64, 128, 2, 1, text_dim=32, freq_dim=32)


class OneKernelSteps(EagerOps):
    """Steps that ask for nothing but their result, as a kernel for each does."""

    def modulated_norm(
        self, x: Tensor, shift: Tensor, scale: Tensor, first_row: int, rows_per_group: int, eps: float, out: Any = None
    ) -> Tensor:
        return torch.empty_like(x)

    def affine_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return torch.empty_like(x)

    def rms_norm_(self, x: Tensor, weight: Tensor, eps: float, rope: Rope | None, first_row: int) -> None: ...

    def gelu_(self, x: Tensor) -> None: ...

    def gated_add_(self, x: Tensor, y: Tensor, gate: Tensor, first_row: int, rows_per_group: int) -> None: ...


class OneKernelRows(TorchRowOps):
    """Unpacks weights in as few."""

    def dequantize(self, values: Tensor, scales: Tensor | None, out: Tensor) -> Tensor:
        assert scales is None, "of a cast nobody makes scales of 1"
        return out


class Attention:
    """As few again."""

    name, exact, error = "none", True, 0.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(num_layers: int, execution: Execution) -> Counter[str]:
    """What a pass of so many blocks of fp8 weights asks for."""
    model = WanModel(replace(WAN, num_layers=num_layers), dtype=torch.bfloat16)
    for layer in model.blocks.modules():
        if isinstance(layer, Linear):
            layer.format = Plain(OneKernelRows())
            layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    model.execution = execution
    with torch.inference_mode():
        context = model.embed_context(torch.zeros(1, 4, WAN.text_dim))
        context.keys_values = [block.cross_attn.keys_values(context) for block in model.blocks]
        with Counted() as counted:
            model(torch.zeros(1, 16, 1, 8, 8), torch.tensor([700.0]), context, extras=Extras())
    return counted.operators


@pytest.mark.parametrize(("token_chunk", "most"), [(4096, 64), (8, 100)])
def test_a_block_asks_for_few_operators(token_chunk: int, most: int) -> None:
    execution = Execution(torch.bfloat16, Attention(), OneKernelSteps(), token_chunk)
    of_two = operators(3, execution)
    of_two.subtract(operators(1, execution))
    assert sum(of_two.values()) / 2 <= most, of_two.most_common()
