"""Rows that are normed where they are read: in 8 bits at once, or as one tensor for all that share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from lowvram_video.fused.eager import EagerOps
from lowvram_video.fused.ops import NormedRows
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.transformer import Transformer
from lowvram_video.weights.kernels.late_rows import GivenRows
from lowvram_video.weights.kernels.low_rank_reference import TORCH
from lowvram_video.weights.kernels.row_reference import LARGEST, SMALLEST_SCALE, TorchRowOps
from lowvram_video.weights.kernels.rows import TritonRowOps
from lowvram_video.weights.linear.fp8 import Fp8Dequantized, Fp8Matmul
from lowvram_video.weights.linear.int8 import Int8Matmul
from lowvram_video.weights.linear.linear import Linear, project_gelu, project_together
from lowvram_video.weights.linear.low_rank import LowRank, SideBranch
from lowvram_video.weights.linear.projection import Projection
from lowvram_video.weights.linear.weight_format import PLAIN, WeightFormat
from torch import Tensor, nn

from . import test_framepack_model as framepack
from . import test_framepack_nag as framepack_nag
from . import test_model as wan

E4M3 = torch.float8_e4m3fn


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class LateOps(EagerOps):
    """Norms its rows where they are read, and tells how they were."""

    def __init__(self) -> None:
        self.tensors = self.in_8_bits = 0

    def modulated_norm(self, *given: Any) -> Tensor:
        self.tensors += 1
        return super().modulated_norm(*given)

    def affine_norm(self, *given: Any) -> Tensor:
        self.tensors += 1
        return super().affine_norm(*given)

    def modulated_rows(  # type: ignore[override]
        self, x: Tensor, shift: Tensor, scale: Tensor, first_row: int, rows_per_group: int, eps: float
    ) -> NormedRows:
        return NormedRows(self, x, scale, shift, eps, first_row, rows_per_group)

    def affine_rows(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> NormedRows:  # type: ignore[override]
        return NormedRows(self, x, weight, bias, eps)

    def quantize_normed(self, *given: Any) -> tuple[Tensor, Tensor]:
        self.in_8_bits += 1
        self.tensors -= 1  # which the reference makes on its way
        return super().quantize_normed(*given)


class OneKernelRows(TorchRowOps):
    """Takes what it quantises in 8 bits where it can have it so, as `TritonRowOps` does."""

    def quantize(self, x: GivenRows, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(x, Tensor):
            return super().quantize(x, dtype, out)
        return x.quantized(dtype, LARGEST[dtype], SMALLEST_SCALE)


def late_rows(x: Tensor) -> tuple[NormedRows, LateOps]:
    ops = LateOps()
    return ops.affine_rows(x, rand(x.shape[1], seed=7), rand(x.shape[1], seed=8), 1e-6), ops


FP8, INT8 = Fp8Matmul(ops=OneKernelRows()), Int8Matmul(ops=OneKernelRows())
ROTATED = Int8Matmul(16, ops=OneKernelRows())
KINDS: dict[str, tuple[WeightFormat, torch.dtype]] = {
    "fp8": (FP8, E4M3),
    "int8": (INT8, torch.int8),
    "rotated": (ROTATED, torch.int8),
    "unpacked": (Fp8Dequantized(), E4M3),
    "plain": (PLAIN, torch.float32),
}


def projection(kind: str, seed: int) -> Projection:
    """Of a layer 32 -> 16; `lora`: in fp8, with a low-rank update beside it."""
    form, dtype = KINDS["fp8" if kind == "lora" else kind]
    weight = rand(16, 32, seed=seed) * (20 if dtype == torch.int8 else 1)
    packed = {"weight": weight.to(dtype), "weight_scale": torch.full((16,), 0.1)}
    project = form.prepare(packed, rand(16, seed=seed + 100), torch.float32, None)
    if kind != "lora":
        return project
    return SideBranch(project, LowRank(rand(4, 32, seed=5), rand(16, 4, seed=6), torch.ones(4)), TORCH)


@pytest.mark.parametrize(
    ("kinds", "tensors", "in_8_bits"),
    [
        (["fp8", "fp8", "fp8"], 0, 1),
        (["int8", "int8"], 0, 1),
        (["rotated", "rotated"], 1, 0),
        (["plain", "unpacked", "plain"], 1, 0),
        (["fp8", "plain"], 1, 0),
        (["fp8", "int8"], 1, 0),
        (["lora", "lora", "lora"], 1, 0),
        (["fp8", "lora"], 1, 0),
    ],
)
def test_layers_that_share_rows_have_them_made_once(kinds: Sequence[str], tensors: int, in_8_bits: int) -> None:
    projections = [projection(kind, seed) for seed, kind in enumerate(kinds)]
    rows, ops = late_rows(rand(20, 32, seed=9))
    got, want = ([torch.empty(20, 16) for _ in kinds] for _ in range(2))
    project_together(projections, rows, got)
    assert (ops.tensors, ops.in_8_bits) == (tensors, in_8_bits)
    project_together(projections, rows.tensor(), want)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", [*KINDS, "lora"])
def test_one_layer_has_them_made_once(kind: str) -> None:
    project = projection(kind, 0)
    x = rand(20, 32, seed=9)
    expected = (0, 1) if kind in ("fp8", "int8") else (1, 0)
    want, gelu = project(late_rows(x)[0].tensor()), EagerOps().gelu_

    def into(rows: GivenRows, run: Callable[[GivenRows, Tensor], object]) -> Tensor:
        out = torch.empty(20, 16)
        run(rows, out)
        return out

    for run in (project, lambda rows, out: project_gelu(project, rows, out, gelu)):
        rows, ops = late_rows(x)
        got = into(rows, run)
        assert (ops.tensors, ops.in_8_bits) == expected
        want = into(rows.tensor(), run)
        assert torch.equal(got, want)


@pytest.mark.parametrize(("fp8", "dtype", "late"), [(True, E4M3, 1), (False, E4M3, 0), (False, torch.int8, 1)])
def test_fp8_is_made_at_once_where_the_gpu_casts_to_it(fp8: bool, dtype: torch.dtype, late: int) -> None:
    pytest.importorskip("triton")
    rows, ops = late_rows(rand(6, 32))
    values, scales = TritonRowOps(fp8=fp8).quantize(rows, dtype)
    assert (ops.tensors, ops.in_8_bits) == (1 - late, late)
    want = TorchRowOps().quantize(rows.tensor(), dtype)
    assert torch.equal(values.float(), want[0].float()) and torch.equal(scales, want[1])


def in_8_bits(model: Transformer, kind: str, lora: bool = False) -> None:
    """Have all layers of the blocks multiply so, with low-rank updates beside them or not."""
    form, dtype = KINDS[kind]
    for layer in layers_of(model):
        scale = layer.weight.abs().amax(1, keepdim=True) / LARGEST[dtype]
        values = layer.weight / scale
        values = values.round() if dtype == torch.int8 else values
        layer.weight = nn.Parameter(values.to(dtype), requires_grad=False)
        layer.register_buffer("weight_scale", scale)
        layer.format = form
        if lora:
            layer.register_buffer("lora_down", rand(4, layer.in_features) / 10)
            layer.register_buffer("lora_up", rand(layer.out_features, 4) / 10)
            layer.register_buffer("lora_scale", torch.ones(4))


def layers_of(model: Transformer) -> Iterator[Linear]:
    for block in model.ordered_blocks().values():
        for module in block.busy_modules():
            yield from (layer for layer in module.modules() if isinstance(layer, Linear))


def compare(run: Callable[[EagerOps], Tensor], fewest: int) -> LateOps:
    """The bits are those of rows that are made beforehand; at least so many were made in 8 bits at once."""
    ops = LateOps()
    got, want = run(ops), run(EagerOps())
    assert torch.equal(got, want)
    assert ops.in_8_bits >= fewest
    return ops


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
@pytest.mark.parametrize(
    "how", [{}, {"query_chunk": 30}, {"packed_keys": True, "query_chunk": 30}, {"head_groups": 2, "token_chunk": 7}]
)
def test_a_pass_of_wan_is_the_same(variant: str, how: dict[str, Any]) -> None:
    config = wan.VARIANTS[variant]
    model, inputs = wan.ours_of(config, wan.reference_of(config)), wan.inputs_of(config)
    in_8_bits(model, "fp8")

    def run(ops: EagerOps) -> Tensor:
        model.execution = Execution(ops=ops, **{"token_chunk": 20, **how})
        return model(**inputs)

    made = compare(run, config.num_layers * 3 * 6)
    assert made.tensors <= 18  # the head's


def test_a_pass_of_wan_with_loras_norms_once() -> None:
    config = wan.VARIANTS["t2v"]
    model, inputs = wan.ours_of(config, wan.reference_of(config)), wan.inputs_of(config)
    in_8_bits(model, "fp8", lora=True)

    def run(ops: EagerOps) -> Tensor:
        model.execution = Execution(ops=ops, token_chunk=1000)
        return model(**inputs)

    made = compare(run, 0)
    assert (made.tensors, made.in_8_bits) == (config.num_layers * 3 + 1, 0)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("token_chunk", [16, 1000])
@pytest.mark.parametrize("guided", [False, True])
def test_a_pass_of_framepack_is_the_same(kind: str, token_chunk: int, guided: bool) -> None:
    reference = framepack.reference_of(framepack.TINY)
    inputs = framepack.tiny_inputs(torch.Generator().manual_seed(2))
    model = framepack.ours_of(framepack.TINY, reference)
    in_8_bits(model, kind)

    def run(ops: EagerOps) -> Tensor:
        model.execution = Execution(ops=ops, token_chunk=token_chunk)
        if guided:
            return framepack_nag.run_guided(model, inputs, framepack_nag.negative_of(9))
        return framepack.run_ours(model, inputs, 437.5)

    # a double block's for q, k and v and the MLPs, a single one's and its MLP by halves; what norms of
    # two prompts make together is a tensor
    compare(run, 2 * 2 if guided else 2 * 4 + 2 * 3)
