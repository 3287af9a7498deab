"""Low-rank updates beside layers: shared between layers, in the pass of GELU, and their Triton kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from lowvram_video.fused.eager import EagerOps
from lowvram_video.system.kernel_choice import disagreement, reason_against
from lowvram_video.weights.kernels.low_rank_ops import STEPS, Choice, ChosenLowRankOps, Probe, Step, select_low_rank_ops
from lowvram_video.weights.kernels.low_rank_reference import TORCH, Gelu, LowRankOps, TorchLowRankOps
from lowvram_video.weights.kernels.row_reference import TorchRowOps
from lowvram_video.weights.linear.fp8 import Fp8Matmul
from lowvram_video.weights.linear.int8 import Int8Matmul
from lowvram_video.weights.linear.linear import Linear, project_gelu, project_together
from lowvram_video.weights.linear.weight_format import PLAIN, WeightFormat
from torch import Tensor

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


class CountingRows(TorchRowOps):
    """Counts how often rows are quantised."""

    def __init__(self) -> None:
        self.calls = 0

    def quantize(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().quantize(x, dtype)


class CountingLowRank(TorchLowRankOps):
    """Counts how often rows are read for updates."""

    def __init__(self) -> None:
        self.calls = 0

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        self.calls += 1
        return super().project_down(x, down, scale)


class Broken(TorchLowRankOps):
    name = "broken"

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Gelu | None = None) -> None:
        y.mul_(1.1)
        if gelu_ is not None:
            gelu_(y)


def layer_with(
    rank: int, seed: int = 0, form: WeightFormat = PLAIN, scale: float = 0.7, outputs: int = 48
) -> tuple[Linear, Tensor]:
    """A layer of 64 inputs and the weight that it stands for, update included; rank 0 has none."""
    layer = Linear(64, outputs)
    weight, layer.format = rand(outputs, 64, seed=seed) / 8, form
    layer.bias = torch.nn.Parameter(rand(outputs, seed=seed + 1), requires_grad=False)
    if isinstance(form, Fp8Matmul | Int8Matmul):
        largest, dtype = (448, torch.float8_e4m3fn) if isinstance(form, Fp8Matmul) else (127, torch.int8)
        size = weight.abs().amax(1, keepdim=True) / largest
        stored = (weight / size).round() if dtype == torch.int8 else weight / size
        weight = stored.to(dtype).float() * size
        layer.weight = torch.nn.Parameter(stored.to(dtype), requires_grad=False)
        layer.register_buffer("weight_scale", size)
    else:
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if rank:
        down, up = rand(rank, 64, seed=seed + 2) / 8, rand(outputs, rank, seed=seed + 3) / 10
        layer.register_buffer("lora_down", down)
        layer.register_buffer("lora_up", up)
        layer.register_buffer("lora_scale", torch.full((rank,), scale))
        weight = weight + scale * up @ down
    return layer, weight


FORMS: dict[str, Callable[[], WeightFormat]] = {"plain": lambda: PLAIN, "fp8": Fp8Matmul, "int8": Int8Matmul}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [(4, 12, 1), (8, 0, 3), (0, 0, 5), (0, 0, 0)], ids=str)
def test_layers_together_are_their_merged_weights(ranks: tuple[int, ...], form: str) -> None:
    x = rand(20, 64, seed=9)
    layers = [layer_with(rank, seed, FORMS[form]()) for seed, rank in enumerate(ranks)]
    outs = [torch.full((20, 48), torch.nan) for _ in layers]
    project_together([layer.prepare(torch.float32) for layer, _ in layers], x, outs)
    errors = []
    for (layer, weight), rank, out in zip(layers, ranks, outs, strict=True):
        errors.append(relative(out, x.double() @ weight.double().t() + layer.bias.double()))
        # by itself it is the same but for the order of its sums
        torch.testing.assert_close(layer(x), out, rtol=1e-5, atol=1e-5)
        if rank:
            layer.lora_scale.zero_()
    print(f"{form}, ranks {ranks}: relative errors {', '.join(f'{error:.1e}' for error in errors)}")
    # 8-bit rows: the error of the layer's own product, to which the update adds none
    assert max(errors) < (1e-6 if form == "plain" else 0.04)

    # strength 0 is no LoRA, bit for bit
    for (layer, _), rank in zip(layers, ranks, strict=True):
        bare, _ = layer_with(0, form=layer.format)
        bare.weight, bare.bias = layer.weight, layer.bias
        if form != "plain":
            bare.weight_scale = layer.weight_scale
        again = torch.empty(20, 48)
        project_together([layer.prepare(torch.float32)], x, [again])
        assert torch.equal(again, bare(x)), rank


def test_rows_are_read_once_for_all_updates_and_quantised_once() -> None:
    x = rand(20, 64)
    rows, low_rank = CountingRows(), CountingLowRank()
    layers = [layer_with(rank, rank, Fp8Matmul(ops=rows))[0] for rank in (4, 0, 12)]
    for layer in layers:
        layer.low_rank_ops = low_rank
    project_together([layer.prepare(torch.float32) for layer in layers], x, [torch.empty(20, 48) for _ in layers])
    assert (rows.calls, low_rank.calls) == (1, 1)


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("form", FORMS)
def test_gelu_of_a_product(form: str, rank: int) -> None:
    x, gelu_ = rand(20, 64, seed=9), EagerOps().gelu_
    layer, weight = layer_with(rank, form=FORMS[form]())
    out = torch.full((20, 48), torch.nan)
    project_gelu(layer.prepare(torch.float32), x, out, gelu_)
    product = layer(x)
    gelu_(product)
    assert torch.equal(out, product)
    exact = torch.nn.functional.gelu(x.double() @ weight.double().t() + layer.bias.double(), approximate="tanh")
    print(f"{form}, rank {rank}: relative error {relative(out, exact):.1e}")
    assert relative(out, exact) < (1e-6 if form == "plain" else 0.04)


def test_bf16_updates_are_within_rounding() -> None:
    layer, weight = layer_with(8)
    x = rand(100, 64, seed=9)
    want = x.bfloat16().double() @ weight.double().t() + layer.bias.double()
    beside = layer.bfloat16()(x.bfloat16())
    merged = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), layer.bias)
    errors = relative(beside, want), relative(merged, want)
    print(f"bf16: beside {errors[0]:.1e}, merged {errors[1]:.1e}")
    assert errors[0] < 1.5 * errors[1]


# --- choosing --------------------------------------------------------------------------------------------


def test_a_cpu_has_pytorch_s_products() -> None:
    assert select_low_rank_ops(CPU) is TORCH


def test_ops_are_chosen_by_rank() -> None:
    few, many = CountingLowRank(), CountingLowRank()
    ops: LowRankOps = ChosenLowRankOps(
        (Choice(4, few, few, few), Choice(8, many, many, many), Choice(sys.maxsize, TORCH, TORCH, TORCH))
    )
    x = rand(3, 16)
    for rank, calls in ((1, (1, 0)), (4, (2, 0)), (5, (2, 1)), (8, (2, 2)), (9, (2, 2))):
        down, up, scale = rand(rank, 16), rand(16, rank), rand(rank)
        hidden, y, gelu = ops.project_down(x, down, scale), torch.zeros(3, 16), torch.zeros(3, 16)
        assert (few.calls, many.calls) == calls
        ops.add_up_(y, hidden, up)
        ops.add_up_(gelu, hidden, up, EagerOps().gelu_)
        torch.testing.assert_close(y, (x @ down.T * scale) @ up.T)
        torch.testing.assert_close(gelu, torch.nn.functional.gelu(y, approximate="tanh"))


def wrong(step: Step, ops: LowRankOps, probe: Probe) -> str | None:
    return reason_against(lambda: disagreement(probe.error(step, ops)), CPU)


def test_what_fails_or_is_wrong_is_not_chosen() -> None:
    probe = Probe(CPU, 4, num_rows=10, features=32)
    before = probe.x.clone()
    assert all(wrong(step, TORCH, probe) is None for step in STEPS)
    assert all(wrong(step, Broken(), probe) for step in STEPS)
    assert torch.equal(probe.x, before)


# --- kernels ---------------------------------------------------------------------------------------------


def check_kernels(device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    from lowvram_video.weights.kernels.low_rank import CANDIDATES, TritonLowRankOps
    from lowvram_video.weights.kernels.tile import Tile

    tile = Tile(16, 16, 32, 4, 2)
    found = (TritonLowRankOps(tile, tile),) if device == "cpu" else CANDIDATES
    for dtype in dtypes:
        for rank in (4, 32, 50):
            x, down, scale = rand(37, 80).to(device, dtype), rand(rank, 80).to(device, dtype), rand(rank).to(device)
            wide = rand(37, rank + 6, seed=1).to(device, dtype)  # hidden of several layers
            hidden, up, y = wide[:, 3 : rank + 3], rand(96, rank, seed=2).to(device, dtype), rand(50, 96, seed=3)
            for ops in found:
                got, want = ops.project_down(x, down, scale), (x.double() @ down.double().T) * scale.double()
                errors = [relative(got, want)]
                total = y.to(device, dtype)[7:44].double() + hidden.double() @ up.double().T
                for run in (ops.add_up_, lambda *a: ops.add_up_(*a, EagerOps().gelu_)):  # noqa: B023 - at once
                    buffer = y.to(device, dtype)
                    before = buffer.clone()
                    run(buffer[7:44], hidden, up)
                    errors.append(relative(buffer[7:44], total))
                    assert torch.equal(buffer[:7], before[:7]) and torch.equal(buffer[44:], before[44:])
                    total = torch.nn.functional.gelu(total, approximate="tanh")
                print(f"{device} {dtype} {ops.name} rank {rank}: " + ", ".join(f"{error:.1e}" for error in errors))
                assert max(errors) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


def check_zero_strength(device: str, dtype: torch.dtype) -> None:
    """y stays as it is, bit for bit, and becomes what GELU by itself makes of it."""
    from lowvram_video.fused.triton_ops import TritonOps
    from lowvram_video.weights.kernels.low_rank import CANDIDATES, TritonLowRankOps
    from lowvram_video.weights.kernels.tile import Tile

    tile = Tile(16, 16, 32, 4, 2)
    found = (TritonLowRankOps(tile, tile),) if device == "cpu" else CANDIDATES
    for ops in found:
        x, down, up = (rand(*shape).to(device, dtype) for shape in ((37, 80), (20, 80), (96, 20)))
        hidden = ops.project_down(x, down, torch.zeros(20, device=device))
        y = (3 * rand(37, 96, seed=3)).to(device, dtype)
        same, turned, want = y.clone(), y.clone(), y.clone()
        ops.add_up_(same, hidden, up)
        ops.add_up_(turned, hidden, up, TritonOps().gelu_)
        TritonOps().gelu_(want)
        assert torch.equal(same, y) and torch.equal(turned, want), ops.name


def check_operators() -> None:
    """What torch.compile is told of the kernels is true."""
    from lowvram_video.weights.kernels.low_rank import low_rank_down, low_rank_up_

    x, down, up = rand(20, 32).half(), rand(4, 32).half(), rand(48, 4).half()
    torch.library.opcheck(low_rank_down, (x, down, rand(4), [16, 16, 32, 4, 2]))
    torch.library.opcheck(low_rank_up_, (rand(20, 48).half(), rand(20, 4).half(), up, True, [16, 16, 32, 4, 2]))


def check_compiled() -> None:
    """Compiled code calls the operators, in one graph, and they are the kernels."""
    from lowvram_video.weights.kernels.low_rank import TritonLowRankOps
    from lowvram_video.weights.kernels.tile import Tile

    ops = TritonLowRankOps(Tile(16, 16, 32, 4, 2), Tile(16, 32, 16, 4, 2))
    x, down, scale, up = rand(20, 32).half(), rand(4, 32).half(), rand(4), rand(48, 4).half()

    def run(y: Tensor) -> Tensor:
        hidden = ops.project_down(x, down, scale)
        ops.add_up_(y, hidden, up)
        ops.add_up_(y, hidden, up, EagerOps().gelu_)
        return y * 2

    with torch.inference_mode():
        want = run(rand(20, 48).half())
        assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(rand(20, 48).half()), want)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
def test_triton_interpreted_on_the_cpu() -> None:
    # the interpreter is chosen when kernels are defined: a process of its own; it multiplies bf16 by its bit patterns
    code = f"import sys, torch; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_low_rank as t; "
    code += (
        "t.check_kernels('cpu', (torch.float16,)); t.check_zero_strength('cpu', torch.float16); t.check_operators(); "
    )
    code += "t.check_compiled()"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


@pytest.mark.gpu
@needs_gpu
def test_kernels_on_the_gpu() -> None:
    check_kernels("cuda", (torch.bfloat16, torch.float16))
    check_zero_strength("cuda", torch.bfloat16)


@pytest.mark.gpu
@needs_gpu
def test_what_is_chosen_on_the_gpu() -> None:
    device = torch.device("cuda")
    ops = select_low_rank_ops(device)
    assert isinstance(ops, ChosenLowRankOps)
    for rank in (3, 64, 192, 300):
        for step in STEPS:
            error = Probe(device, rank, num_rows=300, features=320).error(step, ops)
            print(f"rank {rank}, {step.__name__}: {error:.1e}")
            assert error < 1e-2


@pytest.mark.gpu
@needs_gpu
def test_compiled_updates_of_views_of_one_buffer() -> None:
    from lowvram_video.weights.kernels.low_rank import CANDIDATES

    layers = []
    for seed, rank in enumerate((4, 0, 12)):
        layer = layer_with(rank, seed)[0].to("cuda", torch.bfloat16)
        layer.low_rank_ops = CANDIDATES[0]
        layers.append(layer)

    def run(x: Tensor, pool: Tensor) -> None:
        outs = pool.view(3, 20, 48).unbind(0)
        project_together([layer.prepare(x.dtype) for layer in layers], x, outs)

    x = rand(20, 64).to("cuda", torch.bfloat16)
    want, got = (torch.zeros(3 * 20 * 48, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with torch.inference_mode():
        run(x, want)
        torch.compile(run)(x, got)
    error = relative(got, want)
    print(f"compiled: {error:.1e}")
    assert error < 5e-3
